"""Compressed tapes hold every bit of the weights, and say so when they cannot."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from kernel.common import params_of
from tiny import COMPRESSIBLE, tiny

from jax_mono import native
from jax_mono.compression import EXCEPTIONS, _expand, compress, expand
from jax_mono.config import ConfigError
from jax_mono.models.source import ArraySource
from jax_mono.packing import IncompressibleError, pack
from jax_mono.plan import GPU, make_plan
from jax_mono.tile import TileFormat
from jax_mono.unpacking import unpack_head, unpack_layer

TILE = TileFormat(compressed=True)
_compress = jax.jit(functools.partial(compress, TILE), static_argnums=1)


def expanded(words: jax.Array, cols: int, rows: slice = slice(None)) -> np.ndarray:
    """Rows of parts, by the native library; XLA's code, which GPUs run, gives the same."""
    found = np.asarray(expand(TILE, words, cols, rows))
    np.testing.assert_array_equal(jax.jit(functools.partial(_expand, TILE, cols, rows))(words), found)
    return found


def bits(values: np.ndarray) -> np.ndarray:
    """Bit patterns of values as bfloat16."""
    return np.array(jnp.asarray(values, jnp.bfloat16)).view(np.uint16)


def round_trip(weights: np.ndarray) -> tuple[np.ndarray, int]:
    """What comes back of [parts, chunks, 8, 32], and how much was spoiled."""
    cols = weights.shape[1] * 32
    words, spoiled = _compress(weights, cols)
    assert words.shape == (len(weights), TILE.part_words(cols))
    found = expanded(words, cols).reshape(len(weights), 8, -1, 32).swapaxes(1, 2)
    return found, int(spoiled)


