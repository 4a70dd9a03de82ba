"""What the simulator must know of a device and of a program on it, and where each number comes from.

Rates are bytes per nanosecond (GB/s), times nanoseconds. Nothing here was fitted to the time of a token: numbers are
micro-benchmarks, vendors' figures, counts from the sources, or assumptions that say so.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from jax_mono.placement import Placement
from jax_mono.simulate.programs import GFX942, RESIDENT, SKELETON, Program
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


@dataclass(frozen=True, kw_only=True)
class Timing:
    """A device with a program on it.

    Attributes:
        topology: What the device is.
        stream_rate: Of the memory, read as tapes by all blocks, wherever these lie.
        placed_rate: The same if every block reads memory of its own side of the device.
        block_rate: Of one block's tape at most.
        copied_bytes: Of a block's tape, on their way at once.
        ring_bytes: By which a block's pump may be ahead.
        ahead_bytes: By which it may be ahead of that in the second-level cache, once its ring is full.
        ahead_rate: At which it fetches them into that cache.
        near_rate: At which it takes them from there.
        product_rate: At which one block multiplies weights that are there.
        fabric_rate: Between the caches and all blocks.
        trip_ns: From asking for a word to having it, nothing else going on.
        store_ns: From storing a word until a load on the same device finds it.
        peer_ns: The same for a load on another device of the host.
        network_ns: The same on a device of another host.
        network_rate: Of one device to all devices of other hosts together.
        memory_ns: A load that no cache answers.
        barrier_ns: A barrier of a block.
        code_ns: An instruction of a stage. If it is fetched anew for every layer, it takes longer under load, as trips
            do.
        host_ns: A look at the host's memory, which one block takes once per token.
        program: How hand-offs are read.
    """

    topology: Topology
    stream_rate: Parameter
    placed_rate: Parameter
    block_rate: Parameter
    copied_bytes: Parameter
    ring_bytes: Parameter
    ahead_bytes: Parameter
    ahead_rate: Parameter
    near_rate: Parameter
    product_rate: Parameter
    fabric_rate: Parameter
    trip_ns: Parameter
    store_ns: Parameter
    peer_ns: Parameter
    network_ns: Parameter
    network_rate: Parameter
    memory_ns: Parameter
    barrier_ns: Parameter
    code_ns: Parameter
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

    def tape_rate(self, placement: Placement) -> float:
        """Of the memory, in bytes per nanosecond, for tapes that lie as a plan says.

        A byte of another side takes longer than one of the own side. Tapes that take turns in granules lie on their
        blocks' sides, if the pattern is right; others are spread over all sides alike.
        """
        return (self.placed_rate if placement.interleaved else self.stream_rate).value

    def parameters(self) -> dict[str, Parameter]:
        """All numbers by name."""
        return {f.name: v for f in dataclasses.fields(self) if isinstance(v := getattr(self, f.name), Parameter)}

    def load_factor(self, stream_rate: float, polled_bytes: float, blocks: int) -> float:
        """How much longer trips take while others use the fabric.

        Waiting in a queue with one server, random arrivals and equal service is ``u / (2 (1 - u))`` services long
        (Pollaczek-Khinchine); a trip is taken for one service. Polls slow themselves down: a reader asks again only
        when the answer is there. The factor that agrees with itself is found by bisection. The queue holds no more than
        all copies and polls that are under way at once.

        Args:
            stream_rate: What the pumps take, bytes per nanosecond.
            polled_bytes: What all waiting readers ask for at once, bytes.
            blocks: Blocks of the GPU.

        Returns:
            A factor of at least 1.
        """
        trip, pause, fabric = self.trip_ns.value, self.program.pause_ns, self.fabric_rate.value
        longest = (blocks * self.copied_bytes.value + polled_bytes) / fabric / trip

        def use(factor: float) -> float:
            return min(0.98, (stream_rate + polled_bytes / (trip * factor + pause)) / fabric)

        low, high = 1.0, 1.0 + longest
        for _ in range(20):
            middle = (low + high) / 2
            u = use(middle)
            if 1 + u / (2 * (1 - u)) > middle:
                low = middle
            else:
                high = middle
        return low


INSTRUCTION_BYTES = 16
"""Of Hopper's, in which code is counted."""

_CODE_US_PER_KB = 0.16
"""Of a stage on an idle device. Over variants of the same stages in a running program it was 0.36 (H200); behind a
stream of 4.62 TB/s a trip takes 2.2 times as long as on an idle device (:meth:`Timing.load_factor`), and so does the
code."""

_COPIED = 48 * 1024
"""Bytes of the tape that a block has under way."""


_NETWORK_NS = Parameter(4000, "assumed", "a one-sided write to the memory of a GPU in another host, of 2 to 5 us")
_NETWORK_RATE = Parameter(50, "assumed", "one adapter of 400 Gb/s for each GPU")


