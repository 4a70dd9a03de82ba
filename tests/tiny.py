"""Small models of every family for tests."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jax_mono.config import Lanes, ModelConfig
from jax_mono.models.source import Params
from jax_mono.models.transformer import abstract_params

_COMMON: dict[str, object] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
COMPRESSIBLE = {"hidden_size": 384, "num_heads": 16, "num_kv_heads": 8, "head_dim": 64, "intermediate_size": 1024}
"""Sizes of a model whose tapes can be compressed, on 1, 2, 4 or 8 devices."""

_FAMILIES: dict[str, dict[str, object]] = {
    "llama": {},
    "qwen2": {"qkv_bias": True, "tie_word_embeddings": True, "norm_eps": 1e-6, "rope_theta": 1e6},
    "qwen3": {
        "qk_norm": True,
        "tie_word_embeddings": True,
        "norm_eps": 1e-6,
        "rope_theta": 1e6,
        "head_dim": 32,
    },
    "laneformer": {
        "num_layers": 5,
        "num_heads": 16,
        "num_kv_heads": 8,
        "head_dim": 8,
        "rope_interleaved": True,
        "sliding_windows": (5, 5, 5, 0, 0),
        "lanes": Lanes(count=8, delay=2),
    },
}


def tiny(family: str, **overrides: object) -> ModelConfig:
    """A configuration of about 100,000 parameters; generation never ends by itself (no end-of-text token).

    Args:
        family: ``llama``, ``qwen2``, ``qwen3`` or ``laneformer`` (8 lanes; its sizes allow 1, 2, 4 and 8).
        **overrides: Fields of ``ModelConfig``. Another ``num_layers`` also shortens or extends the windows.
    """
    fields = _COMMON | _FAMILIES[family] | overrides
    windows = fields.get("sliding_windows", ())
    if windows and "sliding_windows" not in overrides:
        fields["sliding_windows"] = (windows + (0,) * fields["num_layers"])[: fields["num_layers"]]
    return ModelConfig(family=family, **fields)


def random_params(config: ModelConfig, seed: int = 0, dtype: DTypeLike = jnp.float32) -> Params:
    """Random parameters in which nothing is trivial: norms differ from one and biases from zero.

    Args:
        config: The model.
        seed: Same seed, same values, up to rounding to ``dtype``.
        dtype: float32 or bfloat16.
    """
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = path[-1].key
        values = rng.standard_normal(leaf.shape)
        if "norm" in name:
            values = 1.0 + 0.2 * values
        elif name.startswith("b"):
            values = 0.5 * values
        else:
            values /= np.sqrt(leaf.shape[-1] * (leaf.shape[0] if name in ("wo", "w2") else 1))
        return jnp.asarray(values, dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(config))
