"""float16 weights: everything about them that needs no GPU. Programs for them exist on GPUs only."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from kernel.common import call_kernel, make_decoder, make_request, params_of, some_tokens
from tiny import tiny

from jax_mono import native
from jax_mono.call import Mode
from jax_mono.config import ConfigError, ModelConfig
from jax_mono.decode import empty_cache, prefill
from jax_mono.decoder import Decoder
from jax_mono.models.random_source import RandomSource
from jax_mono.models.rope import rope_table
from jax_mono.models.source import ArraySource, CheckpointError, convert
from jax_mono.models.transformer import KVCache, Transformer
from jax_mono.packing import pack
from jax_mono.plan import GPU, Plan, make_plan
from jax_mono.record import plan_record
from jax_mono.tape import STORAGE, Tapes, as_weights, storage
from jax_mono.unpacking import unpack_head, unpack_layer

FLOAT16 = np.dtype(np.float16)


def packed(config: ModelConfig, **cut: int) -> tuple[Plan, Tapes]:
    plan = make_plan(config, target=GPU, **cut)
    return plan, pack(plan, ArraySource(config, params_of(config, jnp.float16)), dtype=jnp.float16)


def test_storage() -> None:
    assert list(STORAGE) == ["float32", "bfloat16", "float16"]  # WeightType in ffi/host/variant.h
    assert storage(jnp.float16) == np.uint16
    weights = jnp.asarray([1.5, -0.0, 65504.0, 6e-8], jnp.float16)
    stored = as_weights(weights, storage(jnp.float16))
    assert stored.dtype == jnp.uint16
    np.testing.assert_array_equal(as_weights(stored, FLOAT16), weights)


def test_tapes_hold_every_bit() -> None:
    config = tiny("qwen2", num_layers=2)
    plan, tapes = packed(config, devices=2, blocks=3)
    assert tapes.dtype == FLOAT16 and tapes.layers.dtype == tapes.embed.dtype == jnp.uint16
    params = params_of(config, jnp.float16)
    np.testing.assert_array_equal(as_weights(tapes.embed, FLOAT16), params["embed"])
    share = plan.devices[0]
    found = unpack_layer(plan, share, tapes.layers[0], 1)
    gate = as_weights(found["feed_forward"]["w1"], FLOAT16)
    np.testing.assert_array_equal(gate[0], params["layers"][1]["feed_forward"]["w1"][0, : share.neurons.stop])
    head = as_weights(unpack_head(plan, share, tapes.head[0]), FLOAT16)
    np.testing.assert_array_equal(head, params["embed"][: share.vocab.stop])


@pytest.mark.parametrize(("family", "devices"), [("llama", 1), ("qwen2", 3), ("qwen3", 2), ("laneformer", 4)])
def test_prefill_fills_the_cache_of_the_flax_model(family: str, devices: int) -> None:
    config, length = tiny(family), 40
    plan, tapes = packed(config, devices=devices, blocks=2)
    text = jnp.asarray(some_tokens(length), jnp.int32)
    cache = empty_cache(plan, 64, jnp.float16)
    tokens = cache.tokens.at[:length].set(text)
    rope = jnp.asarray(rope_table(config, 64))
    k, v = prefill(plan, tapes, rope, cache, tokens, jnp.int32(length), 16, None)
    model = Transformer.from_params(config, params_of(config, jnp.float16))
    _, expected = model(text, KVCache.zeros(config, 64, jnp.float16), 0)
    for found, wanted in ((k, expected.k), (v, expected.v)):
        assert wanted.dtype == jnp.float16
        heads = [
            np.asarray(as_weights(found[index], FLOAT16), np.float32)[:, : share.kv_heads.count]
            for index, share in enumerate(plan.devices)
        ]
        np.testing.assert_allclose(
            np.concatenate(heads, axis=1)[:, :, :length],
            np.asarray(wanted, np.float32).reshape(config.num_layers, config.num_kv_heads, 64, -1)[:, :, :length],
            rtol=0, atol=2**-8,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_weights_are_rounded_or_refused(dtype: np.dtype) -> None:
    values = np.array([1.0, 1.0009765625, -65280.0, 1e-9, 0.1], np.float32).astype(dtype)
    found = convert(values, "float16")
    assert found.dtype == FLOAT16
    np.testing.assert_array_equal(found, values.astype(np.float32).astype(np.float16))
    with pytest.raises(
        CheckpointError, match=r"a weight of 70\d+ is beyond float16, which ends at 65504; use bfloat16"
    ):
        convert(np.array([1.0, -70000.0], np.float32).astype(dtype), "float16")
    # What was not finite before is not this function's business.
    assert np.isinf(convert(np.array([np.inf], np.float32).astype(dtype), "float16")).all()


def test_random_weights_are_the_rounded_ones() -> None:
    source = RandomSource(tiny("llama"), seed=3)
    for path in ("layers.1.attention.wq", "norm"):
        narrow = source.tensor(path, "float16")
        assert narrow.dtype == FLOAT16
        np.testing.assert_array_equal(narrow, source.tensor(path).astype(np.float16))


def test_the_cpu_refuses_them_before_it_reads_anything() -> None:
    config = tiny("llama")
    source = ArraySource(config, params_of(config))
    source.tensor = lambda *_: pytest.fail("a tensor was read")  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="float16 weights run on GPUs only; on the CPU use bfloat16 or float32"):
        Decoder.from_source(source, dtype=jnp.float16)


def test_the_program_on_the_cpu_refuses_them() -> None:
    decoder = make_decoder(tiny("llama", num_layers=1), dtype=jnp.float16)
    with pytest.raises(jax.errors.JaxRuntimeError, match="float16 weights run on GPUs only; on the CPU use bfloat16"):
        call_kernel(decoder, make_request(), mode=Mode.GENERATE, room=1)


def test_the_program_for_gpus_compiles() -> None:
    report = native.gpu_report("cuda")
    if report.compiler_error:
        pytest.skip(report.compiler_error)
    record = plan_record(make_plan(tiny("llama"), blocks=2, target=GPU))
    programs = [
        native.compile_program("cuda", record, weights, architecture="sm_90a", shared_memory=227 << 10)
        for weights in (1, 2)
    ]
    assert programs[0] != programs[1]
    with pytest.raises(native.NativeError, match="GPU kernels take bfloat16 and float16 weights, not float32"):
        native.compile_program("cuda", record, 0, architecture="sm_90a", shared_memory=227 << 10)