def _hopper(topology: Topology, stream: Parameter, program: Program) -> Timing:
    trip = (2.8e3 - 1.2e3) / 3
    memory = 36 * 1024 / (4620 / 132)
    ring, slots = (31 * 6 * 1024, "31 slots of 6 KiB; 30 to 34, by the plan")
    if not program.computes:
        ring, slots = 16 * 12 * 1024, "16 slots of 12 KiB"
    return Timing(
        topology=topology,
        stream_rate=stream,
        placed_rate=dataclasses.replace(stream, note="the same: all memory is equally near"),
        block_rate=Parameter(
            _COPIED / memory, "derived", "48 KiB may be under way, and 36 KiB are at 4.62 TB/s (H200)"
        ),
        copied_bytes=Parameter(_COPIED, "counted", "8 copies of 6 KiB, or 4 of 12 KiB"),
        ring_bytes=Parameter(ring, "counted", slots),
        ahead_bytes=Parameter(60 * 6 * 1024 if program.computes else 0, "counted", "60 slots of 6 KiB (arch/sm_90a.h)"),
        ahead_rate=Parameter(6 * 1024 / (340 / 1.755), "counted", "a slot of 6 KiB in 340 clocks of 1.755 GHz"),
        near_rate=Parameter(_COPIED / trip, "derived", "48 KiB under way, there in a trip"),
        product_rate=Parameter(13_500 / 132, "measured", "tensor cores on weights at hand, 13 to 14 TB/s (H200)"),
        fabric_rate=Parameter(6_500, "assumed", "6 to 7 TB/s was estimated for an H200, not measured"),
        trip_ns=Parameter(
            trip, "derived", "512 words by 512 threads 1.2 us, by 128 threads, three more each, 2.8 (H200)"
        ),
        store_ns=Parameter(1.2e3 - 1.5 * trip, "derived", "the rest of 1.2 us; the last poll is half a trip too early"),
        peer_ns=Parameter(
            2.6e3 - 1.2e3 - 1.5 * trip, "derived", "exchange over 4 GPUs 2.6 us, of which 1.2 are local (H200)"
        ),
        network_ns=_NETWORK_NS,
        network_rate=_NETWORK_RATE,
        memory_ns=Parameter(memory, "derived", "36 KiB per block under way at 4.62 TB/s (H200)"),
        barrier_ns=Parameter(30, "assumed", "about 50 clocks"),
        code_ns=Parameter(
            _CODE_US_PER_KB * INSTRUCTION_BYTES,
            "derived",
            "0.16 us per KB: 0.36 over variants of the same stages, behind a stream that slows trips 2.2 times (H200)",
        ),
        host_ns=Parameter(1500 if program.computes else 0, "assumed", "a round trip over PCIe"),
        program=program,
    )


_H100_STREAM = Parameter(3152, "measured", "mono_stream, 132 blocks, the tapes of laneformer-2b in bfloat16")
_H200_STREAM = Parameter(4620, "measured", "one tape per block through bulk copies; 4.62 to 4.73 TB/s")


def _mi300x(program: Program) -> Timing:
    return Timing(
        topology=MI300X,
        stream_rate=Parameter(4200, "assumed", "4.0 to 4.4 TB/s, as others report; AMD expects 3.7 to 4.2"),
        placed_rate=Parameter(4800, "assumed", "4.8 TB/s with tapes on the blocks' own sides, as others report"),
        block_rate=Parameter(2 * 4800 / 304, "assumed", "twice the even share"),
        copied_bytes=Parameter(48 * 1024, "counted", "8 waves hold a piece of 6 KiB each in registers"),
        ring_bytes=Parameter(48 * 1024, "counted", "the same"),
        ahead_bytes=Parameter(0, "counted", "nothing is fetched ahead of the registers"),
        ahead_rate=Parameter(0, "counted", "likewise"),
        near_rate=Parameter(0, "counted", "likewise"),
        product_rate=Parameter(
            2.1 * 64 * 4 / 5,
            "counted",
            "two weights a lane take four conversions and a packed fma; 64 lanes a clock, 2.1 GHz",
        ),
        fabric_rate=Parameter(
            17_000, "assumed", "about the Infinity Cache's peak, 17.2 TB/s; hand-offs pass by the L2 caches"
        ),
        trip_ns=Parameter(0, "assumed", ""),
        store_ns=Parameter(0, "assumed", ""),
        peer_ns=Parameter(0, "assumed", ""),
        network_ns=_NETWORK_NS,
        network_rate=_NETWORK_RATE,
        memory_ns=Parameter(1000, "assumed", "as on Hopper"),
        barrier_ns=Parameter(30, "assumed", "about 60 clocks"),
        code_ns=Parameter(
            _CODE_US_PER_KB * INSTRUCTION_BYTES,
            "assumed",
            "as on Hopper, 5.4 clocks of 2.1 GHz: a wave takes 4, two that share a SIMD 8; more where code is fetched",
        ),
        host_ns=Parameter(1500 if program.computes else 0, "assumed", "a round trip over PCIe"),
        program=GFX942 if program is RESIDENT else dataclasses.replace(program, threads=512, warp=64),
    ).with_handoff(1500)


PROGRAMS = {"resident": RESIDENT, "skeleton": SKELETON}


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
