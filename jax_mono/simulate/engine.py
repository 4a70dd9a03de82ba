"""Plays a plan against the timing of a device: every block, every stage, every hand-off.

Blocks run the steps of :mod:`jax_mono.flow`. Weights come through :mod:`jax_mono.simulate.stream`, words through
:mod:`jax_mono.simulate.reading`. There is no chance in it: devices with equal shares do the same at the same time, so
one of them stands for all, as a sender of sums, too.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import numpy as np

from jax_mono.flow import Attend, Moment, Product, Publish, Receive, Visible
from jax_mono.plan import Plan
from jax_mono.simulate.reading import Arrivals, Loads, finish
from jax_mono.simulate.state import Device, Group, Hand, alike
from jax_mono.simulate.timing import Timing
from jax_mono.trace import LAYER_MARKS, MARKS, Trace

_WEIGHT_BYTES = 2
_WORD_BYTES = 16
_PUSHED = ("inbox_attention", "inbox_mlp")  # words made for each peer; others go to all devices alike


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


def simulate(plan: Plan, timing: Timing, *, groups: int = 1, position: int = 48, tokens: int = 3) -> Simulation:
    """Simulates some tokens, greedy, all at the same position.

    Args:
        plan: The plan, made for GPUs; weights are of two bytes.
        timing: The GPU and how a program uses it.
        groups: Devices of the plan that are groups of blocks of one GPU. They share its memory evenly.
        position: Of the tokens in the sequence.
        tokens: How many are counted; one more comes before them.

    Returns:
        Their trace and the time of one.

    Raises:
        ValueError: The plan has more blocks than a GPU has compute units, groups that do not share GPUs evenly, or a
            number of GPUs that neither one host has nor two full ones.
    """
    topology = timing.topology
    if plan.num_devices % groups:
        raise ValueError(f"{plan.num_devices} devices of a plan cannot be GPUs of {groups} groups each")
    if groups * plan.num_blocks > topology.units:
        raise ValueError(f"{topology.name} has {topology.units} compute units, not {groups * plan.num_blocks}")
    gpus, most = plan.num_devices // groups, topology.most_devices.whole
    if gpus > most and gpus != 2 * most:
        raise ValueError(f"a host has 1 to {most} devices {topology.name}, and two have {2 * most}; not {gpus}")
    engine = _Engine(plan, timing, groups, position, tokens + 1)
    engine.run()
    noted = np.stack([engine.devices[engine.stands_for[device]].noted for device in range(plan.num_devices)])
    trace = Trace(tuple(range(plan.num_devices)), 1, np.maximum(1, np.rint(noted[:, :, 1:])).astype(np.int64))
    ends = noted[:, :, :, -1].max(axis=(0, 1))
    share = max(plan.block_words(d, b) for d in range(plan.num_devices) for b in range(plan.num_blocks))
    stream = share * _WEIGHT_BYTES * groups * plan.num_blocks / timing.tape_rate(plan.placement)
    return Simulation(trace, float(ends[-1] - ends[0]) / tokens, stream)


class _Engine:
    def __init__(self, plan: Plan, timing: Timing, groups: int, position: int, tokens: int) -> None:
        self.plan, self.timing, self.groups, self.tokens, self.position = plan, timing, groups, tokens, position
        self.stands_for, self.devices = {}, {}
        for number, share in enumerate(plan.devices):
            others = (d for d in self.devices if alike(plan.devices[d], share))
            self.stands_for[number] = next(others, number)
            if self.stands_for[number] == number:
                self.devices[number] = Device(plan, timing, groups, number, position, tokens)
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

    def weights_there(self, device: Device, block: int) -> None:
        """A product is done when its weights are there and there was time to multiply them."""
        self.push(max(self.now, device.blocks[block].stage), device.number, block)

    def _code(self, device: Device, channel: str) -> float:
        """Time of the code that makes a channel's words."""
        return self.timing.program.code.get(channel, 0) * self._instruction(device)

    def _instruction(self, device: Device) -> float:
        """Time of an instruction; one that is fetched is so under the load of the moment."""
        return self.timing.code_ns.value * (1.0 if self.timing.program.cached else self.factor(device))

    def factor(self, device: Device) -> float:
        """How much longer trips take at the moment."""
        groups = self.groups
        # Finer than anything that is known.
        key = round(groups * device.stream.rate), round(groups * device.polled / 1024)
        if key not in self._factors:
            blocks = groups * self.plan.num_blocks
            self._factors[key] = self.timing.load_factor(key[0], key[1] * 1024, blocks)
        return self._factors[key]

    def go_on(self, device: Device, number: int) -> None:
        """Runs a block until it waits."""
        block, timing = device.blocks[number], self.timing
        while block.token < self.tokens:
            if block.at == len(block.steps):
                block.at, block.token = 0, block.token + 1
                continue
            step, block.at = block.steps[block.at], block.at + 1
            if isinstance(step, Moment):
                device.noted[number, block.token, self.index[step.mark, step.layer]] = self.now
                delay = self._after(step, device, number)
                if delay:
                    self.push(self.now + delay, device.number, number)
                    return
            elif isinstance(step, Publish):
                # The code that makes the words comes first; the step is taken up again after it.
                makes = step.device == device.number or step.channel in _PUSHED
                delay = self._code(device, step.channel) if makes and not block.made else 0.0
                block.made = delay > 0
                if delay:
                    block.at -= 1
                    self.push(self.now + delay, device.number, number)
                    return
                self.publish(device, number, step)
            elif isinstance(step, Receive):
                self.receive(device, number, step)
                return
            elif isinstance(step, Attend):
                self.push(self.now + self._attend(step), device.number, number)
                return
            elif isinstance(step, Product) and step.weights:
                size = step.weights * _WEIGHT_BYTES
                barriers = timing.program.product_barriers * timing.barrier_ns.value
                block.stage = self.now + size / timing.product_rate.value + barriers
                if device.stream.begin(number, size):
                    self.push(block.stage, device.number, number)
                return

    def _after(self, moment: Moment, device: Device, block: int) -> float:
        """What a moment is followed by, beside steps: the embedding, and a look at the host."""
        if not self.timing.program.computes:
            return 0.0
        if moment.mark == "begun":
            return self.timing.memory_ns.value + self._work(device, "residual_mlp")
        looks = (moment.mark, moment.layer) == ("mlp_mixed", self.plan.config.num_layers - 1)
        return self.timing.host_ns.value if looks and device.number == block == 0 else 0.0

    def _attend(self, step: Attend) -> float:
        """Keys and values of the first positions were asked for early, the others come one round after the other."""
        if not self.timing.program.computes:
            return 0.0
        program, timing = self.timing.program, self.timing
        rounds = -(-step.positions // program.kv_positions)
        return (rounds - 1) * (timing.memory_ns.value + program.kv_code * timing.code_ns.value)

    def _work(self, device: Device, channel: str, layer: int | None = None) -> float:
        """What follows when the words of a channel are there."""
        work = self.timing.program.work[channel]
        joined = 0 if layer is None or not work.each else len(Visible.of(self.plan, layer, self.position).splits)
        code = work.code + work.each * joined
        return code * self._instruction(device) + work.barriers * self.timing.barrier_ns.value

    def hand(self, device: Device, channel: str, layer: int | None, token: int) -> Hand:
        """The channel's copy; forgets that of the token before last."""
        key = channel, layer, token
        if key not in device.hands:
            device.hands.pop((channel, layer, token - 2), None)
            device.hands[key] = Hand(np.full(self.plan.num_devices * self.plan.num_blocks, np.nan))
        return device.hands[key]

    def publish(self, device: Device, number: int, step: Publish) -> None:
        """Lets words be seen on the device that the step names, and on all that it stands for."""
        timing, blocks, token = self.timing, self.plan.num_blocks, device.blocks[number].token
        if step.device == device.number:
            at = self.now + timing.store_ns.value * self.factor(device)
            self.show(device, step, token, [device.number * blocks + number], at)
            return
        target = self.devices[self.stands_for[step.device]]
        if step.device != self.first_peer[device.number, target.number]:
            return
        senders = self.senders[device.number, target.number]
        ways: dict[float, list[int]] = {}
        for sender in senders:
            ways.setdefault(self.way(device, sender, target.number, step), []).append(sender)
        for way, sources in ways.items():
            self.show(target, step, token, [d * blocks + number for d in sources], self.now + way)

    def way(self, device: Device, sender: int, receiver: int, step: Publish) -> float:
        """Nanoseconds until words that a sender, which is like a device, stores are visible to a receiver."""
        timing, gpu, other = self.timing, sender // self.groups, receiver // self.groups
        if gpu == other:
            return timing.store_ns.value * self.factor(device)
        sent = len(step.words) * _WORD_BYTES * self.plan.num_blocks * self.groups  # by all blocks of the GPU
        most = timing.topology.most_devices.whole
        if gpu // most == other // most:
            return timing.peer_ns.value * self.factor(device) + sent / (timing.topology.link_rate.value / 1e9)
        peers = self.plan.num_devices // self.groups - most  # in other hosts, which one adapter serves
        return timing.network_ns.value + sent * peers / timing.network_rate.value

    def show(self, device: Device, step: Publish, token: int, sources: list[int], at: float) -> None:
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

    def receive(self, device: Device, number: int, step: Receive) -> None:
        """Begins to receive; the block goes on when it is told."""
        block = device.blocks[number]
        hand = self.hand(device, step.channel, step.layer, block.token)
        loads = device.loads[number][block.at - 1]
        early = self.timing.program.work[step.channel].early
        block.began = self.now + early * self._instruction(device)
        device.polled += self._polled(loads)
        if id(loads) not in hand.groups:
            unknown = loads.distinct[np.isnan(hand.visible[loads.distinct])].tolist()
            hand.groups[id(loads)] = Group(len(unknown))
            for source in unknown:
                hand.waiting[source].append(hand.groups[id(loads)])
        group = hand.groups[id(loads)]
        if group.missing:
            group.blocks.append(number)
        else:
            self.received(device, number, step)

    def _polled(self, loads: Loads) -> float:
        """Bytes that a block which waits asks for at once."""
        program = self.timing.program
        words = loads.words if program.polls == "together" else min(loads.words, program.threads)
        return _WORD_BYTES * words / program.clusters

    def received(self, device: Device, number: int, step: Receive) -> None:
        """All words have been sent: the block goes on when it has them."""
        timing, block = self.timing, device.blocks[number]
        loads = device.loads[number][block.at - 1]
        hand = self.hand(device, step.channel, step.layer, block.token)
        factor, program = self.factor(device), timing.program
        fabric = timing.fabric_rate.value
        free = max(0.1 * fabric, fabric - self.groups * device.stream.rate)
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
            bytes_rate=free / (self.groups * self.plan.num_blocks) * program.clusters,
        )
        device.polled -= self._polled(loads)
        self.push(max(self.now, done) + self._work(device, step.channel, step.layer), device.number, number)
