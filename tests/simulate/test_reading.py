"""When a block has the words that it waits for."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType

import numpy as np
import pytest

from jax_mono.simulate.programs import RESIDENT, Program
from jax_mono.simulate.reading import Arrivals, Loads, finish

LAST = dataclasses.replace(RESIDENT, threads=4, warp=2, pause_ns=10, batch=MappingProxyType({}))
TOGETHER = dataclasses.replace(LAST, polls="together")


def read(writers: list[int], visible: list[float], program: Program, batch: int = 9, rate: float = 1e9) -> float:
    loads = Loads.of(np.asarray(writers), program)
    return finish(
        loads, Arrivals.of(loads, np.asarray(visible)), 100.0, trip=20.0, program=program, batch=batch, bytes_rate=rate
    )


def test_words_are_dealt_to_threads_in_turn() -> None:
    loads = Loads.of(np.asarray([5, 5, 6, 6, 7, 7]), LAST)
    np.testing.assert_array_equal(loads.writers, [[[5, 5], [6, 6]], [[7, 7], [-1, -1]]])
    assert loads.distinct.tolist() == [5, 6, 7] and loads.words == 6


@pytest.mark.parametrize("program", [LAST, TOGETHER])
def test_words_that_are_there_take_a_trip(program: Program) -> None:
    assert read([0, 0, 1], [0, 110], program) == pytest.approx(120)
    assert read([0, 0, 1], [0, 0], program, rate=0.5) == pytest.approx(120 + 48 / 0.5)


def test_all_words_are_asked_for_again_together() -> None:
    # Polls start at 100, 130, 160 and look half a trip later.
    assert read([0, 1], [0, 111], TOGETHER) == pytest.approx(150)
    assert read([0, 1], [150, 141], TOGETHER) == pytest.approx(180)


def test_the_last_missing_word_is_waited_for_first() -> None:
    # The first look is in vain until 120; the poll from 120 on finds it until 140, then all are asked for again.
    assert read([0], [115], LAST) == pytest.approx(160)
    # Two words of one thread: while it waits for the second, the first comes.
    assert read([0] * 4 + [1] * 4, [115, 115], LAST) == pytest.approx(160)
    # The first comes later: it is missing when all are asked for again, and waited for in turn.
    assert read([0] * 4 + [1] * 4, [155, 115], LAST) == pytest.approx(200)
    assert read([0] * 4 + [1] * 4, [115, 115], TOGETHER) == pytest.approx(150)
    # Asked for after the first has come, it is there.
    assert read([0] * 4 + [1] * 4, [115, 115], LAST, batch=1) == pytest.approx(180)
