"""The resident program computes what the Flax model computes, however the model is cut.

Bounds. Logits of these models have a standard deviation of 1. In float32 only the order of additions differs: at most
4e-6 was measured over all cases, 2e-5 is allowed. In bfloat16 the same differences now and then tip the rounding of an
activation, by 2^-8 of its value: 2.4e-3 root mean square and 1.5e-2 at most were measured, 2^-8 and 2^-5 are allowed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.typing import DTypeLike
from kernel.common import (
    Form,
    assert_same_tokens,
    call_kernel,
    flax_greedy,
    flax_logits,
    make_decoder,
    make_request,
    params_of,
    some_tokens,
)
from reference import laneformer_numpy
from tiny import tiny

from jax_mono import native
from jax_mono.call import Mode
from jax_mono.config import Lanes, ModelConfig, RopeScaling
from jax_mono.sampling import Sampling

FLOAT32_BOUND = 2e-5
BFLOAT16_RMS, BFLOAT16_BOUND = 2**-8, 2**-5
TEXT = tuple(some_tokens(72))
"""Longer than the windows, and than 3 splits of 16 positions each: every split takes over a second time."""


@dataclass(frozen=True)
class Cut:
    """How a model is shared out."""

    devices: int
    blocks: int
    form: Form = "threads"
    kv_splits: int | None = None

    def __str__(self) -> str:
        splits = f"-splits{self.kv_splits}" if self.kv_splits else ""
        return f"{self.devices}x{self.blocks}-{self.form}{splits}"


SMOL = {
    "num_heads": 9,
    "num_kv_heads": 3,
    "head_dim": 8,
    "hidden_size": 72,
    "intermediate_size": 100,
    "vocab_size": 130,
}
DENSE: dict[str, tuple[ModelConfig, list[Cut]]] = {
    "llama": (tiny("llama"), [Cut(1, 1), Cut(2, 5), Cut(3, 2, "mesh"), Cut(4, 1), Cut(8, 1, "mesh")]),
    "llama-windows": (tiny("llama", sliding_windows=(3, 0, 40)), [Cut(1, 2), Cut(2, 2, "mesh", 3)]),
    "llama3-rope": (
        tiny("llama", rope_scaling=RopeScaling(kind="llama3", factor=4, original_max_position_embeddings=16)),
        [Cut(2, 1)],
    ),
    "yarn-rope": (
        tiny("llama", rope_scaling=RopeScaling(kind="yarn", factor=4, original_max_position_embeddings=16)),
        [Cut(1, 2)],
    ),
    "qwen2": (tiny("qwen2"), [Cut(1, 5), Cut(2, 2, "mesh"), Cut(3, 1), Cut(8, 1)]),
    "qwen2-untied": (tiny("qwen2", tie_word_embeddings=False), [Cut(2, 2)]),
    "qwen3": (tiny("qwen3"), [Cut(1, 2, kv_splits=3), Cut(2, 1), Cut(4, 2, "mesh")]),
    "smol": (tiny("llama", **SMOL), [Cut(1, 5), Cut(2, 2, "mesh"), Cut(3, 5), Cut(4, 1, "mesh"), Cut(8, 2)]),
}


def laneformer(**switches: object) -> ModelConfig:
    return tiny("laneformer", lanes=Lanes(**{"count": 8, "delay": 2, **switches}))


def uneven(**switches: object) -> ModelConfig:
    """Lanes whose rows, neurons and vocabulary fill no whole tile."""
    return tiny(
        "laneformer",
        lanes=Lanes(**{"count": 4, "delay": 2, **switches}),
        hidden_size=76,
        intermediate_size=4 * 27,
        num_heads=24,
        vocab_size=124,
        sliding_windows=(7, 1, 0, 3, 50),
    )


EVERYWHERE = [Cut(1, 5), Cut(2, 1, "mesh"), Cut(2, 2), Cut(4, 1, "mesh"), Cut(4, 5), Cut(8, 1, "mesh"), Cut(8, 2)]
LANEFORMERS: dict[str, tuple[ModelConfig, list[Cut]]] = {
    "delay2": (laneformer(), EVERYWHERE),
    "delay0": (laneformer(delay=0), [Cut(1, 1), Cut(4, 2), Cut(8, 1, "mesh")]),
    "delay1": (laneformer(delay=1), [Cut(2, 2), Cut(4, 1, "mesh")]),
    "delay-beyond-the-end": (laneformer(delay=9), [Cut(2, 1)]),
    "no-early-comm": (laneformer(early_comm=False), [Cut(1, 1), Cut(4, 1)]),
    "no-early-comm-scale-one": (laneformer(early_comm=False, own_scale="one"), [Cut(2, 1, "mesh"), Cut(8, 1)]),
    "no-early-broadcast": (laneformer(early_layers_broadcast=False), [Cut(1, 2), Cut(4, 1, "mesh")]),
    "alone-at-first": (
        laneformer(early_comm=False, early_layers_broadcast=False, own_scale="one"),
        [Cut(2, 5), Cut(8, 1)],
    ),
    "no-attention-comm": (laneformer(attention_comm=False), [Cut(2, 1), Cut(8, 1, "mesh")]),
    "no-mlp-comm": (laneformer(mlp_comm=False, delay=1, own_scale="one"), [Cut(4, 1), Cut(2, 1, "mesh")]),
    "no-comm": (laneformer(mlp_comm=False, attention_comm=False), [Cut(4, 2)]),
    "norm-of-sum": (laneformer(head="norm_of_sum"), [Cut(1, 2), Cut(2, 1, "mesh"), Cut(8, 2)]),
    "per-lane": (laneformer(head="per_lane", delay=1), [Cut(1, 5), Cut(4, 1, "mesh"), Cut(8, 1)]),
    "tied": (tiny("laneformer", tie_word_embeddings=True, rope_interleaved=False), [Cut(4, 2)]),
    "biases-and-norms": (tiny("laneformer", qkv_bias=True, qk_norm=True), [Cut(1, 2), Cut(4, 1, "mesh")]),
    "4-lanes-uneven-widths": (uneven(head="mean_of_norms"), [Cut(1, 10), Cut(2, 3, "mesh"), Cut(4, 2, kv_splits=2)]),
    "4-lanes-uneven-heads": (uneven(head="per_lane"), [Cut(1, 3), Cut(2, 1, "mesh")]),
}


def cases(models: dict[str, tuple[ModelConfig, list[Cut]]]) -> Iterator[object]:
    for name, (config, cuts) in models.items():
        for cut in cuts:
            yield pytest.param(config, cut, id=f"{name}-{cut}")


@functools.cache
def expected_logits(config: ModelConfig, dtype: DTypeLike) -> np.ndarray:
    return flax_logits(config, params_of(config, dtype), text_for(config))


def text_for(config: ModelConfig) -> list[int]:
    return [token % config.vocab_size for token in TEXT]


def kernel_logits(config: ModelConfig, cut: Cut, dtype: DTypeLike = jnp.float32) -> np.ndarray:
    decoder = make_decoder(
        config, devices=cut.devices, blocks=cut.blocks, form=cut.form, kv_splits=cut.kv_splits, dtype=dtype
    )
    logits = decoder.score(text_for(config), logits=True).logits
    assert logits is not None and logits.shape == (len(TEXT), config.vocab_size)
    return logits


def assert_close(actual: np.ndarray, expected: np.ndarray, dtype: DTypeLike) -> None:
    error = np.abs(actual - expected)
    if dtype == jnp.float32:
        assert error.max() <= FLOAT32_BOUND
    else:
        rms = np.sqrt(np.mean(error**2))
        assert rms <= BFLOAT16_RMS and error.max() <= BFLOAT16_BOUND, (rms, error.max())


@pytest.mark.parametrize(("config", "cut"), [*cases(DENSE), *cases(LANEFORMERS)])
def test_float32_logits_equal_flax(config: ModelConfig, cut: Cut) -> None:
    assert_close(kernel_logits(config, cut), expected_logits(config, jnp.float32), jnp.float32)


@pytest.mark.parametrize(
    ("name", "cut"),
    [
        ("llama", Cut(1, 5)),
        ("llama", Cut(4, 2, "mesh")),
        ("qwen2", Cut(3, 2)),
        ("qwen3", Cut(2, 1, "mesh")),
        ("smol", Cut(1, 1)),
        ("smol", Cut(8, 1)),
        ("delay2", Cut(1, 2)),
        ("delay2", Cut(8, 1, "mesh")),
        ("no-early-comm-scale-one", Cut(2, 2)),
        ("per-lane", Cut(4, 1)),
    ],
    ids=str,
)
def test_bfloat16_logits_equal_flax(name: str, cut: Cut) -> None:
    config, _ = (DENSE | LANEFORMERS)[name]
    assert_close(kernel_logits(config, cut, jnp.bfloat16), expected_logits(config, jnp.bfloat16), jnp.bfloat16)


@pytest.mark.parametrize("name", ["delay2", "alone-at-first", "per-lane"])
def test_laneformer_logits_equal_an_independent_implementation(name: str) -> None:
    """Not by way of Flax: float64 loops that were written from the description alone."""
    config, _ = LANEFORMERS[name]
    text = np.asarray(TEXT[:20])
    expected, _ = laneformer_numpy.forward(config, params_of(config), text)
    actual = make_decoder(config, devices=4, blocks=2).score(text.tolist(), logits=True).logits
    np.testing.assert_allclose(actual, expected, rtol=0, atol=FLOAT32_BOUND)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_laneformers_logits_do_not_depend_on_the_machine(dtype: DTypeLike) -> None:
    """Lanes are added pairwise, so a device's share of the sum is a subtree of it: bit for bit the same."""
    config, _ = LANEFORMERS["delay2"]
    first = kernel_logits(config, Cut(1, 1), dtype)
    for cut in EVERYWHERE:
        np.testing.assert_array_equal(kernel_logits(config, Cut(cut.devices, cut.blocks, cut.form, 1), dtype), first)


