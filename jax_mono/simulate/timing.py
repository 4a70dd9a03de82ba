"""What the simulator must know of a device and of a program on it, and where each number comes from.

Rates are bytes per nanosecond (GB/s), times nanoseconds. Nothing here was fitted to the time of a token: numbers are
micro-benchmarks, vendors' figures, counts from the sources, or assumptions that say so.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from jax_mono.topology import H100, H200, MI300X, Topology


@dataclass(frozen=True)
class Parameter:
    """A number with its origin.

    Attributes:
        value: The number.
        origin: ``measured``, ``derived`` from measured ones, ``counted`` in the sources, or ``assumed``.
        note: How.
    """

    value: float
    origin: Literal["measured", "derived", "counted", "assumed"]
    note: str


@dataclass(frozen=True)
class Work:
    """What a block does after it has received a hand-off, beside the product.

    Attributes:
        trips: Loads that wait for each other, such as those of a norm's scale.
        barriers: Barriers of the block, those of reductions included.
    """

    trips: int
    barriers: int


@dataclass(frozen=True)
class Program:
    """How a program reads hand-offs.

    Attributes:
        name: For tables.
        threads: Of a block that read.
        warp: Threads that poll together.
        batch: Words that a thread asks for before it looks at the first, by channel; others take ``usual_batch``.
        usual_batch: The same for other channels.
        polls: ``together``: a thread asks again for all words that are not there. ``each``: it waits for one word after
            the other; of a warp one lane polls, and the others look again when it has its word.
        pause_ns: Between two polls.
        clusters: Blocks that share the polls of a hand-off among them.
        work: By channel, what follows a receive.
        product_barriers: Barriers of a product.
        computes: Whether it looks up embeddings, reads the KV cache and asks the host, or only moves weights and words.
    """

    name: str
    threads: int
    warp: int
    batch: MappingProxyType[str, int]
    usual_batch: int
    polls: Literal["together", "each"]
    pause_ns: float
    clusters: int = 1
    work: MappingProxyType[str, Work] = field(default_factory=lambda: MappingProxyType({}))
    product_barriers: int = 0
    computes: bool = True


@dataclass(frozen=True, kw_only=True)
class Timing:
    """A device with a program on it.

    Attributes:
        topology: What the device is.
        stream_rate: Of the memory, read as tapes by all blocks.
        block_rate: Of one block's tape at most.
        ring_bytes: By which a block's pump may be ahead.
        product_rate: At which one block multiplies weights that are there.
        fabric_rate: Between the caches and all blocks.
        trip_ns: From asking for a word to having it, nothing else going on.
        store_ns: From storing a word until a load on the same device finds it.
        peer_ns: The same for a load on another device.
        memory_ns: A load that no cache answers.
        barrier_ns: A barrier of a block.
        host_ns: A look at the host's memory, which one block takes once per token.
        program: How hand-offs are read.
    """

    topology: Topology
    stream_rate: Parameter
    block_rate: Parameter
    ring_bytes: Parameter
    product_rate: Parameter
    fabric_rate: Parameter
    trip_ns: Parameter
    store_ns: Parameter
    peer_ns: Parameter
    memory_ns: Parameter
    barrier_ns: Parameter
    host_ns: Parameter
    program: Program

    def replace(self, **changes: float) -> Timing:
        """Returns a copy with other values; their origin is ``assumed``."""
        made = {name: Parameter(value, "assumed", "as asked for") for name, value in changes.items()}
        return dataclasses.replace(self, **made)

    def with_handoff(self, idle_ns: float) -> Timing:
        """Returns a copy in which hand-offs take another time.

        Args:
            idle_ns: From storing a word to having it on the same device, nothing else going on, mean over the phase of
                the polls. Its parts keep the proportions that they have on Hopper.
        """
        known = _hopper(H200, _H200_STREAM, self.program)
        part = idle_ns / (known.store_ns.value + 1.5 * known.trip_ns.value)
        names = ("trip_ns", "store_ns", "peer_ns")
        note = f"hand-off of {idle_ns / 1e3:g} us on an idle device, in parts as on Hopper"
        made = {name: Parameter(getattr(known, name).value * part, "assumed", note) for name in names}
        return dataclasses.replace(self, **made)

    def parameters(self) -> dict[str, Parameter]:
        """All numbers by name."""
        return {f.name: v for f in dataclasses.fields(self) if isinstance(v := getattr(self, f.name), Parameter)}

    def load_factor(self, stream_rate: float, polled_bytes: float) -> float:
        """How much longer trips take while others use the fabric.

        Waiting in a queue with one server, random arrivals and equal service is ``u / (2 (1 - u))`` services long
        (Pollaczek-Khinchine); a trip is taken for one service. Polls slow themselves down: a reader asks again only
        when the answer is there. The factor that agrees with itself is found by bisection.

        Args:
            stream_rate: What the pumps take, bytes per nanosecond.
            polled_bytes: What all waiting readers ask for at once, bytes.

        Returns:
            A factor of at least 1.
        """
        trip, pause, fabric = self.trip_ns.value, self.program.pause_ns, self.fabric_rate.value

        def use(factor: float) -> float:
            return min(0.98, (stream_rate + polled_bytes / (trip * factor + pause)) / fabric)

        low, high = 1.0, 50.0
        for _ in range(20):
            middle = (low + high) / 2
            u = use(middle)
            if 1 + u / (2 * (1 - u)) > middle:
                low = middle
            else:
                high = middle
        return low


_EACH_WORK = MappingProxyType(
    {
        "residual_attention": Work(1, 3),  # the norm's scale; a reduction of two barriers, one behind the stores
        "residual_mlp": Work(1, 3),
        "final_sum": Work(1, 3),
        "qkv": Work(1, 8),  # rotary table; rotation, then the softmax's parts of all warps
        "attention": Work(0, 4),  # weights of the splits
        "activation": Work(0, 1),
        "inbox_attention": Work(0, 1),
        "inbox_mlp": Work(0, 1),
        "final_inbox": Work(0, 0),
        "summary": Work(0, 6),  # reductions of the block's own summary and of all
        "logits": Work(0, 12),
        "choice": Work(0, 0),
    }
)

RESIDENT = Program(
    "resident program, one word after the other",
    threads=512,
    warp=32,
    batch=MappingProxyType(
        {"residual_attention": 1 << 20, "residual_mlp": 1 << 20, "final_sum": 1 << 20, "attention": 1}
    ),
    usual_batch=4,
    polls="each",
    pause_ns=32,
    work=_EACH_WORK,
    product_barriers=2,
)
"""ffi/kernel as it is: wait_long, hold_and_store, o_stage."""

TOGETHER = dataclasses.replace(
    RESIDENT,
    name="resident program, all words together",
    batch=MappingProxyType({}),
    usual_batch=1 << 20,
    polls="together",
)
"""The same stages, if hand-offs were read as the skeletons do."""

SKELETON = dataclasses.replace(
    TOGETHER,
    name="skeleton",
    # All threads must have the vector before the product, and all warps the product before it is published.
    work=MappingProxyType(dict.fromkeys(_EACH_WORK, Work(0, 1))),
    product_barriers=1,
    pause_ns=100,
    clusters=2,
    computes=False,
)
"""Throw-away programs that moved the real bytes in the real order and computed nothing: no norms, no softmax."""


def _hopper(topology: Topology, stream: Parameter, program: Program) -> Timing:
    trip = (2.8e3 - 1.2e3) / 3
    return Timing(
        topology=topology,
        stream_rate=stream,
        block_rate=Parameter(
            48 * 1024 / (36 * 1024 / (4620 / 132)),
            "derived",
            "four copies of 12 KiB, 36 KiB under way at 4.62 TB/s (H200)",
        ),
        ring_bytes=Parameter(16 * 12 * 1024, "counted", "16 slots of 12 KiB"),
        product_rate=Parameter(13_500 / 132, "measured", "tensor cores on weights at hand, 13 to 14 TB/s (H200)"),
        fabric_rate=Parameter(6_500, "assumed", "6 to 7 TB/s was estimated for an H200, not measured"),
        trip_ns=Parameter(
            trip, "derived", "512 words by 512 threads 1.2 us, by 128 threads, three more each, 2.8 (H200)"
        ),
        store_ns=Parameter(1.2e3 - 1.5 * trip, "derived", "the rest of 1.2 us; the last poll is half a trip too early"),
        peer_ns=Parameter(
            2.6e3 - 1.2e3 - 1.5 * trip, "derived", "exchange over 4 GPUs 2.6 us, of which 1.2 are local (H200)"
        ),
        memory_ns=Parameter(36 * 1024 / (4620 / 132), "derived", "36 KiB per block under way at 4.62 TB/s (H200)"),
        barrier_ns=Parameter(30, "assumed", "about 50 clocks"),
        host_ns=Parameter(1500 if program.computes else 0, "assumed", "a round trip over PCIe"),
        program=program,
    )


_H100_STREAM = Parameter(3152, "measured", "mono_stream, 132 blocks, the tapes of laneformer-2b in bfloat16")
_H200_STREAM = Parameter(4620, "measured", "one tape per block through bulk copies; 4.62 to 4.73 TB/s")


def _mi300x(program: Program) -> Timing:
    return Timing(
        topology=MI300X,
        stream_rate=Parameter(4300, "assumed", "reads reach 4.0 to 4.4 TB/s, 4.8 with cache hints, as others report"),
        block_rate=Parameter(2 * 4300 / 304, "assumed", "twice the even share"),
        ring_bytes=Parameter(48 * 1024, "counted", "8 waves hold a piece of 6 KiB each in registers"),
        product_rate=Parameter(
            2.1 * 64 * 4 / 5,
            "counted",
            "two weights a lane take four conversions and a packed fma; 64 lanes a clock, 2.1 GHz",
        ),
        fabric_rate=Parameter(
            17_000, "assumed", "the vendor's peak of the Infinity Cache; hand-offs pass by the L2 caches"
        ),
        trip_ns=Parameter(0, "assumed", ""),
        store_ns=Parameter(0, "assumed", ""),
        peer_ns=Parameter(0, "assumed", ""),
        memory_ns=Parameter(1000, "assumed", "as on Hopper"),
        barrier_ns=Parameter(30, "assumed", "about 60 clocks"),
        host_ns=Parameter(1500 if program.computes else 0, "assumed", "a round trip over PCIe"),
        program=dataclasses.replace(program, warp=64),
    ).with_handoff(1500)


PROGRAMS = {"resident": RESIDENT, "together": TOGETHER, "skeleton": SKELETON}


def timing(device: str, program: str = "resident") -> Timing:
    """What is known of a device with a program on it.

    Args:
        device: ``h100``, ``h200`` or ``mi300x``.
        program: A key of :data:`PROGRAMS`.

    Raises:
        ValueError: Nothing is known of the device, or there is no such program.
    """
    if program not in PROGRAMS:
        raise ValueError(f"program {program!r} is unknown; use one of {', '.join(PROGRAMS)}")
    chosen = PROGRAMS[program]
    if device == "h100":
        return _hopper(H100, _H100_STREAM, chosen)
    if device == "h200":
        return _hopper(H200, _H200_STREAM, chosen)
    if device == "mi300x":
        return _mi300x(chosen)
    raise ValueError(f"no timing for {device!r}; there are h100, h200 and mi300x")
