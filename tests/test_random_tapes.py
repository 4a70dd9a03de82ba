"""Random tapes are like packed ones: real weights where packing puts them, zeros where it pads."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel.common import make_mesh
from tiny import random_params, tiny

from jax_mono.decoder import Decoder
from jax_mono.models.source import ArraySource
from jax_mono.noise import noise
from jax_mono.packing import pack
from jax_mono.plan import CPU, GPU, make_plan
from jax_mono.random_tapes import random_tapes
from jax_mono.tape import as_weights


@pytest.mark.parametrize(
    ("family", "changes", "devices", "blocks"),
    [
        ("llama", {}, 1, 3),
        ("llama", {"hidden_size": 52, "intermediate_size": 90, "vocab_size": 117, "num_kv_heads": 4}, 3, 2),
        ("laneformer", {"hidden_size": 72, "intermediate_size": 8 * 13}, 2, 3),
        ("qwen2", {"vocab_size": 100}, 2, 2),
    ],
)
def test_weights_are_where_packing_puts_them(family: str, changes: dict, devices: int, blocks: int) -> None:
    config = tiny(family, **changes)
    plan = make_plan(config, devices=devices, blocks=blocks, target=GPU)
    ones = jax.tree.map(jnp.ones_like, random_params(config))
    packed = pack(plan, ArraySource(config, ones), dtype=jnp.float32)
    made = random_tapes(plan, dtype=jnp.float32)
    for name in ("layers", "head", "embed"):
        one, other = np.asarray(getattr(packed, name)), np.asarray(getattr(made, name))
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one != 0, other != 0)
    assert made.constants.shape == packed.constants.shape
    if config.qkv_bias:
        assert 0 < np.count_nonzero(made.constants) < np.count_nonzero(packed.constants)  # norms, no biases


def test_statistics_are_those_of_a_fresh_model() -> None:
    config = tiny("laneformer", hidden_size=256, intermediate_size=512)
    plan = make_plan(config)
    tapes = random_tapes(plan, dtype=jnp.float32)
    stages = plan.devices[0].stages
    fan_in = {"qkv": 256, "o": config.num_heads * config.head_dim, "up": 256, "down": 512}
    for name, width in fan_in.items():
        words = stages[name].tiles * stages[name].tile_words
        part = np.asarray(tapes.layers[0, 0, :, stages[name].offsets[0] :][:, :words])
        part = part[part != 0].reshape(len(part), -1)
        assert part.std() == pytest.approx(width**-0.5, rel=0.02)
        assert abs(part.mean()) < 0.02 * part.std()
        assert abs(np.corrcoef(part[0], part[1])[0, 1]) < 0.02  # layers differ
        assert abs(np.corrcoef(part[0, 1:], part[0, :-1])[0, 1]) < 0.02
    assert np.asarray(tapes.embed).std() == pytest.approx(256**-0.5, rel=0.02)


def test_seeds_and_dtypes() -> None:
    plan = make_plan(tiny("llama"), blocks=2, target=CPU)
    exact, again, other = (random_tapes(plan, dtype=jnp.float32, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(exact.layers, again.layers)
    assert not np.array_equal(exact.layers, other.layers)
    assert not np.array_equal(np.asarray(exact.layers).ravel()[:64], np.asarray(exact.head).ravel()[:64])
    narrow = random_tapes(plan, dtype=jnp.bfloat16, seed=1)
    np.testing.assert_array_equal(as_weights(narrow.layers, jnp.bfloat16), exact.layers.astype(jnp.bfloat16))


def test_noise_is_never_zero() -> None:
    values = np.asarray(noise((3, 1 << 18), 5))
    assert np.count_nonzero(values) == values.size
    assert values.std() == pytest.approx(1.0, rel=1e-2) and abs(values).max() <= 3**0.5
    assert abs(np.corrcoef(values)[0, 1]) < 0.01


@pytest.mark.parametrize("form", ["threads", "mesh"])
def test_decoding_is_finite_and_not_degenerate(form: str) -> None:
    plan = make_plan(tiny("laneformer"), devices=2, blocks=2)
    mesh = make_mesh(2) if form == "mesh" else None
    decoder = Decoder(plan, random_tapes(plan, dtype=jnp.float32, mesh=mesh), mesh=mesh)
    output = decoder.generate([1, 2, 3], max_new_tokens=40, stop=[])
    assert np.isfinite(output.logprobs).all() and len(set(output.tokens)) > 5
    expected = np.asarray(random_tapes(plan, dtype=jnp.float32).layers)
    np.testing.assert_array_equal(decoder.tapes.layers, expected)