def test_dense_logits_do_not_depend_on_blocks_and_form() -> None:
    """Devices add partial sums of their own, and splits of the KV cache are joined; nothing else changes the order."""
    config, _ = DENSE["smol"]
    first = kernel_logits(config, Cut(2, 1, kv_splits=2))
    for cut in (Cut(2, 2, "mesh", 2), Cut(2, 9, kv_splits=2)):
        np.testing.assert_array_equal(kernel_logits(config, cut), first)


@pytest.mark.parametrize(("family", "devices"), [("laneformer", 8), ("llama", 4)])
def test_devices_may_share_the_jax_devices_of_a_mesh(family: str, devices: int) -> None:
    """Who runs a device changes nothing: all of them in one call, or two or four calls with equally many."""
    config = tiny(family)
    options = {"devices": devices, "blocks": 1}
    expected = make_decoder(config, **options)
    logits, output = expected.score(TEXT, logits=True).logits, expected.generate(TEXT[:40], max_new_tokens=6)
    for size in (2, 4):
        decoder = make_decoder(config, **options, form="mesh", mesh_size=size)
        assert decoder.tapes.layers.sharding.num_devices == size
        np.testing.assert_array_equal(decoder.score(TEXT, logits=True).logits, logits)
        found = decoder.generate(TEXT[:40], max_new_tokens=6)  # long enough for prefill
        assert_same_tokens(found.tokens, output.tokens, config, params_of(config), TEXT[:40])


