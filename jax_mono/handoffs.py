"""Exchange memory: where every published value lies, and who writes it.

A hand-off moves the outcome of one stage from the blocks that computed it to the blocks that need it. Each value is
published as one word that carries its own flag (``ffi/kernel/handoff.h`` has the contract). A *channel* is the array
of words of one hand-off. Every layer has channels of its own, reused by the next token only.

Where a device has several dies, a channel that many blocks read has a copy for each of them: its writer stores every
word once per die, and a block polls its own die's copy. So a line of memory has no more pollers than a die has blocks.
Inboxes and logits have one reader per word and need no copies.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from jax_mono.plan import Plan, StageName
from jax_mono.spans import Span

MODULES = ("attention", "mlp")
SUMMARY_VALUES = 6
"""Values in a block's summary of its share of the vocabulary; ``SummaryValue`` in ffi/kernel/sample.h."""
CHOICE_VALUES = 2
"""Values of the sampled token: its id, and whether the host wants the call to end."""

LINE_BYTES = 128
"""Of a cache line, which memory serves one request after the other."""

Source = Literal["local", "peers", "all"]


@dataclass(frozen=True)
class Channel:
    """One hand-off's words in the exchange memory of a device.

    Attributes:
        name: What travels.
        words: Length of one copy, for one layer and one turn.
        per_layer: Whether every layer has its own words.
        offset: First word; for a per-layer channel that of layer 0.
        source: Who writes: this device's blocks, the same block of its peers, or all blocks of all devices.
        turns: Places used in turn by successive tokens, one after the other.
        copies: How many dies have a copy for their blocks to poll, at a distance of ``Exchange.copy_words``; 1 where
            all readers poll the same words.
    """

    name: str
    words: int
    per_layer: bool
    offset: int
    source: Source = "local"
    turns: int = 1
    copies: int = 1

    @property
    def length(self) -> int:
        """Words of one copy, for all turns."""
        return self.turns * self.words


@dataclass(frozen=True)
class Exchange:
    """All channels of one device.

    Attributes:
        channels: By name.
        layer_stride: Words between the channels of one layer and those of the next.
        copy_words: Words between one die's copies and the next die's: whole lines, so that dies share none. The same
            for all channels of all devices; 0 if there is but one die.
        arrivals: First of the words behind all channels in which blocks are counted: one per die, none if there is but
            one die. See ffi/kernel/roles.h.
        words: Total length.
    """

    channels: dict[str, Channel]
    layer_stride: int
    copy_words: int
    arrivals: int
    words: int


def exchange(plan: Plan, device: int) -> Exchange:
    """Lays out the exchange memory of one device: the channels of each layer, then those of a token.

    Of either, the channels that have copies come first, die by die, then those that have none.
    """
    dies, distance = len(plan.placement.roles), copy_words(plan)
    drafts = _channels(plan, device)
    channels, offset, layer_stride = {}, 0, 0
    for per_layer in (True, False):
        free = {True: offset, False: offset + dies * distance}  # by whether a channel has copies
        for draft in drafts:
            if draft.per_layer == per_layer:
                copied = draft.copies > 1
                channels[draft.name] = replace(draft, offset=free[copied])
                free[copied] += draft.length
        offset = free[False]
        if per_layer:
            layer_stride = _round_up(offset, _line_words(plan))
            offset = layer_stride * plan.config.num_layers
    return Exchange(channels, layer_stride, distance, arrivals=offset, words=offset + (dies if dies > 1 else 0))


@functools.lru_cache(maxsize=64)
def copy_words(plan: Plan) -> int:
    """Words from one die's copy of a channel to the next die's; 0 if there is but one die.

    A constant of the resident program, so the same for all channels and devices: room for those of a layer, and for
    those of a token.
    """
    copied = (
        sum(draft.length for draft in _channels(plan, device) if draft.copies > 1 and draft.per_layer == per_layer)
        for device in range(plan.num_devices)
        for per_layer in (True, False)
    )
    return _round_up(max(copied), _line_words(plan))


