"""Generations through the ROCm side of the library, in a process of its own: its driver is a stand-in.

rocm_process.py LIBRARY OUTCOMES TARGET, with the settings of the stand-in in the environment. Writes what came of the
cases that ``test_rocm_path.py`` runs as well.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from gpu_host.stand_in import Device, fake_ffi_call
from kernel.common import Form, make_decoder, some_tokens
from tiny import tiny

from jax_mono import native
from jax_mono.call import LostHandoff
from jax_mono.decoder import Decoder
from jax_mono.plan import CPU, GPU, Target
from jax_mono.sampling import Sampling

CASES: dict[str, tuple[str, int, int, str, Form]] = {
    "llama": ("llama", 1, 4, "bfloat16", "threads"),
    "qwen3-float16": ("qwen3", 2, 2, "float16", "threads"),
    "laneformer": ("laneformer", 4, 2, "bfloat16", "threads"),
    "laneformer-mesh": ("laneformer", 2, 2, "bfloat16", "mesh"),
}
"""Family, devices, blocks, weights, form."""
TEXT = some_tokens(20)
LOST = LostHandoff(device=0, block=1, layer=1, channel="activations")
LIMIT_MS = 2000


def decoder_of(name: str, target: Target) -> Decoder:
    family, devices, blocks, dtype, form = CASES[name]
    shape = {"devices": devices, "blocks": blocks, "dtype": jnp.dtype(dtype), "form": form}
    return make_decoder(tiny(family), target=target, **shape)


def outcomes(decoder: Decoder) -> dict[str, np.ndarray]:
    """Everything that the resident program computes; prompts are too short for any other."""
    greedy = decoder.generate(TEXT[:12], max_new_tokens=16, top_logprobs=3)
    more = decoder.generate(TEXT[12:], max_new_tokens=8, cache=greedy.cache)
    options = Sampling(temperature=0.9, top_k=40, top_p=0.9, repetition_penalty=1.2)
    with decoder.stream(TEXT[:5], max_new_tokens=16, sampling=options, seed=7) as stream:
        streamed = [token.id for token in stream]
        drawn = stream.result()
    assert streamed == drawn.tokens
    logits = decoder.score(TEXT, logits=True).logits
    assert logits is not None
    return {
        "greedy": np.array(greedy.tokens),
        "greedy logprobs": np.array(greedy.logprobs),
        "alternatives": np.array([[token.id for token in top] for top in greedy.top]),
        "continued": np.array(more.tokens),
        "drawn": np.array(drawn.tokens),
        "drawn logprobs": np.array(drawn.logprobs),
        "logits": logits,
    }


def fault(decoder: Decoder) -> str:
    """What the error says when a hand-off gets lost."""
    os.environ["JAX_MONO_WAIT_LIMIT_MS"] = str(LIMIT_MS)
    try:
        decoder.score(TEXT, lost=LOST)
    except jax.errors.JaxRuntimeError as error:
        return str(error)
    finally:
        del os.environ["JAX_MONO_WAIT_LIMIT_MS"]
    return "no error"


def main() -> None:
    library, file, target = sys.argv[1:4]
    device = Device(Path(library))
    native.register()
    native._gpu = "rocm"
    jax.ffi.ffi_call = fake_ffi_call(device)
    found: dict[str, np.ndarray] = {}
    for name in os.environ["CASES"].split(","):
        decoder = decoder_of(name, {"cpu": CPU, "gpu": GPU}[target])
        found |= {f"{name}/{key}": value for key, value in outcomes(decoder).items()}
        print(f"{name}: {device.count('hipModuleLaunchCooperativeKernel')} launches so far", flush=True)
    first = decoder_of(os.environ["CASES"].split(",")[0], {"cpu": CPU, "gpu": GPU}[target])
    found["fault"] = np.array(fault(first))
    np.savez(file, **found)
    print("done", flush=True)
    os._exit(0)  # the call that failed would fail once more at exit


if __name__ == "__main__":
    main()
