"""Exchange memory: where every published value lies, and who writes it.

A hand-off moves the outcome of one stage from the blocks that computed it to the blocks that need it. Each value is
published as one word that carries its own flag (``ffi/kernel/handoff.h`` has the contract). A *channel* is the array
of words of one hand-off. Every layer has channels of its own, reused by the next token only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from jax_mono.plan import Plan, StageName
from jax_mono.spans import Span

MODULES = ("attention", "mlp")
SUMMARY_VALUES = 6
"""Values in a block's summary of its share of the vocabulary; ``SummaryValue`` in ffi/kernel/sample.h."""
CHOICE_VALUES = 2
"""Values of the sampled token: its id, and whether the host wants the call to end."""


@dataclass(frozen=True)
class Channel:
    """One hand-off's words in the exchange memory of a device.

    Attributes:
        name: What travels.
        words: Length of one copy.
        per_layer: Whether every layer has its own copy.
        offset: First word; for a per-layer channel that of layer 0.
        source: Who writes: this device's blocks, the same block of its peers, or all blocks of all devices.
        copies: Copies used in turn by successive tokens.
    """

    name: str
    words: int
    per_layer: bool
    offset: int
    source: Literal["local", "peers", "all"] = "local"
    copies: int = 1


@dataclass(frozen=True)
class Exchange:
    """All channels of one device.

    Attributes:
        channels: By name.
        layer_stride: Words between the channels of one layer and those of the next.
        arrivals: First of the words behind all channels in which blocks are counted: one per die, none if there is but
            one die. See ffi/kernel/roles.h.
        words: Total length.
    """

    channels: dict[str, Channel]
    layer_stride: int
    arrivals: int
    words: int


def exchange(plan: Plan, device: int) -> Exchange:
    """Lays out the exchange memory of one device."""
    share = plan.devices[device]
    lanes = share.lanes.count
    blocks, runs = plan.num_blocks, Runs.of(plan)
    per_layer = {
        "qkv": share.stages["qkv"].tiles * runs.tile,
        "attention": attention_words(plan, device),
        "residual_attention": lanes * blocks * runs.hidden,
        "activation": blocks * runs.activation,
        "residual_mlp": lanes * blocks * runs.hidden,
        "inbox_attention": plan.num_devices * blocks * runs.hidden,
        "inbox_mlp": plan.num_devices * blocks * runs.hidden,
    }
    per_token = {
        "final_inbox": plan.num_devices * blocks * runs.hidden,
        "final_sum": blocks * runs.hidden,
        "summary": plan.num_devices * blocks * _float_words(plan, SUMMARY_VALUES),
        "logits": plan.num_devices * blocks * runs.logits,
        "choice": _float_words(plan, CHOICE_VALUES),
    }
    sources: dict[str, Literal["local", "peers", "all"]] = {
        "inbox_attention": "peers",
        "inbox_mlp": "peers",
        "final_inbox": "peers",
        "summary": "all",
        "logits": "all",
    }
    channels, offset = {}, 0
    for name, words in per_layer.items():
        channels[name] = Channel(name, words, True, offset, sources.get(name, "local"))
        offset += words
    layer_stride = offset
    offset = layer_stride * plan.config.num_layers
    for name, words in per_token.items():
        copies = 1 if name.startswith("final") else 2
        channels[name] = Channel(name, words, False, offset, sources.get(name, "local"), copies)
        offset += copies * words
    dies = len(plan.placement.roles)
    return Exchange(channels, layer_stride, arrivals=offset, words=offset + (dies if dies > 1 else 0))


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
    """Says who writes a channel of ``device``.

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