def _channels(plan: Plan, device: int) -> list[Channel]:
    """The channels of a device, without their places."""
    share, runs = plan.devices[device], Runs.of(plan)
    lanes, blocks, everybody = share.lanes.count, plan.num_blocks, plan.num_devices * plan.num_blocks
    dies = len(plan.placement.roles)
    residual, inbox = lanes * blocks * runs.hidden, everybody * runs.hidden

    def layer(name: str, words: int, copies: int, source: Source = "local") -> Channel:
        return Channel(name, words, True, 0, source, copies=copies)

    def token(name: str, words: int, copies: int, source: Source = "local", turns: int = 1) -> Channel:
        return Channel(name, words, False, 0, source, turns, copies)

    return [
        layer("qkv", share.stages["qkv"].tiles * runs.tile, dies),
        layer("attention", attention_words(plan, device), dies),
        layer("residual_attention", residual, dies),
        layer("activation", blocks * runs.activation, dies),
        layer("residual_mlp", residual, dies),
        layer("inbox_attention", inbox, 1, "peers"),
        layer("inbox_mlp", inbox, 1, "peers"),
        token("final_inbox", inbox, 1, "peers"),
        token("final_sum", blocks * runs.hidden, dies),
        token("summary", everybody * _float_words(plan, SUMMARY_VALUES), dies, "all", turns=2),
        token("logits", everybody * runs.logits, 1, "all", turns=2),
        token("choice", _float_words(plan, CHOICE_VALUES), dies, turns=2),
    ]


def _line_words(plan: Plan) -> int:
    """Words of a line, where it matters who shares one."""
    return LINE_BYTES // plan.target.word_bytes if len(plan.placement.roles) > 1 else 1


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class Runs:
    """Words that a block publishes in one run; the same for all blocks of all devices.

    Attributes:
        tile: Of the rows of a QKV tile.
        hidden: Of a block's hidden rows.
        activation: Of a block's neurons.
        logits: Of a block's vocabulary rows.
    """

    tile: int
    hidden: int
    activation: int
    logits: int

    @classmethod
    def of(cls, plan: Plan) -> Runs:
        """The runs of a plan."""
        rows = plan.tile.rows

        def most(name: StageName) -> int:
            return max(share.count for device in plan.devices for share in device.stages[name].shares)

        return cls(
            tile=_float_words(plan, rows),
            hidden=_float_words(plan, rows * max(span.count for span in plan.hidden)),
            activation=-(-most("up") * rows // 2 // plan.target.weights_per_word),
            logits=_float_words(plan, most("head") * rows),
        )


def _float_words(plan: Plan, values: int) -> int:
    return -(-values // plan.target.floats_per_word)


def part_words(plan: Plan) -> int:
    """Words of one query's part: a maximum and a sum, then an unnormalised output."""
    return _float_words(plan, 2) + _float_words(plan, plan.config.head_dim)


def attention_words(plan: Plan, device: int) -> int:
    """Words of the attention hand-off: one part per query head and split."""
    return plan.devices[device].kv_heads.count * plan.config.queries_per_kv * plan.kv_splits * part_words(plan)


def writers(plan: Plan, device: int, channel: str) -> Iterator[tuple[int, int, np.ndarray]]:
    """Says who writes a channel of ``device``; the same for all its copies.

    Args:
        plan: The plan.
        device: The device whose exchange memory is written.
        channel: A name of :func:`exchange`.

    Yields:
        (writing device, writing block, int64 word indices within the channel).
    """
    runs, blocks, share = Runs.of(plan), plan.num_blocks, plan.devices[device]
    for block in range(blocks):
        if channel == "qkv":
            yield device, block, _items(share.stages["qkv"].shares[block], runs.tile)
        elif channel == "activation":
            yield device, block, _items(Span(block, 1), runs.activation)
        elif channel == "attention":
            yield device, block, _items(share.attention[block], plan.config.queries_per_kv * part_words(plan))
        elif channel in ("residual_attention", "residual_mlp"):
            of_lanes = [_items(Span(lane * blocks + block, 1), runs.hidden) for lane in range(share.lanes.count)]
            yield device, block, np.concatenate(of_lanes)
        elif channel == "final_sum":
            yield device, block, _items(Span(block, 1), runs.hidden)
        elif channel in ("inbox_attention", "inbox_mlp", "final_inbox"):
            for peer in range(plan.num_devices):
                if peer != device:
                    yield peer, block, _items(Span(peer * blocks + block, 1), runs.hidden)
        elif channel in ("summary", "logits"):
            words = runs.logits if channel == "logits" else _float_words(plan, SUMMARY_VALUES)
            for peer in range(plan.num_devices):
                yield peer, block, _items(Span(peer * blocks + block, 1), words)
        elif channel == "choice":
            yield device, block, np.arange(_float_words(plan, CHOICE_VALUES) if block == 0 else 0)
        else:
            raise KeyError(channel)


def _items(span: Span, words: int) -> np.ndarray:
    return np.arange(span.first * words, span.stop * words)
