"""The plan as words: what the resident program reads.

Mirrors the structs of ``ffi/kernel/plan.h`` field by field; the native library reports its own field offsets and a
test compares them.
"""

from __future__ import annotations

import functools

import numpy as np

from jax_mono.config import ModelConfig, Module
from jax_mono.handoffs import MODULES, Runs, copy_words, exchange
from jax_mono.placement import MAX_DIES
from jax_mono.plan import STAGES, DevicePlan, Plan
from jax_mono.spans import Span

MAGIC = 0x6D6F6E6F
HEAD_KINDS = {None: 0, "mean_of_norms": 1, "norm_of_sum": 2, "per_lane": 3}

SPAN = np.dtype([("first", "<i4"), ("count", "<i4")])
HEADER = np.dtype(
    [
        ("layer_words", "<i8"),
        ("head_words", "<i8"),
        *(
            (name, "<i4")
            for name in (
                "magic",
                "size",
                "num_devices",
                "num_blocks",
                "num_layers",
                "num_lanes",
                "hidden_size",
                "vocab_size",
                "head_dim",
                "queries_per_kv",
                "kv_splits",
                "kv_chunk",
                "max_kv_heads",
                "max_vocab",
                "tile_rows",
                "tile_cols",
                "rope_interleaved",
                "qkv_bias",
                "qk_norm",
                "head_kind",
            )
        ),
        ("norm_eps", "<f4"),
        *(
            (name, "<i4")
            for name in (
                "hidden_width",
                "floats_per_word",
                "weights_per_word",
                "hidden_run",
                "activation_run",
                "logits_run",
                "history_layers",
                "num_dies",
                "tape_rows",
                "granule_words",
                "period",
            )
        ),
        ("roles", SPAN, MAX_DIES),
        ("copy_words", "<i8"),
        ("region_periods", "<i8"),
        ("compressed", "<i8"),
        ("flat_activations", "<i8"),
        ("layers_swizzle", "<i8"),
        ("head_swizzle", "<i8"),
    ]
)
LAYER = np.dtype(
    [
        ("window", "<i4"),
        ("source", "<i4", 2),
        ("pushed", "<i4", 2),
        ("own_scale", "<f4", 2),
        ("reserved", "<i4"),
    ]
)
STAGE = np.dtype(
    [("tile_words", "<i8"), ("rows", "<i4"), ("width", "<i4"), ("lanes", "<i4"), ("tiles_per_lane", "<i4")]
)
CHANNELS = np.dtype(
    [
        ("words", "<i8"),
        ("layer_stride", "<i8"),
        ("qkv", "<i8"),
        ("attention", "<i8"),
        ("activation", "<i8"),
        ("residual", "<i8", 2),
        ("inbox", "<i8", 2),
        ("final_inbox", "<i8"),
        ("final_sum", "<i8"),
        ("summary", "<i8"),
        ("logits", "<i8"),
        ("choice", "<i8"),
        ("arrivals", "<i8"),
    ]
)
CONSTANTS = np.dtype(
    [(name, "<i8") for name in ("attention_norm", "ffn_norm", "final_norm", "qkv_bias", "q_norm", "k_norm", "floats")]
)
DEVICE = np.dtype(
    [
        ("stages", STAGE, len(STAGES)),
        ("channels", CHANNELS),
        ("constants", CONSTANTS),
        ("lanes", SPAN),
        ("kv_heads", SPAN),
        ("neurons", SPAN),
        ("vocab", SPAN),
    ]
)
BLOCK = np.dtype(
    [
        ("layers", "<i8"),
        ("head", "<i8"),
        ("offsets", "<i8", len(STAGES)),
        ("shares", SPAN, len(STAGES)),
        ("hidden", SPAN),
        ("attention", SPAN),
    ]
)
RECORDS = {
    "Span": SPAN,
    "Header": HEADER,
    "Layer": LAYER,
    "Stage": STAGE,
    "Channels": CHANNELS,
    "Constants": CONSTANTS,
    "Device": DEVICE,
    "Block": BLOCK,
}


