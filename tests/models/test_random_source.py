"""Random checkpoints: the statistics of a fresh model, the same values each time."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from tiny import tiny

from jax_mono.config import ModelConfig
from jax_mono.models.random_source import RandomSource
from jax_mono.models.source import CheckpointError, WeightSource, flatten, read_params, tensor_shapes
from jax_mono.models.transformer import Transformer, params

BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.mark.parametrize(
    "config", [tiny("qwen3", num_layers=1, qkv_bias=True), tiny("laneformer", num_layers=1)], ids=lambda c: c.family
)
def test_statistics_are_those_of_a_fresh_model(config: ModelConfig) -> None:
    source = RandomSource(config)
    assert isinstance(source, WeightSource)
    drawn, fresh = dict(flatten(read_params(source))), dict(flatten(params(Transformer(config))))
    assert drawn.keys() == fresh.keys()
    for path, array in drawn.items():
        expected = np.asarray(fresh[path])
        assert (array.shape, array.dtype) == (expected.shape, np.float32)
        assert array.mean() == pytest.approx(expected.mean(), abs=0.02), path
        assert array.std() == pytest.approx(expected.std(), rel=0.1), path
    Transformer.from_params(config, read_params(source))


def test_values_depend_on_seed_and_path_only() -> None:
    config = tiny("llama")
    one, again, other = RandomSource(config, 1), RandomSource(config, 1), RandomSource(config, 2)
    path = "layers.1.attention.wq"
    again.tensor("embed")
    assert np.array_equal(one.tensor(path), again.tensor(path))
    assert not np.array_equal(one.tensor(path), other.tensor(path))
    assert not np.array_equal(one.tensor(path), one.tensor("layers.2.attention.wq"))
    assert np.array_equal(one.tensor(path, BF16), one.tensor(path).astype(BF16))


def test_large_tensors_have_no_repetitions() -> None:
    config = tiny("llama", vocab_size=40_000)  # more than two chunks
    values = RandomSource(config).tensor("embed")
    assert values.shape == tensor_shapes(config)["embed"]
    assert len(np.unique(values.reshape(-1)[:: 1 << 10])) > 2000
    assert values.std() == pytest.approx(64**-0.5, rel=0.01)
    assert not np.array_equal(values[: 1 << 14], values[1 << 14 : 1 << 15])


def test_dtypes_that_weights_cannot_have() -> None:
    with pytest.raises(CheckpointError, match="float32, bfloat16 or float16"):
        RandomSource(tiny("llama")).tensor("embed", np.float64)
