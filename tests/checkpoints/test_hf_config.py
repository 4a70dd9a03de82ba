"""Hugging Face configurations: what is understood, what is ignored, what is refused, and the way back."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from tiny import tiny

from jax_mono.config import ConfigError, Lanes, ModelConfig, RopeScaling
from jax_mono.models import PRESETS, preset
from jax_mono.models.hf_config import from_hf_config, to_hf_config

LLAMA3 = RopeScaling(kind="llama3", factor=8.0, original_max_position_embeddings=64)
YARN = RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=32)

# As published with SmolLM2-135M-Instruct.
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 49152,
}

LANEFORMER = {
    "model_type": "laneformer",
    "vocab_size": 32000,
    "hidden_size": 3072,
    "intermediate_size": 12288,
    "num_hidden_layers": 15,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "norm_eps": 1e-5,
    "num_lanes": 8,
    "broadcast_delay": 2,
    "use_comm": True,
    "use_early_comm": True,
    "lm_head_type": "replicate",
    "pre_norm_lane_agg": False,
    "replicated_rmsn_scale": True,
    "tie_word_embeddings": False,
    "sliding_window": 512,
    "sliding_window_n_layers": 10,
    "eos_token_id": 2,
    "multiple_of": 32,
    "depth_init": True,
    "use_flex_attn": False,
    "attn_mask_type": "causal",
}


def raw(family: str, **changes: Any) -> dict[str, Any]:
    """A written configuration with some keys changed; None removes a key."""
    result = to_hf_config(tiny(family)) | changes
    return {key: value for key, value in result.items() if value is not None}


@pytest.mark.parametrize(
    "config",
    [
        *(tiny(family) for family in ("llama", "qwen2", "qwen3", "laneformer")),
        tiny("llama", bos_token_id=1, eos_token_ids=(2,), tie_word_embeddings=True, rope_scaling=LLAMA3),
        tiny("llama", eos_token_ids=(2, 5, 7), rope_scaling=RopeScaling(kind="linear", factor=2.5)),
        tiny("qwen2", sliding_windows=(0, 8, 8), rope_scaling=YARN),
        tiny("qwen3", sliding_windows=(8, 0, 8)),
        tiny("qwen3", sliding_windows=(8, 8, 8), rope_scaling=dataclasses.replace(YARN, attention_factor=1.5)),
        tiny("laneformer", sliding_windows=(7, 0, 7, 0, 0), rope_scaling=LLAMA3, rope_interleaved=False),
        *(
            tiny("laneformer", lanes=Lanes(count=8, delay=delay, head=head, own_scale=scale, **switches))
            for delay, head, scale, switches in [
                (0, "mean_of_norms", "one", {"attention_comm": False}),
                (1, "norm_of_sum", "sqrt_lanes", {"mlp_comm": False, "early_comm": False}),
                (3, "per_lane", "one", {"early_layers_broadcast": False}),
            ]
        ),
    ],
    ids=lambda config: config.family,
)
def test_what_is_written_reads_back_equal(config: ModelConfig) -> None:
    assert from_hf_config(to_hf_config(config, dtype="bfloat16")) == config


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_can_be_written(name: str) -> None:
    assert from_hf_config(to_hf_config(preset(name))) == preset(name)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (tiny("llama", qkv_bias=True), "qkv_bias"),
        (tiny("llama", sliding_windows=(8, 8, 8)), "sliding_windows"),
        (tiny("qwen3", qk_norm=False), "qk_norm"),
        (tiny("laneformer", qk_norm=True), "qk_norm"),
        (tiny("qwen2", rope_interleaved=True), "rope_interleaved"),
    ],
)
def test_what_the_format_cannot_express_is_refused(config: ModelConfig, field: str) -> None:
    with pytest.raises(ConfigError, match=f"cannot express {field}"):
        to_hf_config(config)


def test_windows_of_two_widths_cannot_be_written() -> None:
    with pytest.raises(ConfigError, match=r"one sliding window, this one has \[4, 8\]"):
        to_hf_config(tiny("qwen2", sliding_windows=(4, 8, 0)))


def test_published_llama() -> None:
    config = from_hf_config(SMOLLM2)
    assert config == preset("smollm2-135m-instruct")
    assert (config.head_dim, config.tie_word_embeddings, config.rope_theta) == (64, True, 100000.0)
    assert (config.bos_token_id, config.eos_token_ids, config.norm_eps) == (1, (2,), 1e-5)


def test_published_laneformer() -> None:
    config = from_hf_config(LANEFORMER)
    assert config.lanes == Lanes(count=8, delay=2)
    assert config.sliding_windows == (512,) * 10 + (0,) * 5
    assert config.rope_interleaved
    assert config.num_parameters == 2_320_069_632


@pytest.mark.parametrize(
    ("changes", "windowed"),
    [
        ({"sliding_window_n_layers": 2}, [0, 1]),
        ({"sliding_window_n_layers": -2}, [3, 4]),
        ({"sliding_window_n_layers": 0}, []),
        ({"sliding_window_n_layers": 5, "unclamped_layers": [1, 4]}, [0, 2, 3]),
        ({"swa_layers": [3, 0]}, [0, 3]),
        ({"swa_layers": [0, 1, 2], "unclamped_layers": [2], "sliding_window_n_layers": 2}, [0, 1]),
        ({"layer_types": ["sliding_attention"] + ["full_attention"] * 4}, [0]),
        ({"sliding_window": None, "sliding_window_n_layers": 0}, []),
    ],
)
def test_laneformer_windows(changes: dict[str, Any], windowed: list[int]) -> None:
    config = from_hf_config(raw("laneformer", **({"swa_layers": None, "sliding_window": 9} | changes)))
    assert config.sliding_windows == tuple(9 if layer in windowed else 0 for layer in range(5))


@pytest.mark.parametrize(
    ("changes", "lanes"),
    [
        ({"use_attention_comm": None, "use_mlp_comm": None}, {}),
        (
            {"use_attention_comm": None, "use_mlp_comm": None, "use_comm": False},
            {"attention_comm": False, "mlp_comm": False},
        ),
        ({"use_attention_comm": False}, {"attention_comm": False}),
        ({"use_early_comm": False, "own_scale": None}, {"early_comm": False}),
        ({"pre_norm_lane_agg": True}, {"head": "norm_of_sum"}),
        ({"lm_head_type": "vocab_parallel"}, {"head": "per_lane"}),
    ],
)
def test_laneformer_lanes(changes: dict[str, Any], lanes: dict[str, Any]) -> None:
    assert from_hf_config(raw("laneformer", **changes)).lanes == Lanes(count=8, delay=2, **lanes)


def test_laneformer_is_recognised_by_its_lanes() -> None:
    assert from_hf_config(raw("laneformer", model_type="kog")).family == "laneformer"
    assert from_hf_config(raw("laneformer", model_type="laneformer_tp")).family == "laneformer"


def test_qwen_windows_start_at_a_layer() -> None:
    changes = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    assert from_hf_config(raw("qwen2", **changes)).sliding_windows == (0, 8, 8)
    changes["use_sliding_window"] = False
    assert from_hf_config(raw("qwen2", **changes)).sliding_windows == (0, 0, 0)


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", "factor": 8, "low": 1}},
        {
            "rope_theta": 5e5,
            "rope_scaling": {"rope_type": "llama3", "type": "llama3", "factor": 8.0, "low": 1},
        },
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low": 1}},
        {
            "original_max_position_embeddings": 64,
            "rope_theta": 500000,
            "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
        },
    ],
)
def test_spellings_of_rotary_scaling(spelling: dict[str, Any]) -> None:
    changes = {"rope_theta": None, **spelling}
    for key in ("rope_scaling", "rope_parameters"):
        if key in changes:
            inner = changes[key] | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
            if inner.pop("low", None):
                inner["original_max_position_embeddings"] = 64
            changes[key] = inner
    config = from_hf_config(raw("llama", **changes))
    assert config.rope_scaling == LLAMA3
    assert config.rope_theta == 500000.0


def test_defaults_of_rotary_scaling() -> None:
    config = from_hf_config(raw("llama", rope_scaling={"type": "yarn", "factor": 4.0}))
    assert config.rope_scaling == dataclasses.replace(YARN, original_max_position_embeddings=128)
    assert from_hf_config(raw("llama", rope_scaling={"rope_type": "default"})).rope_scaling is None
    assert from_hf_config(raw("llama", rope_theta=None)).rope_theta == 10000.0


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"model_type": "mistral"}, "model_type 'mistral' is not supported; known: llama, qwen2"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported, only 'silu'"),
        ("llama", {"attention_bias": True}, "attention_bias True is not supported"),
        ("llama", {"pretraining_tp": 2}, "pretraining_tp 2 is not supported"),
        ("llama", {"sliding_window": 8}, "sliding_window 8 is not supported"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ("llama", {"hidden_size": None}, "the key 'hidden_size' is missing"),
        ("llama", {"hidden_size": "64"}, "hidden_size '64' is not an integer"),
        ("llama", {"rms_norm_eps": True}, "rms_norm_eps True is not a number"),
        ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings 1 is neither true nor false"),
        ("llama", {"eos_token_id": ["</s>"]}, r"eos_token_id \['</s>'\]"),
        (
            "llama",
            {"logit_scale": 2.0, "alibi": False},
            "unknown keys.*alibi = False, logit_scale = 2.0.*ignore",
        ),
        ("llama", {"quantization_config": {"bits": 4}}, "unknown keys.*quantization_config"),
        (
            "llama",
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_type 'dynamic' is not supported",
        ),
        ("llama", {"rope_scaling": {"rope_type": "longrope"}}, "rope_type 'longrope' is not supported"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "rope_scaling: the key 'factor' is missing"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 1.0}}, "unknown keys.*mscale"),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "rope_type": "yarn"}},
            "type is 'linear' but rope_type",
        ),
        ("llama", {"rope_scaling": "linear"}, "rope_scaling 'linear' is not an object"),
        ("llama", {"rope_parameters": {"rope_theta": 5.0}}, "rope_theta is given more than once and differs"),
        ("llama", {"head_dim": None, "num_attention_heads": 6}, "does not divide hidden_size 64"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "layer_types windows layers"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "layer_types 'chunked_attention'"),
        ("qwen2", {"num_key_value_heads": None}, "'num_key_value_heads' is missing"),
        ("qwen2", {"use_mrope": True}, "use_mrope True is not supported"),
        ("laneformer", {"replicated_rmsn_scale": False}, "replicated_rmsn_scale False is not supported"),
        ("laneformer", {"lm_head_type": "lane"}, "lm_head_type 'lane' is not supported; known: replicate"),
        (
            "laneformer",
            {"lm_head_type": "vocab_parallel", "pre_norm_lane_agg": True},
            "pre_norm_lane_agg needs",
        ),
        ("laneformer", {"use_comm": False}, "use_comm is False but use_attention_comm is True"),
        ("laneformer", {"swa_layers": [5]}, "names layer 5; the model has layers 0 to 4"),
        (
            "laneformer",
            {"sliding_window": None},
            r"layers \[0, 1, 2\] are windowed but sliding_window is not set",
        ),
        ("laneformer", {"swa_layers": None}, "no key says which layers it applies to"),
        ("laneformer", {"sliding_window_n_layers": 1}, "window different layers"),
        ("laneformer", {"broadcast_delay": None}, "'broadcast_delay' is missing"),
        ("laneformer", {"attn_mask_type": "none"}, "attn_mask_type 'none' is not supported"),
        ("laneformer", {"num_lanes": 3}, "must be a multiple of the 3 lanes"),
    ],
)
def test_refusals_name_the_key(family: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_hf_config(raw(family, **changes))


def test_unknown_keys_can_be_ignored_on_request() -> None:
    assert from_hf_config(raw("llama", alibi=False), ignore_keys=["alibi"]) == tiny("llama")