@functools.lru_cache(maxsize=16)
def plan_record(plan: Plan) -> np.ndarray:
    """Writes the plan as int64 words: Header, Layer per layer, Device per device, Block per device and block."""
    layers, devices = _layers(plan), np.zeros(plan.num_devices, DEVICE)
    blocks = np.zeros((plan.num_devices, plan.num_blocks), BLOCK)
    for index, share in enumerate(plan.devices):
        devices[index] = _device(plan, index)
        for block in range(plan.num_blocks):
            blocks[index, block] = _block(plan, share, block)
    size = HEADER.itemsize + layers.nbytes + devices.nbytes + blocks.nbytes
    parts = (_header(plan, size), layers, devices, blocks)
    words = np.frombuffer(b"".join(part.tobytes() for part in parts), dtype=np.int64)
    words.flags.writeable = False
    return words


@functools.lru_cache(maxsize=64)
def constants_layout(plan: Plan) -> dict[str, int]:
    """Offsets, in floats, of what is not streamed; the same on every device.

    ``attention_norm`` and ``ffn_norm`` [layers, hidden], ``final_norm`` [hidden], ``qkv_bias`` [layers, lanes, rows],
    ``q_norm`` and ``k_norm`` [layers, head_dim], ``layers_swizzle`` and ``head_swizzle`` [1 + regions], which are
    integers, see :class:`jax_mono.granules.Swizzle`; ``floats`` is the total.
    """
    config = plan.config
    widest_qkv = max(share.stages["qkv"].rows * share.lanes.count for share in plan.devices)
    lengths = {
        "attention_norm": config.num_layers * config.hidden_size,
        "ffn_norm": config.num_layers * config.hidden_size,
        "final_norm": config.hidden_size,
        "qkv_bias": config.num_layers * widest_qkv if config.qkv_bias else 0,
        "q_norm": config.num_layers * config.head_dim if config.qk_norm else 0,
        "k_norm": config.num_layers * config.head_dim if config.qk_norm else 0,
        **{
            name: 1 + regions if regions else 0
            for name, regions in zip(("layers_swizzle", "head_swizzle"), plan.tape_regions, strict=True)
        },
    }
    layout, offset = {}, 0
    for name, length in lengths.items():
        layout[name] = offset
        offset += length
    return {**layout, "floats": offset}


def _header(plan: Plan, size: int) -> np.ndarray:
    config, runs = plan.config, Runs.of(plan)
    header = np.zeros((), HEADER)
    values = {
        "layer_words": plan.layer_words,
        "head_words": plan.head_words,
        "magic": MAGIC,
        "size": size,
        "num_devices": plan.num_devices,
        "num_blocks": plan.num_blocks,
        "num_layers": config.num_layers,
        "num_lanes": config.num_lanes,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "head_dim": config.head_dim,
        "queries_per_kv": config.queries_per_kv,
        "kv_splits": plan.kv_splits,
        "kv_chunk": plan.target.kv_chunk,
        "max_kv_heads": plan.max_kv_heads,
        "max_vocab": plan.max_vocab,
        "tile_rows": plan.tile.rows,
        "tile_cols": plan.tile.cols,
        "rope_interleaved": config.rope_interleaved,
        "qkv_bias": config.qkv_bias,
        "qk_norm": config.qk_norm,
        "head_kind": HEAD_KINDS[config.lanes.head if config.lanes else None],
        "norm_eps": config.norm_eps,
        "hidden_width": plan.tile.padded_cols(config.hidden_size),
        "floats_per_word": plan.target.floats_per_word,
        "weights_per_word": plan.target.weights_per_word,
        "hidden_run": runs.hidden,
        "activation_run": runs.activation,
        "logits_run": runs.logits,
        "history_layers": _history_layers(config),
        "num_dies": len(plan.placement.roles),
        "tape_rows": plan.placement.tape_rows,
        "granule_words": plan.placement.granule_words,
        "period": len(plan.placement.pattern),
        "roles": [_span(span) for span in plan.placement.roles] + [(0, 0)] * (MAX_DIES - len(plan.placement.roles)),
        "copy_words": copy_words(plan),
        "region_periods": plan.placement.region_periods,
        "compressed": plan.tile.compressed,
        "flat_activations": _flat_activations(plan, runs),
        "layers_swizzle": constants_layout(plan)["layers_swizzle"],
        "head_swizzle": constants_layout(plan)["head_swizzle"],
    }
    for name in HEADER.names or ():
        header[name] = values[name]
    return header


