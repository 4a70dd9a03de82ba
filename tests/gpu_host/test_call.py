"""The host side of GPUs runs the program rightly, as seen on a stand-in that computes on the CPU."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from gpu_host.stand_in import Device
from kernel.common import Form, call_kernel, make_decoder, make_request, some_tokens
from tiny import tiny

from jax_mono.sampling import Sampling

TEXT = some_tokens(12)


@pytest.fixture(
    params=[("threads", 1), ("threads", 2), ("mesh", 2), ("mesh", 4)], ids=lambda form: "-".join(map(str, form))
)
def form(request: pytest.FixtureRequest) -> tuple[Form, int]:
    return request.param


def test_scores_are_those_of_the_cpu(form: tuple[Form, int], request: pytest.FixtureRequest) -> None:
    decoder = make_decoder(tiny("laneformer"), devices=form[1], blocks=2, form=form[0])
    expected = decoder.score(TEXT, top_logprobs=3, logits=True)
    device: Device = request.getfixturevalue("device")
    found = decoder.score(TEXT, top_logprobs=3, logits=True)
    assert device.count("hipModuleLaunchCooperativeKernel") >= (form[1] if form[0] == "mesh" else 1)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-5)
    np.testing.assert_allclose(found.logits, expected.logits, atol=1e-4)


def test_a_conversation_goes_on(form: tuple[Form, int], request: pytest.FixtureRequest) -> None:
    decoder = make_decoder(tiny("llama"), devices=form[1], blocks=2, form=form[0])
    options = {"max_new_tokens": 6, "sampling": Sampling(temperature=0.8, top_k=20), "seed": 3}

    def talk() -> list[int]:
        first = decoder.generate(TEXT, **options)
        with decoder.stream([1, 2], cache=first.cache, **options) as stream:
            streamed = [token.id for token in stream]
            assert streamed == stream.result().tokens
        return first.tokens + streamed

    expected = talk()
    request.getfixturevalue("device")
    assert talk() == expected


def test_the_benchmark_is_another_kernel(request: pytest.FixtureRequest) -> None:
    decoder = make_decoder(tiny("llama"))
    stream = 2  # kStreamBenchmark in ffi/host/operands.h
    with pytest.raises(jax.errors.JaxRuntimeError, match="this mode runs on GPUs only"):
        call_kernel(decoder, make_request(), mode=stream, room=1)
    device: Device = request.getfixturevalue("device")
    launched = device.count("hipModuleLaunchCooperativeKernel")
    status = call_kernel(decoder, make_request(), mode=stream, room=1).status
    assert np.asarray(status).tolist() == [0, 0]  # nothing was computed
    assert device.count("hipModuleLaunchCooperativeKernel") == launched + 1
