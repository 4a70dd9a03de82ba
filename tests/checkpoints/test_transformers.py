"""Checkpoints written by transformers: the layout is proved by equal logits, not by equal names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import random_params, tiny

from jax_mono.config import ModelConfig, RopeScaling
from jax_mono.models import Transformer
from jax_mono.models.hf import export_hf, load_hf

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_scaling": LLAMA3}),
    "llama-linear": (
        "Llama",
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "tie_word_embeddings": True},
    ),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-yarn": (
        "Qwen3",
        {
            "head_dim": 32,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        },
    ),
}
TOKENS = np.arange(3, 23) * 5 % 128


def torch_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS[None])).logits[0].float().numpy()


def our_logits(config: ModelConfig, params: Any) -> np.ndarray:
    logits, _ = Transformer.from_params(config, params)(TOKENS)
    return np.asarray(logits)


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_a_checkpoint_that_transformers_wrote(tmp_path: Path, name: str) -> None:
    family, changes = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        **{
            "vocab_size": 128,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "initializer_range": 0.2,
            **changes,
        }
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    model.save_pretrained(tmp_path)
    loaded_config, params = load_hf(tmp_path)
    expected = torch_logits(model)
    np.testing.assert_allclose(our_logits(loaded_config, params), expected, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    "config",
    [
        tiny("llama", rope_scaling=RopeScaling(kind="llama3", factor=8.0, original_max_position_embeddings=32)),
        tiny("qwen2", sliding_windows=(0, 8, 8)),
        tiny("qwen3", rope_scaling=RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=32)),
    ],
    ids=lambda config: config.family,
)
def test_transformers_reads_what_is_exported(tmp_path: Path, config: ModelConfig) -> None:
    params = random_params(config, dtype="bfloat16")
    export_hf(config, params, tmp_path / "model")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16
    expected = torch_logits(model.float().eval())
    _, loaded = load_hf(tmp_path / "model", "float32")
    np.testing.assert_allclose(our_logits(config, loaded), expected, atol=2e-4 * np.abs(expected).max())