def _flat_activations(plan: Plan, runs: Runs) -> bool:
    """Whether words of activations are full, and follow each other as the columns of the down stage do."""
    neurons, word = runs.activation * plan.target.weights_per_word, plan.target.weights_per_word
    for device in plan.devices:
        up, down = device.stages["up"], device.stages["down"]
        if any(share.count * plan.tile.rows // 2 != neurons for share in up.shares):
            return False
        if up.tiles * plan.tile.rows // 2 != down.lanes * plan.tile.padded_cols(down.cols) or down.cols % word:
            return False
        if down.cols != plan.tile.padded_cols(down.cols):
            return False
    return True


def _history_layers(config: ModelConfig) -> int:
    """Of how many layers module outputs are kept: what a layer adds, it takes before its own outputs replace them."""
    modules: tuple[Module, ...] = MODULES
    sources = [(layer, config.mixing(module, layer).source) for layer in range(config.num_layers) for module in modules]
    return max([1, *(layer - source for layer, source in sources if source is not None)])


def _layers(plan: Plan) -> np.ndarray:
    config = plan.config
    layers = np.zeros(config.num_layers, LAYER)
    modules: tuple[Module, ...] = MODULES
    for layer in range(config.num_layers):
        layers[layer]["window"] = config.sliding_windows[layer]
        for index, module in enumerate(modules):
            mixing = config.mixing(module, layer)
            layers[layer]["source"][index] = -1 if mixing.source is None else mixing.source
            layers[layer]["own_scale"][index] = mixing.own_scale
            if mixing.source is not None and plan.num_devices > 1:
                layers[mixing.source]["pushed"][index] = 1
    return layers


def _device(plan: Plan, index: int) -> np.ndarray:
    share = plan.devices[index]
    record = np.zeros((), DEVICE)
    for position, name in enumerate(STAGES):
        stage = share.stages[name]
        width = plan.tile.padded_cols(stage.cols)
        record["stages"][position] = (stage.tile_words, stage.rows, width, stage.lanes, stage.tiles_per_lane)
    layout = exchange(plan, index)
    offsets = {name: channel.offset for name, channel in layout.channels.items()}
    record["channels"] = (
        layout.words,
        layout.layer_stride,
        offsets["qkv"],
        offsets["attention"],
        offsets["activation"],
        [offsets[f"residual_{module}"] for module in MODULES],
        [offsets[f"inbox_{module}"] for module in MODULES],
        *(offsets[name] for name in ("final_inbox", "final_sum", "summary", "logits", "choice")),
        layout.arrivals,
    )
    record["constants"] = tuple(constants_layout(plan)[name] for name in CONSTANTS.names or ())
    for name in ("lanes", "kv_heads", "neurons", "vocab"):
        record[name] = _span(getattr(share, name))
    return record


def _block(plan: Plan, share: DevicePlan, block: int) -> np.ndarray:
    record = np.zeros((), BLOCK)
    for name, length in zip(("layers", "head"), plan.tape_granules, strict=True):
        record[name] = plan.placement.first_granule(block, length) * plan.placement.granule_words
    for position, name in enumerate(STAGES):
        record["offsets"][position] = share.stages[name].offsets[block]
        record["shares"][position] = _span(share.stages[name].shares[block])
    record["hidden"] = _span(plan.hidden[block])
    record["attention"] = _span(share.attention[block])
    return record


def _span(span: Span) -> tuple[int, int]:
    return span.first, span.count
