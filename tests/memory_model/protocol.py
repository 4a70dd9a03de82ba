"""The hand-off protocol as a program for an abstract machine: made from a plan, and weakened on purpose.

Blocks are *agents*; each has a list of events, a read or a write of *cells*. A cell stands for all words of a channel's
copy that have the same writer and the same readers: they can do nothing that one of them cannot do alone. What a word
carries is a *value*: who it is for, as (channel, layer, token), and the tag that its reader looks for.

A write stores the copies of all dies in one event. That hides nothing, because each of them becomes visible to each
reader at a time of its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from jax_mono.config import Module
from jax_mono.flow import Flow, Moment, Publish, Receive, Step, TokenKind
from jax_mono.handoffs import MODULES, Channel, exchange
from jax_mono.plan import Plan

Scope = Literal["die", "device", "system"]
SCOPES: tuple[Scope, ...] = ("die", "device", "system")


@dataclass(frozen=True)
class Rules:
    """What the contract of ffi/kernel/handoff.h fixes. The defaults are the contract.

    Attributes:
        store_scope: How far stores reach for certain.
        load_scope: Whose stores loads see for certain.
        word: Whether payload and tag are one word, or two of which the writer stores one first.
        tag_epochs: Whether tags tell tokens apart.
        first_tag: Tag of the first token.
        awaited_lag: By how many tokens the awaited tag is behind the published one.
        zeroed: Whether memory is zero at the start of a call; else every word has the tag of its first use, as
            an earlier call may have left it.
        token_turns: Places of summaries, logits and choice, which tokens take in turn; None takes those of the plan.
        layer_turns: Places of channels that every layer has for itself, which layers take in turn while tags count
            layers; None gives every layer its own.
        copies: Of a channel that has a copy per die, which ones its writers store.
        delay_wraps: Whether layers below the delay take sums of the last layers of the token before.
        summary_last: Whether a block has read everything else before it publishes its summary.
    """

    store_scope: Scope = "system"
    load_scope: Scope = "system"
    word: Literal["whole", "tag first", "payload first"] = "whole"
    tag_epochs: bool = True
    first_tag: int = 1
    awaited_lag: int = 0
    zeroed: bool = True
    token_turns: int | None = None
    layer_turns: int | None = None
    copies: Literal["all", "all but the last", "that of the own die"] = "all"
    delay_wraps: bool = False
    summary_last: bool = True


class Value(NamedTuple):
    """What a word carries: its tag, and for whom it is; None where a reader must not find it."""

    tag: int
    meaning: tuple[str, int | None, int] | None


class Access(NamedTuple):
    """A cell, and the value that is written or expected."""

    cell: int
    value: Value


class Event(NamedTuple):
    """Reads or writes, all in one step: ``part`` of a word is whole, tag or payload."""

    kind: Literal["read", "write"]
    part: Literal["whole", "tag", "payload"]
    accesses: tuple[Access, ...]


@dataclass(frozen=True)
class Cell:
    """Words with the same fate.

    Attributes:
        writer: Agent that writes them.
        name: For messages.
        values: What memory holds, in the order of the stores; the first is there from the start.
    """

    writer: int
    name: str
    values: tuple[Value, ...]


@dataclass(frozen=True)
class Protocol:
    """Programs of all agents.

    Attributes:
        rules: What they were made with.
        cells: What they access.
        programs: Events of each agent.
        places: (device, die) of each agent.
    """

    rules: Rules
    cells: tuple[Cell, ...]
    programs: tuple[tuple[Event, ...], ...]
    places: tuple[tuple[int, int], ...]


class _Key(NamedTuple):
    """A channel's copy in the memory of a device: of which layer and turn, and for which die."""

    device: int
    channel: str
    slot: tuple[int, int]
    copy: int


@dataclass
class _Token:
    """One receive or publish, before words become cells."""

    kind: Literal["read", "write"]
    keys: list[_Key]
    words: np.ndarray
    value: Value


def make_protocol(
    plan: Plan,
    rules: Rules | None = None,
    *,
    tokens: tuple[TokenKind, ...] = ("sampled", "sampled", "sampled"),
    position: int = 0,
    dies: int | None = None,
) -> Protocol:
    """Turns a plan into the programs of its blocks.

    Args:
        plan: The plan.
        rules: The contract, or one that is broken.
        tokens: What kind each token of the call is.
        position: Of the first one.
        dies: Dies of a device, on which its blocks lie in turn; None puts them where the plan does.
    """
    rules = rules or Rules()
    agents = [(device, block) for device in range(plan.num_devices) for block in range(plan.num_blocks)]
    flows = [(_CrossingFlow if rules.delay_wraps else Flow)(plan, device) for device in range(plan.num_devices)]
    drafts = [list(_draft(plan, rules, flows[device], block, tokens, position)) for device, block in agents]
    groups = _group(drafts)
    programs, values, writers = [], defaultdict(list), {}
    for agent, draft in enumerate(drafts):
        events: list[Event] = []
        for step in draft:
            cells = dict.fromkeys(cell for key in step.keys for cell in groups[key][step.words].tolist())
            accesses = tuple(Access(cell, step.value) for cell in cells)
            if step.kind == "read":
                events.append(Event("read", "whole", accesses))
                continue
            halves = {"whole": ("whole",), "tag first": ("tag", "payload"), "payload first": ("payload", "tag")}
            events += [Event("write", part, accesses) for part in halves[rules.word]]
            for cell in cells:
                values[cell].append(step.value)
                assert writers.setdefault(cell, agent) == agent
        programs.append(tuple(events))
    names = {cell: key for key, of_words in groups.items() for cell in np.unique(of_words[of_words >= 0]).tolist()}
    made = [
        Cell(writers.get(cell, -1), _name(key), (_initial(rules, values[cell]), *values[cell]))
        for cell, key in sorted(names.items())
    ]
    places = tuple((device, block % dies if dies else plan.placement.die_of(block)) for device, block in agents)
    return Protocol(rules, tuple(made), tuple(programs), places)


