"""Plays a plan against the timing of a device: every block, every stage, every hand-off.

Blocks run the steps of :mod:`jax_mono.flow`. Weights come through :mod:`jax_mono.simulate.stream`, words through
:mod:`jax_mono.simulate.reading`. There is no chance in it: devices with equal shares do the same at the same time, so
one of them stands for all, as a sender of sums, too.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from jax_mono.flow import Attend, Flow, Moment, Product, Publish, Receive, Step
from jax_mono.handoffs import exchange, writers
from jax_mono.plan import Plan
from jax_mono.simulate.reading import Arrivals, Loads, finish
from jax_mono.simulate.stream import Stream
from jax_mono.simulate.timing import Program, Timing
from jax_mono.trace import LAYER_MARKS, MARKS, Trace

_WEIGHT_BYTES = 2
_WORD_BYTES = 16


@dataclass(frozen=True)
class Simulation:
    """What came out.

    Attributes:
        trace: As :mod:`jax_mono.trace` reads it from a file: moments of every block, without the first token.
        token_ns: Nanoseconds per token.
        stream_ns: Nanoseconds that the longest tape takes at the device's rate: the floor.
    """

    trace: Trace
    token_ns: float
    stream_ns: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second."""
        return 1e9 / self.token_ns

    @property
    def of_stream(self) -> float:
        """Part of the time that the floor is."""
        return self.stream_ns / self.token_ns


def simulate(plan: Plan, timing: Timing, *, position: int = 48, tokens: int = 3) -> Simulation:
    """Simulates some tokens, greedy, all at the same position.

    Args:
        plan: The plan, made for GPUs; weights are of two bytes.
        timing: The device and how a program uses it.
        position: Of the tokens in the sequence.
        tokens: How many are counted; one more comes before them.

    Returns:
        Their trace and the time of one.

    Raises:
        ValueError: The plan has more devices than a host, or more blocks than a device has compute units.
    """
    topology = timing.topology
    if plan.num_blocks > topology.units:
        raise ValueError(f"{topology.name} has {topology.units} compute units, not {plan.num_blocks}")
    topology.link_graph(plan.num_devices)  # refuses too many
    engine = _Engine(plan, timing, position, tokens + 1)
    engine.run()
    noted = np.stack([engine.devices[engine.stands_for[device]].noted for device in range(plan.num_devices)])
    trace = Trace(tuple(range(plan.num_devices)), 1, np.maximum(1, np.rint(noted[:, :, 1:])).astype(np.int64))
    ends = noted[:, :, :, -1].max(axis=(0, 1))
    share = max(plan.block_words(d, b) for d in range(plan.num_devices) for b in range(plan.num_blocks))
    stream = share * _WEIGHT_BYTES * plan.num_blocks / timing.stream_rate.value
    return Simulation(trace, float(ends[-1] - ends[0]) / tokens, stream)


@dataclass
class _Hand:
    """One channel's copy on one device during one token.

    Attributes:
        visible: By writer (device * blocks + block), from when on loads find its words; NaN while unknown.
        groups: By receive, the blocks that wait for the same words.
        waiting: By writer, the groups that need it.
    """

    visible: np.ndarray
    groups: dict[int, _Group] = field(default_factory=dict)
    waiting: dict[int, list[_Group]] = field(default_factory=lambda: defaultdict(list))


@dataclass
class _Group:
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
class _Block:
    """Where a block stands.

    Attributes:
        steps: What it does for a token.
        at: Index of the step.
        token: Number of the token.
        began: When a receive began.
        stage: Since when a product is under way.
    """

    steps: list[Step | Loads]
    at: int = 0
    token: int = 0
    began: float = 0.0
    stage: float = 0.0


class _Device:
    """A device that stands for all with the same shares."""

    def __init__(self, plan: Plan, timing: Timing, number: int, position: int, tokens: int) -> None:
        self.number = number
        rates = timing.stream_rate.value, timing.block_rate.value, timing.ring_bytes.value
        self.stream = Stream(plan.num_blocks, *rates)
        self.polled = 0.0
        self.hands: dict[tuple[str, int | None, int], _Hand] = {}
        flow = Flow(plan, number)
        made = _Writers(plan, number, timing.program)
        self.loads: list[dict[int, Loads]] = []
        self.blocks = []
        for block in range(plan.num_blocks):
            steps = list(flow.steps(block, position, "sampled"))
            self.loads.append({i: made.loads(s) for i, s in enumerate(steps) if isinstance(s, Receive)})
            self.blocks.append(_Block(steps))
        moments = len(MARKS) + (plan.config.num_layers - 1) * len(LAYER_MARKS)
        self.noted = np.zeros((plan.num_blocks, tokens, moments))


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


