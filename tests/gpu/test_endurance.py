"""On GPUs thousands of calls and tokens give the same, to the last bit, and nothing grows."""

from __future__ import annotations

import gc
import itertools

import jax
import pytest
from gpu import rehearsal
from gpu.specs import WIDE, Spec, decoder_of
from kernel.common import some_tokens
from tiny import tiny

from jax_mono.decode import Finish
from jax_mono.output import Output
from jax_mono.sampling import Sampling

SAMPLING = Sampling(temperature=1.0, top_k=50, top_p=0.95, repetition_penalty=1.1)

SMALL = Spec(tiny("llama", sliding_windows=(7, 0, 20)), 1, 4)
LANEFORMER = Spec(tiny("laneformer"), 4, 2)
LONG = Spec(tiny("laneformer", max_position_embeddings=2100), 8, 1)
LONG_WIDE = Spec(tiny("llama", **WIDE, max_position_embeddings=2100, sliding_windows=(5, 0, 500)), 1, 132)
"""On all multiprocessors of an H100."""


def outcome(output: Output) -> tuple[list[int], list[float]]:
    return output.tokens, output.logprobs


def device_memory() -> int:
    return (jax.devices()[0].memory_stats() or {}).get("bytes_in_use", 0)


def test_a_thousand_short_generations() -> None:
    """Of ten requests in turn, with two programs: each gives what it gave the first time."""
    decoders = [decoder_of(SMALL), decoder_of(LANEFORMER)]
    requests = list(itertools.product(decoders, [1, 2, 7, 15, 32]))
    first: dict[int, tuple[list[int], list[float]]] = {}
    memory = None
    for call in range(rehearsal.amount(1000, 12)):
        place = call % len(requests)
        decoder, length = requests[place]
        output = decoder.generate(some_tokens(length, seed=length), max_new_tokens=8, sampling=SAMPLING, seed=length)
        assert len(output.tokens) == 8 and output.finish == Finish.LENGTH
        assert outcome(output) == first.setdefault(place, outcome(output)), f"call {call}, request {place}"
        if call == 10 * len(requests):
            gc.collect()
            memory = device_memory()
    del output
    gc.collect()
    if memory is not None:
        assert device_memory() - memory < 16 << 20


@pytest.mark.parametrize("spec", [LONG, LONG_WIDE], ids=["laneformer-8x1", "llama-1x132"])
def test_twenty_generations_of_two_thousand_tokens(spec: Spec) -> None:
    decoder, prompt = decoder_of(spec), some_tokens(12)
    length = rehearsal.amount(2000, 30)
    outputs = []
    for _ in range(rehearsal.amount(20, 2)):
        output = decoder.generate(prompt, max_new_tokens=length, sampling=SAMPLING, seed=5)
        assert len(output.tokens) == length
        outputs.append(outcome(output))
        rate = length / output.seconds
        assert outputs[-1] == outputs[0], f"generation {len(outputs) - 1}"
    print(f"{spec}: {rate:.0f} tokens per second")
    assert len(set(outputs[0][0])) > length // 100, "a model that repeats itself tests little"
