"""The 5-gram model of bytes, against sums written out by hand."""

from __future__ import annotations

import math

import pytest
from mini_coder_baselines import n_gram_bits


def witten_bell(training: bytes, context: bytes, byte: int) -> float:
    """The definition, recursively."""
    shorter = 1 / 256 if not context else witten_bell(training, context[1:], byte)
    if not context:
        followers = list(training)
    else:
        ends = range(len(context), len(training))
        followers = [training[end] for end in ends if training[end - len(context) : end] == context]
    total, kinds = len(followers), len(set(followers))
    return shorter if total == 0 else (followers.count(byte) + kinds * shorter) / (total + kinds)


@pytest.mark.parametrize("order", [1, 2, 5])
def test_n_grams(order: int) -> None:
    training, text = b"abracadabra abracadabra barcarole", b"abra cadabra!"
    probabilities = [witten_bell(training, text[max(0, end - order + 1) : end], byte) for end, byte in enumerate(text)]
    expected = -sum(map(math.log2, probabilities)) / len(text)
    assert n_gram_bits(training, text, order) == pytest.approx(expected)
    everything = sum(witten_bell(training, b"abr"[: order - 1], byte) for byte in range(256))
    assert everything == pytest.approx(1.0)
