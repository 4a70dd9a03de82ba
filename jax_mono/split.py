"""What each device holds of a model: lanes, or ranges of heads, neurons and vocabulary rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jax_mono.config import ModelConfig
from jax_mono.spans import Span, clip, even_counts, fill, spans
from jax_mono.tile import TileFormat


@dataclass(frozen=True)
class DeviceShare:
    """What one device holds.

    Attributes:
        lanes: Lanes of a Laneformer; a dense model is one lane everywhere.
        kv_heads: KV heads, lane-major.
        neurons: Feed-forward neurons, lane-major.
        vocab: Rows of the LM head.
    """

    lanes: Span
    kv_heads: Span
    neurons: Span
    vocab: Span


def device_shares(config: ModelConfig, devices: int, tile: TileFormat) -> list[DeviceShare]:
    """Shares a model among devices: a Laneformer's lanes, or a dense model's heads, neurons and vocabulary rows."""
    if config.lanes is not None:
        lanes, heads, neurons = (
            spans([total // devices] * devices)
            for total in (config.num_lanes, config.num_kv_heads, config.intermediate_size)
        )
    else:
        lanes = (Span(0, 1),) * devices
        heads = spans(even_counts(config.num_kv_heads, devices))
        neurons = spans(_neuron_counts(config, [span.count for span in heads], tile))
    if config.lanes is not None and config.lanes.head == "per_lane":
        vocab = spans([config.vocab_size // devices] * devices)
    else:
        tiles = even_counts(tile.row_tiles(config.vocab_size), devices)
        vocab = clip(spans([count * tile.rows for count in tiles]), config.vocab_size)
    return [DeviceShare(*share) for share in zip(lanes, heads, neurons, vocab, strict=True)]


def _neuron_counts(config: ModelConfig, kv_heads: Sequence[int], tile: TileFormat) -> list[int]:
    """Cuts the neurons so that attention and feed-forward together weigh the same on every device.

    Runs of ``tile.cut_cols`` neurons travel together, because they are columns of the down projection.
    """
    per_head = config.head_dim * config.hidden_size * (2 + 2 * config.queries_per_kv)
    per_unit = 3 * config.hidden_size * tile.cut_cols
    units = config.intermediate_size // tile.cut_cols
    if units < len(kv_heads):
        return even_counts(config.intermediate_size, len(kv_heads))
    counts = fill([heads * per_head for heads in kv_heads], units, per_unit, at_least=1)
    neurons = [count * tile.cut_cols for count in counts]
    neurons[-1] += config.intermediate_size - sum(neurons)
    return neurons
