"""What the simulator keeps of devices, blocks and hand-offs while it runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from jax_mono.config import Module
from jax_mono.flow import Flow, Receive, Step
from jax_mono.handoffs import exchange, writers
from jax_mono.plan import Plan
from jax_mono.simulate.programs import Program
from jax_mono.simulate.reading import Arrivals, Loads
from jax_mono.simulate.stream import Ahead, Stream
from jax_mono.simulate.timing import Timing
from jax_mono.trace import LAYER_MARKS, MARKS


@dataclass
class Hand:
    """One channel's copy on one device during one token.

    Attributes:
        visible: By writer (device * blocks + block), from when on loads find its words; NaN while unknown.
        groups: By receive, the blocks that wait for the same words.
        waiting: By writer, the groups that need it.
    """

    visible: np.ndarray
    groups: dict[int, Group] = field(default_factory=dict)
    waiting: dict[int, list[Group]] = field(default_factory=lambda: defaultdict(list))


@dataclass
class Group:
    """Blocks that wait for the same words.

    Attributes:
        missing: Writers that are still to come.
        blocks: Numbers of the blocks.
        arrivals: When the words are visible, once all are on their way.
    """

    missing: int
    blocks: list[int] = field(default_factory=list)
    arrivals: Arrivals | None = None


@dataclass
class Block:
    """Where a block stands.

    Attributes:
        steps: What it does for a token.
        at: Index of the step.
        token: Number of the token.
        began: When a receive began.
        stage: Until when a product is multiplied at least.
        made: Whether the words that come next are made already.
    """

    steps: list[Step | Loads]
    at: int = 0
    token: int = 0
    began: float = 0.0
    stage: float = 0.0
    made: bool = False


class Device:
    """A device that stands for all with the same shares."""

    def __init__(self, plan: Plan, timing: Timing, groups: int, number: int, position: int, tokens: int) -> None:
        self.number = number
        ahead = Ahead(
            size=timing.ahead_bytes.value,
            rate=timing.ahead_rate.value,
            near_rate=timing.near_rate.value,
            near_latency=timing.trip_ns.value,
            most=timing.fabric_rate.value / groups,
        )
        self.stream = Stream(
            plan.num_blocks,
            timing.tape_rate(plan.placement) / groups,
            timing.block_rate.value,
            timing.ring_bytes.value,
            ahead=ahead,
            latency=timing.memory_ns.value,
        )
        self.polled = 0.0
        self.hands: dict[tuple[str, int | None, int], Hand] = {}
        flow = (_LateSums if timing.program.late_sums else Flow)(plan, number)
        made = _Writers(plan, number, timing.program)
        self.loads: list[dict[int, Loads]] = []
        self.blocks = []
        for block in range(plan.num_blocks):
            steps = list(flow.steps(block, position, "sampled"))
            self.loads.append({i: made.loads(s) for i, s in enumerate(steps) if isinstance(s, Receive)})
            self.blocks.append(Block(steps))
        moments = len(MARKS) + (plan.config.num_layers - 1) * len(LAYER_MARKS)
        self.noted = np.zeros((plan.num_blocks, tokens, moments))


class _LateSums(Flow):
    """Takes delayed sums in after the product."""

    def _past_sums(self, block: int, layer: int, module: Module) -> Iterator[Step]:
        return iter(())

    def _mix(self, block: int, layer: int, module: Module) -> Iterator[Step]:
        yield from super()._past_sums(block, layer, module)
        yield from super()._mix(block, layer, module)


class _Writers:
    """Who writes the words of a device's channels; equal receives share their loads."""

    def __init__(self, plan: Plan, device: int, program: Program) -> None:
        self._program = program
        self._of = {}
        for name, channel in exchange(plan, device).channels.items():
            of = np.full(channel.words, -1)
            for source, block, words in writers(plan, device, name):
                of[words] = source * plan.num_blocks + block
            self._of[name] = of
        self._made: dict[tuple[str, bytes], Loads] = {}

    def loads(self, receive: Receive) -> Loads:
        key = receive.channel, receive.words.tobytes()
        if key not in self._made:
            self._made[key] = Loads.of(self._of[receive.channel][receive.words], self._program)
        return self._made[key]


def alike(a: object, b: object) -> bool:
    """Whether devices do the same work, whichever rows and heads it is."""
    return (
        all(getattr(a, name).count == getattr(b, name).count for name in ("lanes", "kv_heads", "neurons", "vocab"))
        and a.stages == b.stages
        and a.attention == b.attention
    )
