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

from jax_mono.plan import DevicePlan, Plan, Span, Stage

MODULES = ("attention", "mlp")
SUMMARY_WORDS = 6
"""Words of a block's summary of its share of the vocabulary; ``Summary`` in ffi/kernel/sample.h."""
CHOICE_WORDS = 2
"""Words of the sampled token: its id and its log-probability."""


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
        words: Total length.
    """

    channels: dict[str, Channel]
    layer_stride: int
    words: int


def exchange(plan: Plan, device: int) -> Exchange:
    """Lays out the exchange memory of one device."""
    share = plan.devices[device]
    hidden, lanes = plan.config.hidden_size, share.lanes.count
    per_layer = {
        "qkv": lanes * share.stages["qkv"].rows,
        "attention": attention_words(plan, device),
        "residual_attention": lanes * hidden,
        "activation": share.neurons.count,
        "residual_mlp": lanes * hidden,
        "inbox_attention": plan.num_devices * hidden,
        "inbox_mlp": plan.num_devices * hidden,
    }
    per_token = {
        "final_inbox": plan.num_devices * hidden,
        "final_sum": hidden,
        "summary": plan.num_devices * plan.num_blocks * SUMMARY_WORDS,
        "logits": plan.config.vocab_size,
        "choice": CHOICE_WORDS,
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
    return Exchange(channels, layer_stride, offset)


def attention_words(plan: Plan, device: int) -> int:
    """Words of the attention hand-off: per query head and split, an unnormalised output, a maximum and a sum."""
    queries = plan.devices[device].kv_heads.count * plan.config.queries_per_kv
    return queries * plan.kv_splits * (plan.config.head_dim + 2)


def writers(plan: Plan, device: int, channel: str) -> Iterator[tuple[int, int, np.ndarray]]:
    """Says who writes a channel of ``device``.

    Args:
        plan: The plan.
        device: The device whose exchange memory is written.
        channel: A name of :func:`exchange`.

    Yields:
        (writing device, writing block, int64 word indices within the channel).
    """
    for block in range(plan.num_blocks):
        if channel == "qkv":
            stage = plan.devices[device].stages["qkv"]
            yield device, block, _column_rows(plan, stage, block)
        elif channel == "activation":
            yield device, block, _neurons(plan, plan.devices[device], block)
        elif channel == "attention":
            span = plan.devices[device].attention[block]
            per_item = plan.config.queries_per_kv * (plan.config.head_dim + 2)
            yield device, block, _items(span, per_item)
        elif channel in ("residual_attention", "residual_mlp"):
            rows, hidden = _hidden_rows(plan, block), plan.config.hidden_size
            lanes = np.arange(plan.devices[device].lanes.count)[:, None]
            yield device, block, (lanes * hidden + rows).ravel()
        elif channel == "final_sum":
            yield device, block, _hidden_rows(plan, block)
        elif channel in ("inbox_attention", "inbox_mlp", "final_inbox"):
            for peer in range(plan.num_devices):
                if peer != device:
                    yield peer, block, peer * plan.config.hidden_size + _hidden_rows(plan, block)
        elif channel == "summary":
            for peer in range(plan.num_devices):
                first = (peer * plan.num_blocks + block) * SUMMARY_WORDS
                yield peer, block, np.arange(first, first + SUMMARY_WORDS)
        elif channel == "logits":
            for peer, share in enumerate(plan.devices):
                yield peer, block, share.vocab.first + _column_rows(plan, share.stages["head"], block)
        elif channel == "choice":
            yield device, block, np.arange(CHOICE_WORDS if block == 0 else 0)
        else:
            raise KeyError(channel)


def _items(span: Span, words: int) -> np.ndarray:
    return np.arange(span.first * words, span.stop * words)


def _hidden_rows(plan: Plan, block: int) -> np.ndarray:
    rows = plan.tile.rows
    span = plan.hidden[block]
    return np.arange(span.first * rows, min(span.stop * rows, plan.config.hidden_size))


def _column_rows(plan: Plan, stage: Stage, block: int) -> np.ndarray:
    """Rows (lane-major, without padding) of a column parallel stage that a block owns."""
    rows = plan.tile.rows
    found = []
    for tile in range(stage.shares[block].first, stage.shares[block].stop):
        lane, tile_in_lane = divmod(tile, stage.tiles_per_lane)
        first = tile_in_lane * rows
        found.append(lane * stage.rows + np.arange(first, min(first + rows, stage.rows)))
    return np.concatenate(found) if found else np.arange(0)


def _neurons(plan: Plan, share: DevicePlan, block: int) -> np.ndarray:
    stage = share.stages["up"]
    per_tile, per_lane = plan.tile.rows // 2, share.neurons.count // share.lanes.count
    found = []
    for tile in range(stage.shares[block].first, stage.shares[block].stop):
        lane, tile_in_lane = divmod(tile, stage.tiles_per_lane)
        first = tile_in_lane * per_tile
        found.append(lane * per_lane + np.arange(first, min(first + per_tile, per_lane)))
    return np.concatenate(found) if found else np.arange(0)
