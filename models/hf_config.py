"""``config.json`` of Hugging Face checkpoints to ``ModelConfig`` and back.

Reading is strict. A key either changes what is computed and is understood here, or is known not to change it
and is listed here, or is refused by name: a checkpoint never runs with half of its configuration ignored.

Laneformer keys, where the published files leave room:

* ``sliding_window_n_layers`` = n > 0 windows the first n layers, n < 0 the last -n layers. ``swa_layers``
  lists the windowed layers and ``layer_types`` names each layer's kind; where several of these keys are
  present they must agree. Layers in ``unclamped_layers`` attend to everything whatever the other keys say.
* ``lm_head_type`` is ``replicate`` (norm of every lane, then mean; with ``pre_norm_lane_agg`` sum, then norm)
  or ``vocab_parallel`` (every lane has its slice of the vocabulary).
* ``own_scale`` (``sqrt_lanes`` or ``one``), ``early_layers_broadcast`` and ``rope_interleaved`` are names of
  this project for choices that published files do not spell out; absent, they mean sqrt_lanes, true and true.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from jax_mono.config import ConfigError, Lanes, ModelConfig
from jax_mono.models.hf_rope import parse_rope, rope_to_hf
from jax_mono.models.keys import Keys

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "laneformer": "LaneformerForCausalLM",
}

# Keys that do not change what a forward pass computes from token ids.
IGNORED = frozenset(
    [
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "attn_implementation",
        "auto_map",
        "chunk_size_feed_forward",
        "depth_init",
        "dtype",
        "embd_pdrop",
        "hidden_dropout",
        "initializer_range",
        "is_llama_config",
        "keys_to_ignore_at_inference",
        "model_type",
        "multiple_of",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "resid_pdrop",
        "return_dict",
        "torch_dtype",
        "transformers.js_config",
        "transformers_version",
        "unk_token_id",
        "unsloth_fixed",
        "unsloth_version",
        "use_cache",
        "use_flex_attn",
    ]
)


def from_hf_config(
    raw: Mapping[str, Any], *, ignore_keys: Collection[str] = (), where: str = "config.json"
) -> ModelConfig:
    """Reads a Hugging Face configuration.

    Args:
        raw: The parsed ``config.json``.
        ignore_keys: Keys that would be refused as unknown and that the caller knows to be harmless.
        where: Name of the file, for messages.

    Returns:
        The model's configuration.

    Raises:
        ConfigError: If a key is missing, unknown or has a value that is not supported.
    """
    keys = Keys(raw, where)
    keys.skip(IGNORED)
    keys.skip(ignore_keys)
    family = _family(raw, where)
    config = _laneformer(keys) if family == "laneformer" else _dense(keys, family)
    keys.finish()
    return config


def to_hf_config(config: ModelConfig, *, dtype: str | None = None) -> dict[str, Any]:
    """Writes a Hugging Face configuration.

    Args:
        config: The model.
        dtype: Name of the dtype of the weights, for the key ``torch_dtype``.

    Returns:
        A dictionary for ``config.json`` with ``from_hf_config(to_hf_config(config)) == config``.

    Raises:
        ConfigError: If the family's Hugging Face format cannot express the configuration.
    """
    raw: dict[str, Any] = {
        "architectures": [ARCHITECTURES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": _eos_to_hf(config.eos_token_ids),
    }
    raw |= rope_to_hf(config)
    if dtype is not None:
        raw["torch_dtype"] = dtype
    raw |= _lanes_to_hf(config) if config.lanes is not None else _dense_to_hf(config)

    read_back = from_hf_config(raw)
    differing = [name for name in vars(config) if getattr(config, name) != getattr(read_back, name)]
    if differing:
        raise ConfigError(
            f"a Hugging Face {config.family} configuration cannot express {', '.join(differing)} "
            f"(here {', '.join(repr(getattr(config, name)) for name in differing)}); use Orbax instead"
        )
    return raw


def _family(raw: Mapping[str, Any], where: str) -> str:
    model_type = raw.get("model_type")
    if "num_lanes" in raw or (isinstance(model_type, str) and "laneformer" in model_type.lower()):
        return "laneformer"
    if model_type not in ARCHITECTURES:
        raise ConfigError(f"{where}: model_type {model_type!r} is not supported; known: {', '.join(ARCHITECTURES)}")
    return model_type


def _common(keys: Keys) -> dict[str, Any]:
    """Reads the fields that all families spell alike, except head counts."""
    keys.neutral("hidden_act", "silu")
    keys.neutral("pretraining_tp", 1)
    keys.neutral("attention_bias", False)
    keys.neutral("mlp_bias", False)
    keys.neutral("partial_rotary_factor", 1.0)
    keys.neutral("use_mrope", False)
    max_positions = keys.integer("max_position_embeddings")
    theta, scaling = parse_rope(keys, max_positions)
    return {
        "vocab_size": keys.integer("vocab_size"),
        "hidden_size": keys.integer("hidden_size"),
        "intermediate_size": keys.integer("intermediate_size"),
        "num_layers": keys.integer("num_hidden_layers"),
        "num_heads": keys.integer("num_attention_heads"),
        "max_position_embeddings": max_positions,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": keys.boolean("tie_word_embeddings", False),
        "bos_token_id": keys.integer("bos_token_id", None),
        "eos_token_ids": _eos(keys),
    }


def _eos(keys: Keys) -> tuple[int, ...]:
    value = keys.take("eos_token_id", None)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        keys.check(isinstance(token, int) and not isinstance(token, bool), "eos_token_id", value)
    return tuple(ids)


def _eos_to_hf(ids: tuple[int, ...]) -> int | list[int] | None:
    if not ids:
        return None
    return ids[0] if len(ids) == 1 else list(ids)


def _head_dim(keys: Keys, fields: Mapping[str, Any], absent: int | None = None) -> int:
    """Reads head_dim; absent, it is the hidden size split over the heads unless the family says otherwise."""
    head_dim = keys.integer("head_dim", absent)
    if head_dim is not None:
        return head_dim
    hidden, heads = fields["hidden_size"], fields["num_heads"]
    keys.check(
        heads > 0 and hidden % heads == 0,
        "num_attention_heads",
        heads,
        f"does not divide hidden_size {hidden}",
    )
    return hidden // heads


def _layer_types(keys: Keys, layers: int) -> list[int] | None:
    """Reads ``layer_types`` as the list of windowed layers; None where the key is absent."""
    types = keys.take("layer_types", None)
    if types is None:
        return None
    keys.check(isinstance(types, list) and len(types) == layers, "layer_types", types, f"is not a list of {layers}")
    for kind in types:
        keys.check(kind in ("full_attention", "sliding_attention"), "layer_types", kind)
    return [layer for layer, kind in enumerate(types) if kind == "sliding_attention"]


def _windows(keys: Keys, layers: int, windowed: Collection[int], window: int | None) -> tuple[int, ...]:
    if not windowed:
        return (0,) * layers
    if window is None:
        raise ConfigError(f"{keys.where}: layers {sorted(windowed)} are windowed but sliding_window is not set")
    keys.check(window >= 1, "sliding_window", window, "must be at least 1")
    return tuple(window if layer in windowed else 0 for layer in range(layers))


def _dense(keys: Keys, family: str) -> ModelConfig:
    fields = _common(keys)
    layers = fields["num_layers"]
    keys.neutral("rope_interleaved", False)
    typed = _layer_types(keys, layers)
    if family == "llama":
        kv_heads = keys.integer("num_key_value_heads", fields["num_heads"])
        keys.neutral("sliding_window", None)
        windowed: list[int] = []
        window = None
    else:
        kv_heads = keys.integer("num_key_value_heads")
        windowed, window = _qwen_windows(keys, layers, typed)
    if typed is not None and typed != windowed:
        raise ConfigError(f"{keys.where}: layer_types windows layers {typed}, the other keys window {windowed}")
    return ModelConfig(
        family=family,  # type: ignore[arg-type]  # checked by _family
        num_kv_heads=kv_heads,
        head_dim=_head_dim(keys, fields, 128 if family == "qwen3" else None),
        norm_eps=keys.number("rms_norm_eps", 1e-6),
        sliding_windows=_windows(keys, layers, windowed, window),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        **fields,
    )


def _qwen_windows(keys: Keys, layers: int, typed: list[int] | None) -> tuple[list[int], int | None]:
    """Says which layers are windowed: from ``max_window_layers`` on, unless ``layer_types`` lists them."""
    enabled = keys.boolean("use_sliding_window", False)
    window = keys.integer("sliding_window", None)
    first = keys.integer("max_window_layers", 28)
    if not enabled or window is None:
        return [], None
    return (list(range(min(first, layers), layers)) if typed is None else typed), window


def _dense_to_hf(config: ModelConfig) -> dict[str, Any]:
    raw: dict[str, Any] = {"rms_norm_eps": config.norm_eps}
    if config.family == "llama":
        return raw | {"attention_bias": False, "mlp_bias": False}
    window, windowed = _one_window(config)
    raw |= {
        "use_sliding_window": bool(windowed),
        "sliding_window": window,
        "max_window_layers": config.num_layers,
    }
    if windowed:
        kinds = ["sliding_attention" if layer in windowed else "full_attention" for layer in range(config.num_layers)]
        raw |= {"layer_types": kinds, "max_window_layers": min(windowed)}
    return raw


def _one_window(config: ModelConfig) -> tuple[int | None, list[int]]:
    """Returns the one window width that Hugging Face keys can express, and the layers that have it."""
    widths = sorted(set(config.sliding_windows) - {0})
    if len(widths) > 1:
        raise ConfigError(f"a Hugging Face configuration has one sliding window, this one has {widths}")
    windowed = [layer for layer, width in enumerate(config.sliding_windows) if width]
    return (widths[0] if widths else None), windowed


def _laneformer(keys: Keys) -> ModelConfig:
    fields = _common(keys)
    keys.one_of("attn_mask_type", "causal", ("causal", "block_causal"))  # one sequence is one block
    keys.neutral("replicated_rmsn_scale", True)
    return ModelConfig(
        family="laneformer",
        num_kv_heads=keys.integer("num_key_value_heads", fields["num_heads"]),
        head_dim=_head_dim(keys, fields),
        norm_eps=keys.number("norm_eps", 1e-5),
        rope_interleaved=keys.boolean("rope_interleaved", True),
        sliding_windows=_lane_windows(keys, fields["num_layers"]),
        lanes=_lanes(keys),
        **fields,
    )


def _lanes(keys: Keys) -> Lanes:
    delay = keys.integer("broadcast_delay")
    both = keys.boolean("use_comm", None)
    comm = {name: keys.boolean(f"use_{name}_comm", None) for name in ("attention", "mlp")}
    for name, value in comm.items():
        if both is not None and value is not None and value != both:
            raise ConfigError(f"{keys.where}: use_comm is {both} but use_{name}_comm is {value}; remove one of them")
    absent = True if both is None else both

    head_type = keys.one_of("lm_head_type", "replicate", ("replicate", "vocab_parallel"))
    sum_first = keys.boolean("pre_norm_lane_agg", False)
    if sum_first and head_type != "replicate":
        raise ConfigError(f"{keys.where}: pre_norm_lane_agg needs lm_head_type 'replicate', not {head_type!r}")
    return Lanes(
        count=keys.integer("num_lanes"),
        delay=delay,
        attention_comm=absent if comm["attention"] is None else comm["attention"],
        mlp_comm=absent if comm["mlp"] is None else comm["mlp"],
        early_comm=keys.boolean("use_early_comm", True),
        early_layers_broadcast=keys.boolean("early_layers_broadcast", True),
        own_scale=keys.one_of("own_scale", "sqrt_lanes", ("sqrt_lanes", "one")),  # type: ignore[arg-type]
        head="per_lane" if head_type == "vocab_parallel" else "norm_of_sum" if sum_first else "mean_of_norms",
    )


def _lane_windows(keys: Keys, layers: int) -> tuple[int, ...]:
    window = keys.integer("sliding_window", None)
    count = keys.integer("sliding_window_n_layers", None)
    listed = keys.layers("swa_layers", layers)
    unclamped = keys.layers("unclamped_layers", layers) or []
    typed = _layer_types(keys, layers)
    counted = None if count is None else list(range(layers))[:count] if count >= 0 else list(range(layers))[count:]

    spellings = {"sliding_window_n_layers": counted, "swa_layers": listed, "layer_types": typed}
    given = {name: sorted(set(value) - set(unclamped)) for name, value in spellings.items() if value is not None}
    if any(value != next(iter(given.values())) for value in given.values()):
        raise ConfigError(
            f"{keys.where}: these keys window different layers, keep the right one: "
            + ", ".join(f"{name} {value}" for name, value in given.items())
        )
    if window is not None and not given:
        raise ConfigError(
            f"{keys.where}: sliding_window is {window} but no key says which layers it applies to; "
            "add swa_layers, a list of layer numbers"
        )
    return _windows(keys, layers, next(iter(given.values()), []), window)


def _lanes_to_hf(config: ModelConfig) -> dict[str, Any]:
    lanes = config.lanes
    assert lanes is not None
    window, windowed = _one_window(config)
    return {
        "norm_eps": config.norm_eps,
        "rope_interleaved": config.rope_interleaved,
        "num_lanes": lanes.count,
        "broadcast_delay": lanes.delay,
        "use_attention_comm": lanes.attention_comm,
        "use_mlp_comm": lanes.mlp_comm,
        "use_early_comm": lanes.early_comm,
        "early_layers_broadcast": lanes.early_layers_broadcast,
        "own_scale": lanes.own_scale,
        "lm_head_type": "vocab_parallel" if lanes.head == "per_lane" else "replicate",
        "pre_norm_lane_agg": lanes.head == "norm_of_sum",
        "replicated_rmsn_scale": True,
        "sliding_window": window,
        "swa_layers": windowed,
    }
