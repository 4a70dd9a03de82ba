"""On GPUs decoding from compressed tapes gives what decoding from plain ones gives."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu import rehearsal
from gpu.specs import TEXT, most_blocks, truth_device
from gpu.test_parity import BOUNDS
from kernel.common import flax_logits, make_decoder, with_exceptions
from tiny import COMPRESSIBLE, tiny

from jax_mono.decoder import Decoder
from jax_mono.sampling import Sampling
from jax_mono.tile import TileFormat

CASES = [
    ("laneformer", 4, 4, 0),
    ("laneformer", 1, 8, 0),
    ("llama", 1, 12, 0),
    ("laneformer", 2, 4, 2),
    ("laneformer", 8, 4, 2),
]
"""Family, devices of the plan, blocks of each, and GPUs of the mesh."""


def decoder_of(family: str, devices: int, blocks: int, gpus: int, *, compressed: bool = True) -> Decoder:
    if len(jax.devices()) < gpus:
        pytest.skip(f"needs {gpus} GPUs, JAX has {len(jax.devices())}")
    if devices // max(1, gpus) * blocks > most_blocks():
        pytest.skip(f"needs {devices * blocks} multiprocessors, there are {most_blocks()}")
    config = tiny(family, **COMPRESSIBLE)
    return make_decoder(
        config,
        devices=devices,
        blocks=blocks,
        form="mesh" if gpus else "threads",
        mesh_size=gpus or None,
        dtype=jnp.bfloat16,
        params=with_exceptions(config),
        target=rehearsal.target(),
        tile=TileFormat(compressed=compressed),
    )


@pytest.mark.parametrize(("family", "devices", "blocks", "gpus"), CASES)
def test_logits_are_those_of_flax_in_float32(family: str, devices: int, blocks: int, gpus: int) -> None:
    decoder = decoder_of(family, devices, blocks, gpus)
    found = decoder.score(TEXT, logits=True).logits
    config, device = decoder.plan.config, truth_device()
    with jax.default_device(device):
        exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), jax.device_put(with_exceptions(config), device))
        truth = flax_logits(config, exact, TEXT)
    error = np.abs(found - truth)
    rms, most = float(np.sqrt(np.mean(error**2))), float(error.max())
    print(f"{family}-{devices}x{blocks}, {gpus or 1} GPUs: rms {rms:.2e}, most {most:.2e}")
    assert rms <= BOUNDS["bfloat16"][0] and most <= BOUNDS["bfloat16"][1]
    np.testing.assert_array_equal(decoder.score(TEXT, logits=True).logits, found)  # and bit for bit the same again


def test_prefill_and_decoding_read_the_same_weights() -> None:
    prompt = TEXT[:24]  # too long for the resident program alone
    outputs = [
        decoder_of(*CASES[0], compressed=compressed).generate(prompt, max_new_tokens=4) for compressed in (True, False)
    ]
    np.testing.assert_allclose(outputs[0].logprobs[0], outputs[1].logprobs[0], atol=BOUNDS["bfloat16"][1])


def test_two_generations_are_bit_identical() -> None:
    decoder = decoder_of(*CASES[0])
    sampling = Sampling(temperature=1.0, top_k=40, top_p=0.9)
    first, again = (decoder.generate(TEXT[:12], max_new_tokens=16, sampling=sampling, seed=5) for _ in range(2))
    assert first.tokens == again.tokens and first.logprobs == again.logprobs