@pytest.mark.parametrize(("cols", "piece"), [(128, 4), (384, 12), (512, 16), (896, 4), (1536, 16), (3072, 16)])
def test_every_bit_comes_back(cols: int, piece: int) -> None:
    assert TILE.piece_chunks(cols) == piece
    weights = bits(np.random.default_rng(cols).normal(size=(40, cols // 32, 8, 32)) * 0.02)
    found, spoiled = round_trip(weights)
    assert spoiled == 0
    np.testing.assert_array_equal(found, weights)


@pytest.mark.parametrize("rows", [slice(0, 4), slice(4, 8), slice(3, 5)])
def test_some_rows(rows: slice) -> None:
    weights = np.random.default_rng(1).normal(size=(3, 24, 8, 32)) * 0.02
    weights[:, 7, ::2, 5] = 3.0  # exceptions in every other row
    words, _ = _compress(bits(weights), 768)
    expected = bits(weights).swapaxes(1, 2).reshape(3, 8, 768)[:, rows]
    np.testing.assert_array_equal(expanded(words, 768, rows), expected)


def test_many_parts_are_shared_among_threads() -> None:
    weights = bits(np.random.default_rng(2).normal(size=(2, 900, 16, 8, 32)))
    words = jnp.stack([_compress(some, 512)[0] for some in weights])
    found = jax.vmap(lambda some: expand(TILE, some, 512))(words)  # as for several devices of a plan
    np.testing.assert_array_equal(found, weights.swapaxes(2, 3).reshape(2, 900, 8, 512))


def test_the_call_refuses_what_is_no_compressed_part() -> None:
    native.register()
    call = jax.ffi.ffi_call(native.EXPAND_TARGET, jax.ShapeDtypeStruct((2, 8, 512), jnp.uint16))
    with pytest.raises(jax.errors.JaxRuntimeError, match="compressed parts of 100 words do not hold 512 columns"):
        jax.block_until_ready(call(jnp.zeros((2, 100), jnp.uint16), length=np.int32(16), first=np.int32(0)))
    with pytest.raises(jax.errors.JaxRuntimeError, match="pieces of 5 chunks"):
        jax.block_until_ready(call(jnp.zeros((2, 3104), jnp.uint16), length=np.int32(5), first=np.int32(0)))
    with pytest.raises(jax.errors.JaxRuntimeError, match="uint16"):
        jax.block_until_ready(call(jnp.zeros((2, 3104), jnp.int16), length=np.int32(16), first=np.int32(0)))


def test_rows_have_exponents_of_their_own() -> None:
    """As rows of tokens that were never trained have: none of their weights is an exception."""
    weights = np.random.default_rng(3).normal(size=(4, 16, 8, 32)) * 10.0 ** -np.arange(0, 32, 4)[:, None]
    words, spoiled = _compress(bits(weights), 512)
    assert spoiled == 0
    entries = np.asarray(words).reshape(4, -1)[:, : 2 * EXCEPTIONS].view(np.uint32)
    assert np.count_nonzero(entries) < 8  # of 16,384 normal numbers some are tiny
    np.testing.assert_array_equal(round_trip(bits(weights))[0], bits(weights))


def test_it_is_a_quarter_less() -> None:
    assert TILE.part_words(3072) / TileFormat().part_words(3072) < 0.76


def test_exceptions_zeros_and_outliers() -> None:
    weights = np.random.default_rng(0).normal(size=(6, 16, 8, 32)) * 0.02
    weights[0, 3, 5, :4] = [3.0, -3.0, 1e-9, -1e-39]  # the last one subnormal
    weights[1] = 0
    weights[2, 0, 0, 0] = -0.0
    weights[3] = 1e-39
    weights[3, 8:] = 0
    weights[3, :8, 1:] = 0
    weights[3, :8, 0, 1:] = 0
    weights[4] *= 1e-30
    weights[5] = 0.02
    weights[5, -1, -1, -EXCEPTIONS:] = 1e-20
    found, spoiled = round_trip(bits(weights))
    assert spoiled == 0
    np.testing.assert_array_equal(found, bits(weights))


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 1e30])
def test_what_cannot_be_compressed_is_counted(value: float) -> None:
    weights = bits(np.full((3, 16, 8, 32), 0.1))
    weights[1] = bits(np.full((16, 8, 32), value))
    assert round_trip(weights)[1] == 1


def test_too_many_exceptions_are_counted() -> None:
    weights = np.full((2, 16, 8, 32), 0.1)
    weights[0, 0, 0, :EXCEPTIONS] = 1e-9
    weights[1, 0, 0, : EXCEPTIONS + 1] = 1e-9
    found, spoiled = round_trip(bits(weights))
    assert spoiled == 1
    np.testing.assert_array_equal(found[0], bits(weights[0]))


@settings(deadline=None, max_examples=50)
@given(arrays(np.uint16, (1, 4, 8, 32), elements=st.integers(0, 0xFFFF), fill=st.just(0x3D00)))
def test_whatever_the_weights_are_they_come_back_or_are_counted(weights: np.ndarray) -> None:
    found, spoiled = round_trip(weights)
    if spoiled == 0:
        np.testing.assert_array_equal(found, weights)


@pytest.mark.parametrize(("family", "devices", "blocks"), [("laneformer", 2, 3), ("llama", 1, 5), ("qwen2", 2, 2)])
def test_matrices_come_back_from_tapes(family: str, devices: int, blocks: int) -> None:
    config = tiny(family, **COMPRESSIBLE)
    source = ArraySource(config, params_of(config, jnp.bfloat16))
    cut = {"devices": devices, "blocks": blocks, "target": GPU}
    plain, packed = make_plan(config, **cut), make_plan(config, **cut, tile=TILE)
    expected, found = pack(plain, source), pack(packed, source)
    assert found.layers.nbytes < 0.8 * expected.layers.nbytes
    for index, (share, other) in enumerate(zip(plain.devices, packed.devices, strict=True)):
        for layer in (0, config.num_layers - 1):
            jax.tree.map(
                np.testing.assert_array_equal,
                unpack_layer(packed, other, found.layers[index], layer),
                unpack_layer(plain, share, expected.layers[index], layer),
            )
        head = unpack_head(packed, other, found.head[index])
        np.testing.assert_array_equal(head, unpack_head(plain, share, expected.head[index]))


def test_packing_refuses_what_it_cannot_keep() -> None:
    config = tiny("llama", **COMPRESSIBLE)
    params = jax.tree.map(lambda leaf: leaf.at[..., :2].set(1e-12), params_of(config, jnp.bfloat16))
    with pytest.raises(IncompressibleError, match="compress=False"):
        pack(make_plan(config, tile=TILE), ArraySource(config, params))


def test_plans_refuse_widths_that_have_no_groups() -> None:
    with pytest.raises(ConfigError, match="multiple of 128 columns"):
        make_plan(tiny("llama"), tile=TILE)
    with pytest.raises(ConfigError, match="8 x 32"):
        TileFormat(rows=16, compressed=True)
