"""The GPUs' own stage code, compiled by g++, on fibers: many threads per block, words of 16 bytes, plans for GPUs.

What GPUs do differently is little: the ring of the tape, tensor cores, and how memory orders.
"""

from __future__ import annotations

from dataclasses import asdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_host.stand_in import Device
from jax.typing import DTypeLike
from kernel.common import Form, flax_logits, make_decoder, params_of, some_tokens, with_exceptions
from reference import sampling_numpy
from reference.sampling_numpy import Options
from tiny import COMPRESSIBLE, tiny

from jax_mono import record
from jax_mono.call import LostHandoff
from jax_mono.plan import GPU
from jax_mono.sampling import Sampling
from jax_mono.tile import TileFormat

TEXT = some_tokens(9)
TOLERANCE = 0.08
"""Of bfloat16 logits, which reach about 5, against float32 logits of the same weights; on CPUs the same."""


CASES = [
    ("llama", 1, 3, "threads", jnp.bfloat16),
    ("qwen2", 2, 2, "threads", jnp.float16),
    ("qwen3", 1, 1, "threads", jnp.bfloat16),
    ("laneformer", 1, 3, "threads", jnp.bfloat16),
    ("laneformer", 4, 1, "mesh", jnp.bfloat16),
]


@pytest.mark.parametrize(("family", "devices", "blocks", "form", "dtype"), CASES)
def test_logits_equal_flax(
    fibers: Device, family: str, devices: int, blocks: int, form: Form, dtype: DTypeLike
) -> None:
    config = tiny(family)
    decoder = make_decoder(config, devices=devices, blocks=blocks, form=form, dtype=dtype, target=GPU)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params_of(config, dtype))
    scores = decoder.score(TEXT, logits=True)
    assert fibers.count("hipModuleLaunchCooperativeKernel") > 0
    np.testing.assert_allclose(scores.logits, flax_logits(config, params, TEXT), atol=TOLERANCE)


@pytest.mark.parametrize(("devices", "blocks"), [(4, 2), (8, 1), (1, 4)])
def test_equal_shares_in_whole_words(fibers: Device, devices: int, blocks: int) -> None:
    """Where all blocks have as many rows and neurons, the program is compiled for their places, as the 2B is."""
    config = tiny("laneformer", hidden_size=192, intermediate_size=768)
    decoder = make_decoder(config, devices=devices, blocks=blocks, dtype=jnp.bfloat16, target=GPU)
    assert np.frombuffer(record.plan_record(decoder.plan).tobytes(), record.HEADER, 1)[0]["flat_activations"]
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params_of(config, jnp.bfloat16))
    scores = decoder.score(TEXT, logits=True)
    np.testing.assert_allclose(scores.logits, flax_logits(config, params, TEXT), atol=TOLERANCE)


@pytest.mark.parametrize(("family", "devices"), [("laneformer", 4), ("llama", 1)])
def test_compressed_tapes(fibers: Device, family: str, devices: int) -> None:
    config = tiny(family, **COMPRESSIBLE)
    params = with_exceptions(config)
    options = {"devices": devices, "blocks": 2, "dtype": jnp.bfloat16, "params": params, "target": GPU}
    found, plain = (
        make_decoder(config, **options, tile=TileFormat(compressed=packed)).score(TEXT, logits=True).logits
        for packed in (True, False)
    )
    np.testing.assert_allclose(found, plain, atol=TOLERANCE)
    assert np.abs(found - plain).max() > 0  # sums in another order: these were other programs


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "window", "blocks"),
    [(2, 2, 96, 0, 3), (4, 2, 12, 21, 3), (6, 2, 36, 0, 2), (5, 1, 24, 40, 1), (7, 1, 132, 0, 2), (2, 1, 4, 0, 1)],
    ids=str,
)
def test_attention_of_every_shape(
    fibers: Device, heads: int, kv_heads: int, head_dim: int, window: int, blocks: int
) -> None:
    """Over several chunks of positions: squads of 32 threads share them, and pairs of queries share squads."""
    config = tiny("llama", num_layers=1, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim)
    config = config.replace(sliding_windows=(window,))
    text = some_tokens(75)
    decoder = make_decoder(config, blocks=blocks, dtype=jnp.bfloat16, target=GPU)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params_of(config, jnp.bfloat16))
    scores = decoder.score(text, logits=True)
    np.testing.assert_allclose(scores.logits, flax_logits(config, params, text), atol=TOLERANCE)


@pytest.mark.parametrize(
    "options",
    [Options(temperature=1.0, repetition_penalty=1.8), Options(temperature=0.9, top_k=20, top_p=0.8)],
    ids=str,
)
def test_every_token_is_the_one_that_the_reference_draws(fibers: Device, options: Options) -> None:
    decoder = make_decoder(tiny("llama"), devices=2, blocks=2, dtype=jnp.bfloat16, target=GPU)
    prompt = TEXT[:3]
    output = decoder.generate(prompt, max_new_tokens=6, sampling=Sampling(**asdict(options)), seed=11, top_logprobs=2)
    text = [*prompt, *output.tokens]
    scores = decoder.score(text, logits=True, top_logprobs=2)
    logits = scores.logits
    assert logits is not None
    for step, token in enumerate(output.tokens):
        position = len(prompt) - 1 + step
        case = (logits[position], text[: position + 1], options, 11, position)
        assert token == sampling_numpy.draw(*case) or sampling_numpy.is_near_tie(token, *case, slack=2e-5)
        assert [alternative.id for alternative in output.top[step]] == np.argsort(-logits[position])[:2].tolist()


def test_a_lost_hand_off_ends_the_call(fibers: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_MONO_WAIT_LIMIT_MS", "1000")
    decoder = make_decoder(tiny("laneformer"), devices=2, blocks=2, dtype=jnp.bfloat16, target=GPU)
    lost = LostHandoff(device=1, block=0, layer=2, channel="residual after mlp")
    with pytest.raises(
        jax.errors.JaxRuntimeError, match=r"device 1, block \d waited .* 'residual after mlp' in layer 2, epoch 1"
    ):
        decoder.score(TEXT, lost=lost)
    jax.clear_caches()
    monkeypatch.delenv("JAX_MONO_WAIT_LIMIT_MS")  # fibers on a busy machine take their time
    assert len(decoder.score(TEXT).logprobs) == len(TEXT) - 1


def test_a_conversation_goes_on(fibers: Device) -> None:
    decoder = make_decoder(tiny("llama"), blocks=2, dtype=jnp.bfloat16, target=GPU)
    whole = decoder.generate(TEXT, max_new_tokens=6)
    first = decoder.generate(TEXT, max_new_tokens=3)
    second = decoder.generate([], max_new_tokens=3, cache=first.cache)
    assert first.tokens + second.tokens == whole.tokens
