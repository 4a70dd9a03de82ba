"""Tapes as fluids: shares, rests and turns of the pumps."""

from __future__ import annotations

import math
import random

import pytest

from jax_mono.simulate.stream import Stream


def until(stream: Stream, blocks: set[int]) -> float:
    """When all these blocks have their weights."""
    now = 0.0
    while blocks:
        now = stream.next_event()
        blocks -= set(stream.advance(now))
    return now


def test_one_pump_runs_at_its_own_rate_and_rests_when_the_ring_is_full() -> None:
    stream = Stream(1, rate=100, block_rate=10, ring=50)
    assert stream.rate == 10 and stream.next_event() == pytest.approx(5)
    assert stream.advance(5) == [] and stream.rate == 0 and stream.next_event() == math.inf
    stream.advance(100)
    assert stream.begin(0, 50)  # all of it is there
    assert not stream.begin(0, 20) or stream.next_event() < math.inf
    assert until(stream, {0}) == pytest.approx(102)


def test_pumps_share_the_memory() -> None:
    stream = Stream(4, rate=20, block_rate=10, ring=0)
    for block in range(4):
        assert not stream.begin(block, 100 if block else 50)
    assert stream.rate == 20
    assert stream.next_event() == pytest.approx(10)  # 50 bytes at a quarter of 20
    assert stream.advance(10) == [0]
    assert stream.next_event() == pytest.approx(10 + 50 / (20 / 3))
    assert sorted(stream.advance(stream.next_event())) == [1, 2, 3]


def test_a_full_memory_never_idles_however_products_follow_each_other() -> None:
    """All bytes, at the full rate, whatever the order of the products: what bounds the time of a token from below."""
    generator = random.Random(1)
    stream, blocks, products = Stream(8, rate=8, block_rate=4, ring=64), 8, 40
    left, total, now = [products] * blocks, 0.0, 0.0
    ready = set(range(blocks))
    while ready or stream.next_event() < math.inf:
        for block in sorted(ready):
            if left[block]:
                size = generator.uniform(10, 60)
                left[block], total = left[block] - 1, total + size
                if stream.begin(block, size):
                    stream.begin(block, 0.0)
                    continue
            ready.discard(block)
        if stream.next_event() == math.inf:
            break
        now = stream.next_event()
        ready |= set(stream.advance(now))
    assert left == [0] * blocks
    assert now >= total / 8
