"""Tapes packed with plain loops, from the description of the format alone.

A plan says which tiles a block owns; here is what a tile holds and in which order tiles lie on a tape. Shares no code
with ``jax_mono.tape`` and ``jax_mono.packing``, and compiles nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

STAGES = ("qkv", "o", "up", "down", "head")


def pack(plan: Any, params: Mapping[Any, Any]) -> dict[str, np.ndarray]:
    """Cuts a model for a plan.

    Args:
        plan: A ``Plan``.
        params: The canonical parameter tree, float32 or bfloat16.

    Returns:
        ``layers`` [D, B, num_layers, words], ``head`` [D, B, words], ``constants`` float32 [D, floats] and ``embed``.
    """
    config, embed = plan.config, np.asarray(params["embed"])
    shape = (plan.num_devices, plan.num_blocks)
    layers = np.zeros((*shape, config.num_layers, plan.layer_words), embed.dtype)
    head = np.zeros((*shape, plan.head_words), embed.dtype)
    for device, share in enumerate(plan.devices):
        for layer in range(config.num_layers):
            own = _own_matrices(config, share, params["layers"][layer])
            for name in STAGES[:-1]:
                _write(layers[device, :, layer], share.stages[name], _tiles(plan, name, own[name]))
        rows = np.asarray(params.get("lm_head", embed))[share.vocab.first : share.vocab.stop]
        lanes = share.lanes.count if config.lanes is not None and config.lanes.head == "per_lane" else 1
        _write(head[device], share.stages["head"], _tiles(plan, "head", np.split(rows, lanes)))
    constants = np.stack([_constants(plan, share, params) for share in plan.devices])
    return {"layers": layers, "head": head, "constants": constants, "embed": embed}


def _write(tapes: np.ndarray, stage: Any, tiles: list[np.ndarray]) -> None:
    """Writes each block's run of tiles at its offset of that block's tape [B, words]."""
    assert len(tiles) == stage.tiles
    for block, (run, offset) in enumerate(zip(stage.shares, stage.offsets, strict=True)):
        for index in range(run.count):
            start = offset + index * stage.tile_words
            tapes[block, start : start + stage.tile_words] = tiles[run.first + index]


def _tiles(plan: Any, name: str, lanes: list[np.ndarray]) -> list[np.ndarray]:
    """Tiles of a stage from one matrix per lane: lane after lane, or (o and down) all lanes side by side."""
    if name in ("o", "down"):
        per_lane = [_row_tiles(plan.tile, matrix) for matrix in lanes]
        return [np.concatenate(same_rows) for same_rows in zip(*per_lane, strict=True)]
    return [tile for matrix in lanes for tile in _row_tiles(plan.tile, matrix)]


def _row_tiles(form: Any, matrix: np.ndarray) -> list[np.ndarray]:
    """Runs of ``rows`` rows, each as one chunk of ``cols`` columns after the other, zeros beyond the edges."""
    rows, cols = matrix.shape
    padded = np.zeros((-(-rows // form.rows) * form.rows, -(-cols // form.cols) * form.cols), matrix.dtype)
    padded[:rows, :cols] = matrix
    tiles = []
    for first in range(0, len(padded), form.rows):
        strip = padded[first : first + form.rows]
        chunks = [strip[:, at : at + form.cols].ravel() for at in range(0, padded.shape[1], form.cols)]
        tiles.append(np.concatenate([np.zeros(0, matrix.dtype), *chunks]))
    return tiles


def _own_matrices(config: Any, share: Any, layer: Mapping[str, Any]) -> dict[str, list[np.ndarray]]:
    """Per stage the matrices of each lane of a device."""
    attention = {name: np.asarray(array) for name, array in layer["attention"].items()}
    mlp = {name: np.asarray(array) for name, array in layer["feed_forward"].items()}
    own: dict[str, list[np.ndarray]] = {name: [] for name in STAGES[:-1]}
    for lane in range(share.lanes.first, share.lanes.stop):
        queries, keys, neurons = _channels(config, share)
        rows = [attention["wq"][lane][queries], attention["wk"][lane][keys], attention["wv"][lane][keys]]
        own["qkv"].append(np.concatenate(rows))
        own["o"].append(attention["wo"][lane][:, queries])
        own["up"].append(_alternate(mlp["w1"][lane][neurons], mlp["w3"][lane][neurons]))
        own["down"].append(mlp["w2"][lane][:, neurons])
    return own


def _channels(config: Any, share: Any) -> tuple[slice, slice, slice]:
    """Within a lane: query channels, key channels and neurons of a device; a lane is never cut."""
    if config.lanes is not None:
        return slice(None), slice(None), slice(None)
    first, stop = (head * config.head_dim for head in (share.kv_heads.first, share.kv_heads.stop))
    group = config.num_heads // config.num_kv_heads
    return slice(first * group, stop * group), slice(first, stop), slice(share.neurons.first, share.neurons.stop)


def _alternate(gate: np.ndarray, up: np.ndarray, half: int = 4) -> np.ndarray:
    """Four gate rows, the same neurons' four up rows, and so on."""
    strips = []
    for first in range(0, len(gate), half):
        for matrix in (gate, up):
            strip = np.zeros((half, gate.shape[1]), gate.dtype)
            rows = matrix[first : first + half]
            strip[: len(rows)] = rows
            strips.append(strip)
    return np.concatenate(strips)


def _constants(plan: Any, share: Any, params: Mapping[Any, Any]) -> np.ndarray:
    config = plan.config
    layers = [params["layers"][layer] for layer in range(config.num_layers)]
    parts = [layer["attention_norm"] for layer in layers] + [layer["ffn_norm"] for layer in layers] + [params["norm"]]
    if config.qkv_bias:
        widest = max(other.lanes.count * other.stages["qkv"].rows for other in plan.devices)
        queries, keys, _ = _channels(config, share)
        for layer in layers:
            row = np.zeros(widest, np.float32)
            biases = [
                np.asarray(layer["attention"][name], np.float32)[lane][channels]
                for lane in range(share.lanes.first, share.lanes.stop)
                for name, channels in (("bq", queries), ("bk", keys), ("bv", keys))
            ]
            joined = np.concatenate(biases)
            row[: len(joined)] = joined
            parts.append(row)
    if config.qk_norm:
        parts += [layer["attention"]["q_norm"] for layer in layers]
        parts += [layer["attention"]["k_norm"] for layer in layers]
    return np.concatenate([np.asarray(part, np.float32) for part in parts])
