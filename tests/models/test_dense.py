"""Llama, Qwen2 and Qwen3 compute what transformers computes, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from tiny import tiny

from jax_mono.config import ModelConfig, RopeScaling
from jax_mono.models.source import Params
from jax_mono.models.transformer import Transformer

TOKENS = 40
LLAMA3 = RopeScaling(kind="llama3", factor=8.0, original_max_position_embeddings=32)
YARN = RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=4.0, beta_slow=0.5)

CASES = {
    "llama": tiny("llama", num_layers=2),
    "llama-multi-head": tiny("llama", num_layers=2, num_kv_heads=4),
    "llama-multi-query-tied": tiny("llama", num_layers=2, num_kv_heads=1, tie_word_embeddings=True),
    "llama-wide-heads": tiny("llama", num_layers=2, head_dim=24),
    "llama-linear": tiny("llama", num_layers=2, rope_scaling=RopeScaling(kind="linear", factor=3.0)),
    "llama-llama3": tiny("llama", num_layers=2, rope_scaling=LLAMA3, head_dim=32),
    "llama-yarn": tiny("llama", num_layers=2, rope_scaling=YARN, head_dim=32),
    "qwen2": tiny("qwen2", num_layers=2),
    "qwen2-untied": tiny("qwen2", num_layers=2, tie_word_embeddings=False),
    "qwen2-yarn-attention-factor": tiny(
        "qwen2",
        num_layers=2,
        rope_scaling=RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=64, attention_factor=1.3),
    ),
    "qwen2-window": tiny("qwen2", num_layers=2, sliding_windows=(0, 7)),
    "qwen3": tiny("qwen3", num_layers=2),
    "qwen3-untied-grouped": tiny("qwen3", num_layers=2, tie_word_embeddings=False, num_heads=6),
    "qwen3-llama3": tiny("qwen3", num_layers=2, rope_scaling=LLAMA3),
}


def hf_model(config: ModelConfig, seed: int) -> transformers.PreTrainedModel:
    """The same architecture in transformers, with random norms and biases too."""
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": config.rope_theta}
    scaling = config.rope_scaling
    if scaling is not None:
        rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind != "linear":
            rope["original_max_position_embeddings"] = scaling.original_max_position_embeddings
        if scaling.kind == "llama3":
            rope |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
        if scaling.kind == "yarn":
            rope |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
            if scaling.attention_factor is not None:
                rope["attention_factor"] = scaling.attention_factor
    windows = [window for window in config.sliding_windows if window]
    options: dict[str, object] = {}
    if windows:
        options = {
            "use_sliding_window": True,
            "sliding_window": windows[0],
            "max_window_layers": config.num_layers - len(windows),
        }
    hf_config = {
        "llama": transformers.LlamaConfig,
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
    }[config.family](
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tie_word_embeddings,
        rope_parameters=rope,
        attn_implementation="eager",
        **options,
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(hf_config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.2)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.5)
            else:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    return model


def canonical(config: ModelConfig, model: transformers.PreTrainedModel) -> Params:
    """The canonical tree of a transformers model: matrices get a lane axis of length 1."""
    state = {name: jnp.asarray(value.numpy()) for name, value in model.state_dict().items()}

    def layer(n: int) -> Params:
        prefix = f"model.layers.{n}."
        attention = {f"w{x}": state[f"{prefix}self_attn.{x}_proj.weight"][None] for x in "qkvo"}
        if config.qkv_bias:
            attention |= {f"b{x}": state[f"{prefix}self_attn.{x}_proj.bias"][None] for x in "qkv"}
        if config.qk_norm:
            attention |= {f"{x}_norm": state[f"{prefix}self_attn.{x}_norm.weight"] for x in "qk"}
        mlp = {"w1": "gate", "w3": "up", "w2": "down"}
        return {
            "attention_norm": state[f"{prefix}input_layernorm.weight"],
            "attention": attention,
            "ffn_norm": state[f"{prefix}post_attention_layernorm.weight"],
            "feed_forward": {key: state[f"{prefix}mlp.{name}_proj.weight"][None] for key, name in mlp.items()},
        }

    tree = {
        "embed": state["model.embed_tokens.weight"],
        "layers": {n: layer(n) for n in range(config.num_layers)},
        "norm": state["model.norm.weight"],
    }
    return tree if config.tie_word_embeddings else tree | {"lm_head": state["lm_head.weight"]}


@nnx.jit
def run(model: Transformer, tokens: jax.Array) -> tuple[list[jax.Array], jax.Array]:
    streams, _ = model.residual_streams(tokens)
    return streams, model.head(streams[-1])


@pytest.mark.parametrize("name", CASES)
def test_logits_and_hidden_states_equal_transformers(name: str) -> None:
    config = CASES[name]
    reference = hf_model(config, seed=len(name))
    model = Transformer.from_params(config, canonical(config, reference))
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, TOKENS)
    with torch.no_grad():
        expected = reference(torch.from_numpy(tokens)[None], output_hidden_states=True, use_cache=False)

    streams, logits = run(model, jnp.asarray(tokens))

    expected_logits = expected.logits[0].numpy()
    assert 0.5 < expected_logits.std() < 10, "the random model must not be degenerate"
    np.testing.assert_allclose(logits, expected_logits, atol=1e-4)
    # transformers normalises its last hidden state in place of showing the residual stream.
    assert len(streams) == len(expected.hidden_states) == config.num_layers + 1
    for ours, theirs in zip(streams[:-1], expected.hidden_states[:-1], strict=True):
        np.testing.assert_allclose(ours[0], theirs[0].numpy(), atol=1e-4)