class _Earlier(Receive):
    """Waits for words of the token before."""


class _CrossingFlow(Flow):
    """Layers below the delay take sums of the last layers of the token before."""

    def __init__(self, plan: Plan, device: int) -> None:
        super().__init__(plan, device)
        assert plan.config.lanes is not None
        self._delay, self._layers = plan.config.lanes.delay, plan.config.num_layers
        last = range(self._layers - self._delay, self._layers)
        self._pushed |= {(module, layer) for module in MODULES for layer in last}

    def _mix(self, block: int, layer: int, module: Module) -> Iterator[Step]:
        steps = super()._mix(block, layer, module)
        if layer >= self._delay:
            yield from steps
            return
        wanted = self._layers - self._delay + layer
        sums = self._from_peers(block, f"inbox_{module}", layer)
        yield from (_Earlier(step.channel, wanted, step.words, step.copy) for step in sums)
        own = [step for step in steps if not isinstance(step, Receive)]
        yield from sorted(own, key=lambda step: isinstance(step, Publish) and step.channel.startswith("inbox"))


def _draft(
    plan: Plan, rules: Rules, flow: Flow, block: int, tokens: tuple[TokenKind, ...], position: int
) -> Iterator[_Token]:
    channels = exchange(plan, flow.device).channels
    for token, kind in enumerate(tokens):
        steps = list(flow.steps(block, position + token, kind))
        for step in steps if rules.summary_last else _hurried(steps):
            if not isinstance(step, Receive | Publish):
                continue
            of = token - 1 if isinstance(step, _Earlier) else token
            if of < 0:
                continue
            channel = channels[step.channel]
            if step.layer is None:
                turns = channel.turns
                if turns > 1 and rules.token_turns is not None:
                    turns = rules.token_turns
                slot, epoch = (0, of % turns), of
            elif rules.layer_turns is None:
                slot, epoch = (step.layer, 0), of
            else:
                epoch = of * plan.config.num_layers + step.layer
                slot = (epoch % rules.layer_turns, 0)
            reads = isinstance(step, Receive)
            tag = epoch + rules.first_tag - (rules.awaited_lag if reads else 0) if rules.tag_epochs else 1
            device = flow.device if isinstance(step, Receive) else step.device
            copies = [step.copy] if isinstance(step, Receive) else _stored(rules, plan, channel, block)
            keys = [_Key(device, step.channel, slot, copy) for copy in copies]
            value = Value(tag, (step.channel, step.layer, of))
            yield _Token("read" if reads else "write", keys, step.words, value)


def _stored(rules: Rules, plan: Plan, channel: Channel, block: int) -> list[int]:
    """Copies that a block stores of the words it publishes."""
    if channel.copies == 1 or rules.copies == "all":
        return list(range(channel.copies))
    return list(range(channel.copies - 1)) if rules.copies == "all but the last" else [plan.placement.die_of(block)]


def _hurried(steps: list[Step]) -> list[Step]:
    """Publishes the summary after the last layer, before what the LM head needs is read."""
    first = max(i for i, step in enumerate(steps) if isinstance(step, Moment) and step.mark == "mlp_mixed") + 1
    at = next(i for i, step in enumerate(steps) if isinstance(step, Publish) and step.channel == "summary")
    stop = next(i for i, step in enumerate(steps) if isinstance(step, Moment) and step.mark == "summarised")
    return steps[:first] + steps[at:stop] + steps[first:at] + steps[stop:]


def _group(drafts: list[list[_Token]]) -> dict[_Key, np.ndarray]:
    """Per channel's copy, the cell of every word; words with equal accesses share a cell."""
    marks: dict[_Key, list[tuple[np.ndarray, int]]] = defaultdict(list)
    order = 0
    for draft in drafts:
        for step in draft:
            order += 1
            for key in step.keys:
                marks[key].append((step.words, order))
    groups, first = {}, 0
    generator = np.random.default_rng(0)
    for key, accesses in marks.items():
        length = 1 + max(int(words.max(initial=-1)) for words, _ in accesses)
        # A random sum over the steps that touch a word; equal sums, equal steps.
        prints = np.zeros(length, np.uint64)
        for words, _ in accesses:
            prints[words] += generator.integers(1 << 63, dtype=np.uint64)
        touched = prints > 0
        found, index = np.unique(prints[touched], return_inverse=True)
        cells = np.full(length, -1)
        cells[touched] = first + index
        groups[key] = cells
        first += len(found)
    return groups


def _initial(rules: Rules, values: list[Value]) -> Value:
    if rules.zeroed or not values:
        return Value(0, None)
    return Value(values[0].tag, None)


def _name(key: _Key) -> str:
    return f"{key.channel} of device {key.device}, place {key.slot[0] or key.slot[1]}, copy {key.copy}"