@pytest.mark.parametrize("variant", ["portable", "avx2", "avx512", "avx512bf16"])
def test_every_cpu_variant(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_MONO_CPU", variant)
    try:
        assert native.cpu_variant() == variant
    except native.NativeError as error:
        pytest.skip(str(error))
    for name in ("smol", "4-lanes-uneven-widths"):
        config, _ = (DENSE | LANEFORMERS)[name]
        for dtype in (jnp.float32, jnp.bfloat16):
            assert_close(kernel_logits(config, Cut(2, 2), dtype), expected_logits(config, dtype), dtype)


def test_a_cpu_variant_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_MONO_CPU", "abacus")
    with pytest.raises(native.NativeError, match=r"JAX_MONO_CPU is 'abacus'; this processor runs .*portable"):
        native.cpu_variant()
    with pytest.raises(jax.errors.JaxRuntimeError, match="JAX_MONO_CPU is 'abacus'"):
        kernel_logits(DENSE["smol"][0], Cut(2, 2))


GREEDY_CASES = [
    ("llama", Cut(1, 2), jnp.float32),
    ("smol", Cut(3, 2), jnp.float32),
    ("qwen3", Cut(2, 1, "mesh"), jnp.float32),
    ("delay2", Cut(1, 1), jnp.float32),
    ("delay2", Cut(4, 2), jnp.float32),
    ("delay2", Cut(8, 1, "mesh"), jnp.float32),
    ("delay2", Cut(2, 1), jnp.bfloat16),
]


@pytest.mark.parametrize(("name", "cut", "dtype"), GREEDY_CASES, ids=str)
def test_greedy_tokens_equal_flax(name: str, cut: Cut, dtype: DTypeLike) -> None:
    """Flax prefill, then the kernel: both have to agree on the cache. All cuts agree with the same Flax tokens."""
    config, _ = (DENSE | LANEFORMERS)[name]
    params, prompt = params_of(config, dtype), text_for(config)[:12]
    expected = flax_greedy(config, params, prompt, 16, len(TEXT))
    decoder = make_decoder(config, devices=cut.devices, blocks=cut.blocks, form=cut.form, dtype=dtype)
    actual = decoder.generate(prompt, max_new_tokens=16).tokens
    assert_same_tokens(actual, expected, config, params, prompt)


def test_two_runs_are_bit_identical() -> None:
    config, _ = LANEFORMERS["delay2"]
    decoder = make_decoder(config, devices=4, blocks=2)
    sampling = Sampling(temperature=1.0, top_k=40, top_p=0.9)
    runs = [decoder.score(text_for(config), logits=True) for _ in range(3)]
    for run in runs[1:]:
        np.testing.assert_array_equal(run.logits, runs[0].logits)
        np.testing.assert_array_equal(run.logprobs, runs[0].logprobs)
    outputs = [decoder.generate(TEXT[:12], max_new_tokens=16, sampling=sampling, seed=5) for _ in range(3)]
    assert all(output.tokens == outputs[0].tokens for output in outputs)
    assert all(output.logprobs == outputs[0].logprobs for output in outputs)


@pytest.mark.parametrize("top_k", [0, 30])
def test_devices_that_never_wait_for_each_other_stay_in_step(top_k: int) -> None:
    """Without communication only the sampled token joins the devices; the fastest must not overwrite what others read.

    This is what the second copies of summaries and logits are for. With more threads than cores, some device is far
    behind sooner or later.
    """
    lanes = Lanes(count=8, attention_comm=False, mlp_comm=False, head="per_lane")
    config = tiny(
        "laneformer",
        lanes=lanes,
        num_layers=1,
        hidden_size=16,
        intermediate_size=16,
        num_heads=8,
        head_dim=2,
        vocab_size=64,
        max_position_embeddings=2048,
        sliding_windows=(1,),
    )
    request = make_request(budget=1500, temperature=1.0, top_k=top_k, seed=np.array([7, 1], np.uint32))
    tokens = [
        call_kernel(make_decoder(config, devices=devices, blocks=blocks), request, mode=Mode.GENERATE, room=1500).tokens
        for devices, blocks in ((1, 1), (8, 1), (8, 2), (2, 1))
    ]
    for other in tokens[1:]:
        np.testing.assert_array_equal(other, tokens[0])


@pytest.mark.parametrize(("bad", "cut"), [(np.nan, Cut(1, 2)), (np.inf, Cut(2, 1, "mesh"))], ids=str)
def test_logits_that_are_not_finite_are_an_error(bad: float, cut: Cut) -> None:
    """A weight that only token 7 meets: the text is fine until it comes up."""
    config = tiny("llama")
    good = params_of(config)
    params = good | {"embed": good["embed"].at[7, 3].set(bad)}
    decoder = make_decoder(config, devices=cut.devices, blocks=cut.blocks, form=cut.form, params=params)
    message = "logits of token 2 are not finite; check the checkpoint, or use a wider dtype"
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        decoder.score([1, 2, 7, 4])
    assert np.isfinite(decoder.score([1, 2, 3, 4]).logprobs).all()
    with pytest.raises(jax.errors.JaxRuntimeError, match="logits of token 0 are not finite"):
        decoder.generate([1, 2, 7], max_new_tokens=4)
