"""The swizzle of regions, from maps of their pages."""

from __future__ import annotations

import numpy as np
import pytest

from jax_mono.address_hash import parts
from jax_mono.bringup.region_fit import fit
from jax_mono.topology import MI300X

IN_ORDER = (0, 1, 2, 3)
PAGES = 256
"""Of a region."""


def drawn(regions: int = 40, pattern: tuple[int, ...] = IN_ORDER, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A swizzle at random and the dies of its pages."""
    table = np.random.default_rng(seed).integers(0, len(pattern), regions)
    place = np.arange(regions * PAGES) % len(pattern)
    return table, np.asarray(pattern)[place ^ np.repeat(table, PAGES)]


def disturbed(die: np.ndarray, *, wrong: float = 0.0, unknown: float = 0.0, seed: int = 1) -> np.ndarray:
    draw = np.random.default_rng(seed)
    found = np.where(draw.random(len(die)) < wrong, draw.integers(0, 4, len(die)), die)
    return np.where(draw.random(len(die)) < unknown, -1, found)


@pytest.mark.parametrize("wrong", [0.0, 0.1, 0.25])
@pytest.mark.parametrize("unknown", [0.0, 0.9])
def test_pages_of_a_region_outvote_the_wrong_ones(wrong: float, unknown: float) -> None:
    table, die = drawn()
    found = fit(disturbed(die, wrong=wrong, unknown=unknown), IN_ORDER, PAGES)
    assert found.refusal == "" and found.clear.mean() > 0.95
    np.testing.assert_array_equal(found.swizzle[found.clear], table[found.clear])
    assert found.agreement.mean() == pytest.approx(1 - 0.75 * wrong, abs=0.05)


def test_the_hash_of_the_driver() -> None:
    known = MI300X.address_hash
    assert known is not None
    start = (5 << 33) + (3 << 20)
    die = parts(known, start + np.arange(100 * PAGES) * 4096)
    table = parts(known, start + np.arange(100) * (1 << 20))
    np.testing.assert_array_equal(fit(die, MI300X.granule_sides, PAGES).swizzle, table)


def test_a_region_that_is_cut_off() -> None:
    table, die = drawn(5)
    found = fit(die[: 4 * PAGES + 12], IN_ORDER, PAGES)
    np.testing.assert_array_equal(found.swizzle, table)
    assert not fit(die[: 4 * PAGES + 4], IN_ORDER, PAGES).clear[4], "four pages do not say enough"


def test_granules_of_one_side_need_no_exchange() -> None:
    table, die = drawn(pattern=(0, 0, 1, 1))
    found = fit(die, (0, 0, 1, 1), PAGES)
    np.testing.assert_array_equal(found.swizzle, table & 2)


def test_a_region_that_does_not_follow_stays_as_it_is() -> None:
    table, die = drawn()
    die[7 * PAGES : 8 * PAGES] = np.arange(PAGES) // 4 % 4  # granules of 16 KiB
    die[9 * PAGES : 10 * PAGES] = -1
    found = fit(die, IN_ORDER, PAGES)
    assert found.refusal == "" and np.flatnonzero(~found.clear).tolist() == [7, 9]
    table[[7, 9]] = 0
    np.testing.assert_array_equal(found.swizzle, table)


ELSEWHERE = {
    "another order": np.asarray((0, 2, 1, 3))[np.arange(40 * PAGES) % 4],
    "larger granules": np.arange(40 * PAGES) // 4 % 4,
    "one die": np.zeros(40 * PAGES, int),
    "at random": np.random.default_rng(2).integers(0, 4, 40 * PAGES),
    "exchanged within regions": np.arange(40 * PAGES) % 4 ^ np.arange(40 * PAGES) // 64 % 4,
    "unknown": np.full(40 * PAGES, -1),
    "too many wrong": disturbed(drawn()[1], wrong=0.7),
}


@pytest.mark.parametrize("die", ELSEWHERE.values(), ids=ELSEWHERE)
def test_other_memory_is_refused(die: np.ndarray) -> None:
    found = fit(die, IN_ORDER, PAGES)
    assert "% of the regions do not follow the pattern (0, 1, 2, 3), however it is exchanged" in found.refusal
    assert not found.swizzle.any()


@pytest.mark.parametrize(("pattern", "pages"), [((0, 1, 2), 256), ((0,), 256), ((0, 1, 2, 3), 254)])
def test_patterns_without_a_swizzle(pattern: tuple[int, ...], pages: int) -> None:
    with pytest.raises(ValueError, match="cannot be exchanged by a pattern"):
        fit(np.zeros(512, int), pattern, pages)
