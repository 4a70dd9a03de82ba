"""Tapes as fluids: shares, rests and turns of the pumps."""

from __future__ import annotations

import math
import random

import pytest

from jax_mono.simulate.stream import Ahead, Stream


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


def test_a_full_ring_goes_on_in_the_cache() -> None:
    ahead = Ahead(size=40, rate=4, near_rate=20)
    stream = Stream(2, rate=10, block_rate=10, ring=50, ahead=ahead)
    assert stream.rate == 10 and stream.next_event() == pytest.approx(10)  # both fill their rings
    stream.advance(10)
    assert stream.rate == 0 and stream.next_event() == pytest.approx(20)  # nothing comes into the rings meanwhile
    stream.advance(20)
    assert stream.next_event() == math.inf
    for block in (0, 1):
        assert not stream.begin(block, 100)
    assert stream.rate == 40
    # 50 are in the ring, 40 come from the cache and 10 from the memory, of which each has half.
    assert until(stream, {0, 1}) == pytest.approx(20 + 40 / 20 + 10 / 5)


def test_the_cache_is_filled_with_what_others_leave() -> None:
    stream = Stream(2, rate=10, block_rate=8, ring=0, ahead=Ahead(size=40, rate=4, near_rate=20, most=6))
    stream.begin(0, 60)  # reads at once, the other one fetches ahead
    assert stream.rate == 6 and stream.next_event() == pytest.approx(10)
    assert stream.advance(10) == [0]
    stream.begin(1, 20)
    assert stream.rate == 6 and until(stream, {1}) == pytest.approx(10 + 20 / 6)  # as much as reaches all rings


def test_a_rest_costs_a_latency() -> None:
    stream = Stream(1, rate=10, block_rate=10, ring=20, latency=3)
    assert stream.next_event() == pytest.approx(3)
    stream.advance(3)
    assert stream.next_event() == pytest.approx(5)
    stream.advance(5)
    assert not stream.begin(0, 50)
    assert until(stream, {0}) == pytest.approx(5 + 3 + 3)
    assert not stream.begin(0, 40)  # the ring has not been full: no other one
    assert until(stream, {0}) == pytest.approx(11 + 4)


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
