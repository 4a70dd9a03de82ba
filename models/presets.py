"""Configurations of published models, by name.

A checkpoint brings its own configuration, which counts. These serve plans, benchmarks and tests that need no
weights. Instruct variants differ from their base model in the tokens that end a generation.
"""

from __future__ import annotations

import difflib
from types import MappingProxyType

from jax_mono.config import ConfigError, Lanes, ModelConfig, RopeScaling


def _laneformer_2b() -> ModelConfig:
    layers, windowed_layers, window = 15, 10, 512
    return ModelConfig(
        family="laneformer",
        vocab_size=32000,
        hidden_size=3072,
        intermediate_size=12288,
        num_layers=layers,
        num_heads=32,
        num_kv_heads=16,
        head_dim=96,
        max_position_embeddings=4096,
        rope_interleaved=True,
        # Reports of the released window differ (512 and 2048); the checkpoint's own configuration decides.
        sliding_windows=(window,) * windowed_layers + (0,) * (layers - windowed_layers),
        bos_token_id=1,
        eos_token_ids=(2,),
        lanes=Lanes(count=8, delay=2),
    )


def _llama2_7b() -> ModelConfig:
    return ModelConfig(
        family="llama",
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_ids=(2,),
    )


def _llama3(hidden: int, ffn: int, layers: int, heads: int, head_dim: int, stretch: float, tied: bool) -> ModelConfig:
    return ModelConfig(
        family="llama",
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        rope_scaling=RopeScaling(kind="llama3", factor=stretch, original_max_position_embeddings=8192),
        tie_word_embeddings=tied,
        bos_token_id=128000,
        eos_token_ids=(128001,),
    )


def _qwen2(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, *, large: bool = False) -> ModelConfig:
    return ModelConfig(
        family="qwen2",
        vocab_size=152064 if large else 151936,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        max_position_embeddings=32768,
        norm_eps=1e-6,
        rope_theta=1000000.0,
        qkv_bias=True,
        tie_word_embeddings=not large,
        eos_token_ids=(151643,),
    )


def _qwen3(hidden: int, ffn: int, layers: int, heads: int, *, tied: bool = True) -> ModelConfig:
    return ModelConfig(
        family="qwen3",
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        norm_eps=1e-6,
        rope_theta=1000000.0,
        qk_norm=True,
        tie_word_embeddings=tied,
        eos_token_ids=(151645, 151643),
    )


def _smollm2(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, theta: float) -> ModelConfig:
    return ModelConfig(
        family="llama",
        vocab_size=49152,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=64,
        max_position_embeddings=8192,
        rope_theta=theta,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_ids=(0,),
    )


def _all() -> dict[str, ModelConfig]:
    presets = {"laneformer-2b": _laneformer_2b(), "llama-2-7b": _llama2_7b()}
    llama3 = {
        "llama-3.1-8b": _llama3(4096, 14336, 32, 32, 128, stretch=8.0, tied=False),
        "llama-3.2-1b": _llama3(2048, 8192, 16, 32, 64, stretch=32.0, tied=True),
        "llama-3.2-3b": _llama3(3072, 8192, 28, 24, 128, stretch=32.0, tied=True),
    }
    qwen2 = {
        "qwen2.5-coder-0.5b": _qwen2(896, 4864, 24, 14, 2),
        "qwen2.5-coder-1.5b": _qwen2(1536, 8960, 28, 12, 2),
        "qwen2.5-coder-3b": _qwen2(2048, 11008, 36, 16, 2),
        "qwen2.5-coder-7b": _qwen2(3584, 18944, 28, 28, 4, large=True),
    }
    qwen3 = {
        "qwen3-0.6b": _qwen3(1024, 3072, 28, 16),
        "qwen3-1.7b": _qwen3(2048, 6144, 28, 16),
        "qwen3-4b": _qwen3(2560, 9728, 36, 32),
        "qwen3-8b": _qwen3(4096, 12288, 36, 32, tied=False),
    }
    smollm2 = {
        "smollm2-135m": _smollm2(576, 1536, 30, 9, 3, 100000.0),
        "smollm2-360m": _smollm2(960, 2560, 32, 15, 5, 100000.0),
        "smollm2-1.7b": _smollm2(2048, 8192, 24, 32, 32, 130000.0),
    }
    # Qwen3 has one chat model per size, under the plain name.
    for family, bos, eos in (
        (llama3, 128000, (128001, 128008, 128009)),
        (qwen2, None, (151645, 151643)),
        (smollm2, 1, (2,)),
    ):
        for name, config in family.items():
            presets[name] = config
            presets[f"{name}-instruct"] = config.replace(bos_token_id=bos, eos_token_ids=eos)
    return presets | qwen3


PRESETS: MappingProxyType[str, ModelConfig] = MappingProxyType(_all())
"""Configurations by name."""


def preset(name: str) -> ModelConfig:
    """Looks up a configuration.

    Args:
        name: A key of ``PRESETS``; upper or lower case.

    Returns:
        The configuration.

    Raises:
        ConfigError: If there is none of that name; lists the closest ones.
    """
    config = PRESETS.get(name.lower())
    if config is None:
        close = difflib.get_close_matches(name.lower(), PRESETS, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(PRESETS)}"
        raise ConfigError(f"there is no preset {name!r}; {hint}")
    return config