class _Engine:
    def __init__(self, plan: Plan, timing: Timing, position: int, tokens: int) -> None:
        self.plan, self.timing, self.tokens = plan, timing, tokens
        self.stands_for, self.devices = {}, {}
        for number, share in enumerate(plan.devices):
            alike = (d for d in self.devices if _alike(plan.devices[d], share))
            self.stands_for[number] = next(alike, number)
            if self.stands_for[number] == number:
                self.devices[number] = _Device(plan, timing, number, position, tokens)
        self.queue: list[tuple[float, int, int]] = []
        self._factors: dict[tuple[int, int], float] = {}
        # Of the devices alike, the one that is simulated receives what all of a kind send to it: who they are, and
        # after which of a sender's equal publishes.
        self.senders = {
            (kind, to): [d for d in self.stands_for if self.stands_for[d] == kind and d != to]
            for kind in self.devices
            for to in self.devices
        }
        self.first_peer = {
            (kind, to): min((d for d in self.stands_for if self.stands_for[d] == to and d != kind), default=-1)
            for kind in self.devices
            for to in self.devices
        }
        self.now = 0.0
        layer_marks = {mark: i for i, mark in enumerate(LAYER_MARKS)}
        self.index = {
            (mark, layer): MARKS.index(mark) + (layer or 0) * len(LAYER_MARKS)
            if mark in layer_marks
            else MARKS.index(mark) + (plan.config.num_layers - 1) * len(LAYER_MARKS) * (mark != "begun")
            for mark in MARKS
            for layer in (range(plan.config.num_layers) if mark in layer_marks else (None,))
        }

    def run(self) -> None:
        """Until all blocks have done all tokens."""
        for device in self.devices.values():
            for block in range(self.plan.num_blocks):
                self.push(0.0, device.number, block)
        while True:
            streams = [(device.stream.next_event(), device) for device in self.devices.values()]
            at, device = min(streams, key=lambda pair: pair[0])
            if self.queue and self.queue[0][0] <= at:
                at, number, block = heapq.heappop(self.queue)
                self.now = at
                for other in self.devices.values():
                    for ready in other.stream.advance(at):
                        self.weights_there(other, ready)
                self.go_on(self.devices[number], block)
            elif at < math.inf:
                if not self.queue and all(b.token == self.tokens for d in self.devices.values() for b in d.blocks):
                    return
                self.now = at
                for ready in device.stream.advance(at):
                    self.weights_there(device, ready)
            else:
                return

    def push(self, at: float, device: int, block: int) -> None:
        heapq.heappush(self.queue, (at, device, block))

    def weights_there(self, device: _Device, block: int) -> None:
        """A product is done when its weights are there and there was time to multiply them."""
        self.push(max(self.now, device.blocks[block].stage), device.number, block)

    def factor(self, device: _Device) -> float:
        """How much longer trips take at the moment."""
        key = round(device.stream.rate), round(device.polled / 1024)  # finer than anything that is known
        if key not in self._factors:
            self._factors[key] = self.timing.load_factor(key[0], key[1] * 1024)
        return self._factors[key]

    def go_on(self, device: _Device, number: int) -> None:
        """Runs a block until it waits."""
        block, timing = device.blocks[number], self.timing
        while block.token < self.tokens:
            if block.at == len(block.steps):
                block.at, block.token = 0, block.token + 1
                continue
            step, block.at = block.steps[block.at], block.at + 1
            if isinstance(step, Moment):
                device.noted[number, block.token, self.index[step.mark, step.layer]] = self.now
                delay = self._after(step, device.number, number)
                if delay:
                    self.push(self.now + delay, device.number, number)
                    return
            elif isinstance(step, Publish):
                self.publish(device, number, step)
            elif isinstance(step, Receive):
                self.receive(device, number, step)
                return
            elif isinstance(step, Attend):
                size = step.positions * self.plan.config.head_dim * 2 * _WEIGHT_BYTES
                delay = timing.memory_ns.value + size / timing.block_rate.value if timing.program.computes else 0.0
                self.push(self.now + delay, device.number, number)
                return
            elif isinstance(step, Product) and step.weights:
                size = step.weights * _WEIGHT_BYTES
                barriers = timing.program.product_barriers * timing.barrier_ns.value
                block.stage = self.now + size / timing.product_rate.value + barriers
                if device.stream.begin(number, size):
                    self.push(block.stage, device.number, number)
                return

    def _after(self, moment: Moment, device: int, block: int) -> float:
        """What a moment is followed by, beside steps: the embedding, and a look at the host."""
        if not self.timing.program.computes:
            return 0.0
        if moment.mark == "begun":
            return self.timing.memory_ns.value + self._work("residual_mlp", 1.0)
        looks = (moment.mark, moment.layer) == ("mlp_mixed", self.plan.config.num_layers - 1)
        return self.timing.host_ns.value if looks and device == block == 0 else 0.0

    def _work(self, channel: str, factor: float) -> float:
        work = self.timing.program.work.get(channel)
        if work is None:
            return 0.0
        return work.trips * self.timing.trip_ns.value * factor + work.barriers * self.timing.barrier_ns.value

    def hand(self, device: _Device, channel: str, layer: int | None, token: int) -> _Hand:
        """The channel's copy; forgets that of the token before last."""
        key = channel, layer, token
        if key not in device.hands:
            device.hands.pop((channel, layer, token - 2), None)
            device.hands[key] = _Hand(np.full(self.plan.num_devices * self.plan.num_blocks, np.nan))
        return device.hands[key]

    def publish(self, device: _Device, number: int, step: Publish) -> None:
        """Lets words be seen on the device that the step names, and on all that it stands for."""
        timing, blocks, token = self.timing, self.plan.num_blocks, device.blocks[number].token
        if step.device == device.number:
            at = self.now + timing.store_ns.value * self.factor(device)
            self.show(device, step, token, [device.number * blocks + number], at)
            return
        target = self.devices[self.stands_for[step.device]]
        if step.device != self.first_peer[device.number, target.number]:
            return
        link = len(step.words) * _WORD_BYTES * blocks / (timing.topology.link_rate.value / 1e9)
        at = self.now + timing.peer_ns.value * self.factor(device) + link
        self.show(target, step, token, [d * blocks + number for d in self.senders[device.number, target.number]], at)

    def show(self, device: _Device, step: Publish, token: int, sources: list[int], at: float) -> None:
        """Words of some writers become visible; blocks that waited for the last of them are told."""
        hand = self.hand(device, step.channel, step.layer, token)
        for source in sources:
            if not math.isnan(hand.visible[source]):
                continue  # a block publishes attention item by item
            hand.visible[source] = at
            for group in hand.waiting.pop(source, ()):
                group.missing -= 1
                if group.missing == 0:
                    for waiting in group.blocks:
                        block = device.blocks[waiting]
                        self.received(device, waiting, block.steps[block.at - 1])

    def receive(self, device: _Device, number: int, step: Receive) -> None:
        """Begins to receive; the block goes on when it is told."""
        block = device.blocks[number]
        hand = self.hand(device, step.channel, step.layer, block.token)
        loads = device.loads[number][block.at - 1]
        block.began = self.now
        device.polled += self._polled(loads)
        if id(loads) not in hand.groups:
            unknown = loads.distinct[np.isnan(hand.visible[loads.distinct])].tolist()
            hand.groups[id(loads)] = _Group(len(unknown))
            for source in unknown:
                hand.waiting[source].append(hand.groups[id(loads)])
        group = hand.groups[id(loads)]
        if group.missing:
            group.blocks.append(number)
        else:
            self.received(device, number, step)

    def _polled(self, loads: Loads) -> float:
        """Bytes that a block which waits asks for at once; a sector is 32."""
        program = self.timing.program
        if program.polls == "each":
            return 32.0 * min(loads.writers.shape[1], -(-loads.words // program.warp))
        return _WORD_BYTES * loads.words / program.clusters

    def received(self, device: _Device, number: int, step: Receive) -> None:
        """All words have been sent: the block goes on when it has them."""
        timing, block = self.timing, device.blocks[number]
        loads = device.loads[number][block.at - 1]
        hand = self.hand(device, step.channel, step.layer, block.token)
        factor, program = self.factor(device), timing.program
        free = max(0.1 * timing.fabric_rate.value, timing.fabric_rate.value - device.stream.rate)
        group = hand.groups[id(loads)]
        if group.arrivals is None:
            group.arrivals = Arrivals.of(loads, hand.visible)
        done = finish(
            loads,
            group.arrivals,
            block.began,
            trip=timing.trip_ns.value * factor,
            program=program,
            batch=program.batch.get(step.channel, program.usual_batch),
            bytes_rate=free / self.plan.num_blocks * program.clusters,
        )
        device.polled -= self._polled(loads)
        self.push(max(self.now, done) + self._work(step.channel, factor), device.number, number)


def _alike(a: object, b: object) -> bool:
    """Whether devices do the same work, whichever rows and heads it is."""
    return (
        all(getattr(a, name).count == getattr(b, name).count for name in ("lanes", "kv_heads", "neurons", "vocab"))
        and a.stages == b.stages
        and a.attention == b.attention
    )
