"""The solver of page maps finds what is there, and nothing where there is nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from bringup.synthetic_pages import Home, hashed, interleaved, repeating, times
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_mono.bringup.pages import PageMap, Refusal, solve, solve_regions, verify
from jax_mono.bringup.region_fit import fit
from jax_mono.config import ConfigError
from jax_mono.placement import place
from jax_mono.topology import H200, MI300X, Topology

IN_ORDER = (0, 0, 1, 1, 2, 2, 3, 3)
LAYOUTS = {4: IN_ORDER, 2: (0, 0, 0, 0, 1, 1, 1, 1), 8: tuple(range(8))}


def right(found: PageMap, home: Home, die_of_xcd: Sequence[int]) -> float:
    """Part of the pages with a die that are on it; 0 if XCDs are put together wrongly."""
    names = dict(zip(die_of_xcd, found.die_of_xcd, strict=True))
    if any(names[a] != b for a, b in zip(die_of_xcd, found.die_of_xcd, strict=True)) or found.dies != len(names):
        return 0.0
    known = found.die >= 0
    truth = np.vectorize(names.get)(home(np.arange(len(found.die))))
    return float((found.die == truth)[known].mean())


@pytest.mark.parametrize("granule", [1, 4, 8, 16, 64])
@pytest.mark.parametrize("noise", [2.0, 20.0])
def test_interleaves(granule: int, noise: float) -> None:
    home = interleaved(granule)
    found = solve(times(home, pages=4096, noise=noise), MI300X)
    assert isinstance(found, PageMap), found
    assert found.period == 4 * granule and found.pattern == tuple(home(np.arange(4 * granule)))
    assert right(found, home, IN_ORDER) == 1.0
    assert found.as_expected(MI300X) == []
    assert found.nearer_ns == pytest.approx(70, rel=0.1)  # 60, 60 and 90 farther
    assert found.confidence > 0.9999 and found.agreement > 0.99 and found.deviation > 50


def test_the_map_of_the_driver_is_longer_than_plans_can_use() -> None:
    """I/O dies by bits 12 and 13 of an address, exchanged by bits 20 and 21, 27 and 28: docs/mi300x-placement.md."""
    home = hashed((1 | 1 << 8 | 1 << 15, 2 | 2 << 8 | 2 << 15))
    found = solve(times(home, pages=1 << 14), MI300X)
    assert isinstance(found, PageMap), found
    assert found.period == 1024 and right(found, home, IN_ORDER) == 1.0
    assert found.pattern is not None and found.pattern[:256] == MI300X.granule_sides * 64
    assert np.bincount(found.die[:1024][:: len(MI300X.granule_sides)]).tolist() == [64] * 4, "no side keeps a granule"
    with pytest.raises(ConfigError, match="use a shorter pattern"):
        place(304, MI300X, found.pattern)


@pytest.mark.parametrize("period", [4, 16, 64])
def test_votes_find_what_single_pages_do_not_show(period: int) -> None:
    home = interleaved(period // 4)
    found = solve(times(home, pages=8192, noise=60.0), MI300X)
    assert isinstance(found, PageMap), found
    assert found.agreement < 0.95  # single pages err
    assert found.period == period and right(found, home, IN_ORDER) == 1.0


def test_noise_larger_than_the_difference() -> None:
    home = interleaved(1)
    found = solve(times(home, pages=4096, noise=150.0), MI300X)
    assert isinstance(found, PageMap), found
    assert found.agreement < 0.8 and found.period == 4 and right(found, home, IN_ORDER) == 1.0


@pytest.mark.parametrize("dies", [2, 4])
@pytest.mark.parametrize("drift", [0.0, 10.0])
def test_refusals_are_no_habit(dies: int, drift: float) -> None:
    """What noise and centring do to several XCDs at once is not taken for a part of the map."""
    for seed in range(12):
        home = interleaved((1, 4, 8)[seed % 3], dies)
        found = solve(times(home, LAYOUTS[dies], pages=4096, noise=40.0, drift=drift, seed=seed), MI300X)
        assert isinstance(found, PageMap), (seed, found)
        assert right(found, home, LAYOUTS[dies]) == 1.0


@pytest.mark.parametrize(
    ("masks", "pages", "seed"),
    [
        ((0b1100110101, 0b110100010011), 512, 1114),
        ((0b110100010001, 0b11000100111), 512, 2611),
        ((0b11000011, 0b11001110), 1000, 2819),
        ((0b1010010, 0b10011, 0b10001), 256, 1516),
    ],
)
def test_a_bit_that_is_not_seen_to_repeat_makes_no_coarser_map(masks: tuple[int, ...], pages: int, seed: int) -> None:
    """Some of the bits have a period within the pages; by them alone, two dies look like one."""
    home, layout = hashed(masks), LAYOUTS[1 << len(masks)]
    for noise in (5.0, 10.0, 20.0):
        found = solve(times(home, layout, pages=pages, noise=noise, seed=seed), MI300X)
        assert isinstance(found, Refusal) or right(found, home, layout) > 0.999


@pytest.mark.parametrize("pages", [2048, 4096])
def test_a_hash_within_the_pages_is_a_period(pages: int) -> None:
    home = hashed((0b0101101, 0b1010010))
    found = solve(times(home, pages=pages), MI300X)
    assert isinstance(found, PageMap), found
    assert found.period == 128 and right(found, home, IN_ORDER) == 1.0


@pytest.mark.parametrize("seed", range(3))
def test_a_hash_beyond_the_pages_is_read_page_by_page(seed: int) -> None:
    home = hashed((0b1010101101, 0b110101010010))
    found = solve(times(home, noise=8.0, seed=seed), MI300X)
    assert isinstance(found, PageMap), found
    assert found.period is None and found.pattern is None
    assert (found.die >= 0).mean() > 0.95 and right(found, home, IN_ORDER) > 0.999


def test_a_hash_beyond_the_pages_and_noise_is_refused() -> None:
    home = hashed((0b1010101101, 0b110101010010))
    found = solve(times(home, noise=60.0), MI300X)
    assert isinstance(found, Refusal)


def test_uneven_patterns_and_their_shares() -> None:
    home = repeating((0, 0, 0, 0, 0, 1, 2, 3))
    found = solve(times(home), MI300X)
    assert isinstance(found, PageMap) and found.pattern == (0, 0, 0, 0, 0, 1, 2, 3)
    assert found.as_expected(MI300X) == ["dies hold 62%, 12%, 12%, 12% of the pages"]


@pytest.mark.parametrize("order", [(3, 0, 2, 1, 0, 3, 1, 2), (1, 1, 0, 0, 3, 3, 2, 2), (0, 1, 2, 3, 0, 1, 2, 3)])
def test_xcds_in_any_order(order: tuple[int, ...]) -> None:
    home = interleaved(4)
    found = solve(times(home, order), MI300X)
    assert isinstance(found, PageMap) and right(found, home, order) == 1.0
    assert bool(found.as_expected(MI300X)) == (found.die_of_xcd != IN_ORDER)


@pytest.mark.parametrize("dies", [2, 8])
def test_another_number_of_dies_than_expected(dies: int) -> None:
    home = interleaved(4, dies)
    found = solve(times(home, LAYOUTS[dies]), MI300X)
    assert isinstance(found, PageMap) and right(found, home, LAYOUTS[dies]) == 1.0
    assert found.as_expected(MI300X) == [f"{dies} dies with memory, not 4"]


def test_outliers() -> None:
    home = interleaved(4)
    found = solve(times(home, pages=4096, outliers=0.05), MI300X)
    assert isinstance(found, PageMap) and right(found, home, IN_ORDER) == 1.0


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 1 << 30),
    pages=st.integers(1, 3000),
    noise=st.floats(0.5, 200),
    outliers=st.floats(0, 0.1),
    drift=st.floats(0, 200),
)
def test_nothing_is_found_where_nothing_is(
    seed: int, pages: int, noise: float, outliers: float, drift: float
) -> None:  # fmt: skip
    flat = times(
        interleaved(1), pages=pages, noise=noise, farther=0, outliers=outliers, drift=drift, seed=seed
    )  # fmt: skip
    assert isinstance(solve(flat, MI300X), Refusal)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    data=st.data(),
    dies=st.sampled_from([2, 4, 8]),
    pages=st.sampled_from([200, 512, 1000, 3000]),
    noise=st.floats(1, 200),
    outliers=st.sampled_from([0, 0.01, 0.04]),
    seed=st.integers(0, 1 << 30),
)
def test_what_is_found_is_right(
    data: st.DataObject, dies: int, pages: int, noise: float, outliers: float, seed: int
) -> None:
    kind = data.draw(st.sampled_from(["interleave", "pattern", "hash"]))
    if kind == "interleave":
        home = interleaved(data.draw(st.integers(1, 16)), dies)
    elif kind == "pattern":
        rest = st.lists(st.integers(0, dies - 1), max_size=40)
        home = repeating(data.draw(st.permutations([*range(dies), *data.draw(rest)])))
    else:
        bits = dies.bit_length() - 1
        home = hashed([1 << i | data.draw(st.integers(0, 31)) << bits for i in range(bits)])
    die_of_xcd = data.draw(st.permutations(LAYOUTS[dies]))
    found = solve(times(home, die_of_xcd, pages=pages, noise=noise, outliers=outliers, seed=seed), MI300X)
    if isinstance(found, PageMap):
        assert right(found, home, die_of_xcd) > 0.999


def test_wrong_guesses_do_not_stand() -> None:
    home = interleaved(4)
    truth = solve(times(home), MI300X)
    assert isinstance(truth, PageMap)
    again = times(home, pages=3000, noise=60.0, seed=1)
    assert isinstance(verify(truth, again), PageMap)
    wrong = {
        "shifted": (np.roll(truth.die, 8), truth.die_of_xcd, 16),
        "granule": (interleaved(1)(np.arange(2048)).astype(np.int32), truth.die_of_xcd, 4),
        "dies exchanged": (truth.die, (1, 1, 0, 0, 2, 2, 3, 3), 16),
    }
    for name, (die, die_of_xcd, period) in wrong.items():
        guess = PageMap(die, die_of_xcd, period, truth.nearer_ns, truth.deviation, truth.agreement, truth.confidence)
        assert isinstance(verify(guess, again), Refusal), name


def test_a_map_without_period_ends_with_its_pages() -> None:
    home = hashed((0b1010101101, 0b110101010010))
    found = solve(times(home, noise=4.0), MI300X)
    assert isinstance(found, PageMap)
    assert isinstance(verify(found, times(home, noise=4.0, seed=1)), PageMap)
    with pytest.raises(ValueError, match="2048 pages and no period, the times have 3000"):
        verify(found, times(home, pages=3000))


@pytest.mark.parametrize(
    ("measured", "topology", "reason"),
    [
        (times(interleaved(1)), H200, "one die reads all memory"),
        (times(interleaved(1))[:1], MI300X, "one die reads all memory"),
        (times(interleaved(1))[:4], MI300X, "4 XCDs were timed, mi300x has 8"),
        (times(interleaved(1), pages=100), MI300X, "100 pages tell nothing"),
        (times(interleaved(1), farther=0), MI300X, "no dies, or too much noise"),
    ],
)
def test_refusals_say_why(measured: np.ndarray, topology: object, reason: str) -> None:
    found = solve(measured, topology)  # type: ignore[arg-type]
    assert isinstance(found, Refusal) and reason in found.reason


def test_what_is_no_time_is_no_input() -> None:
    for broken in (np.ones(8), np.zeros((8, 0)), np.zeros((8, 200)), np.full((8, 200), np.nan)):
        with pytest.raises(ValueError):
            solve(broken, MI300X)


def scattered(pages: int, *, region: int = 256, seed: int = 0) -> Home:
    """Four dies in turn, exchanged by bit 8 of a page's number, and at random every 2 MiB."""
    table = np.random.default_rng(seed).integers(0, 4, pages // (2 * region) + 1)
    return lambda page: page % 4 ^ page // region % 2 ^ table[page // (2 * region)]


@pytest.mark.parametrize(("pages", "noise"), [(4096, 20.0), (16384, 60.0), (10_000, 100.0)])
def test_regions_that_are_exchanged_at_random(pages: int, noise: float) -> None:
    home = scattered(pages)
    found = solve(times(home, pages=pages, noise=noise, outliers=0.02, drift=10.0), MI300X)
    assert isinstance(found, PageMap), found
    assert found.period is None and right(found, home, IN_ORDER) == 1.0 and (found.die >= 0).mean() > 0.9
    fitted = fit(found.die, MI300X.granule_sides, 256)
    assert fitted.refusal == ""
    exchanged = home(np.arange(len(found.die)))[::256]
    np.testing.assert_array_equal(fitted.swizzle[fitted.clear], exchanged[fitted.clear])


@pytest.mark.parametrize("skipped", [4, 100, 252])
def test_memory_that_starts_within_a_region(skipped: int) -> None:
    home = scattered(4096)
    found = solve_regions(times(lambda page: home(page + skipped), pages=3000), MI300X, skipped)
    assert isinstance(found, PageMap) and right(found, lambda page: home(page + skipped), IN_ORDER) == 1.0
    fitted = fit(found.die, MI300X.granule_sides, 256, skipped)
    assert fitted.refusal == "" and len(fitted.swizzle) == (3000 + skipped + 255) // 256
    exchanged = home(np.arange(0, 4096, 256))[: len(fitted.swizzle)]
    np.testing.assert_array_equal(fitted.swizzle[fitted.clear], exchanged[fitted.clear])
    assert fitted.clear[1:-1].all()


def test_a_region_that_noise_hides_is_left_out() -> None:
    home = scattered(8192)
    measured = times(home, pages=8192, noise=20.0)
    measured[:, 256:512] = times(home, pages=8192, noise=400.0, seed=1)[:, 256:512]
    found = solve_regions(measured, MI300X)
    assert isinstance(found, PageMap), found
    assert (found.die[256:512] == -1).all() and (found.die[512:] >= 0).all() and right(found, home, IN_ORDER) == 1.0


def test_regions_find_the_period_of_the_driver_and_the_order_of_the_dies() -> None:
    masks = (1 | 1 << 8 | 1 << 15, 2 | 2 << 8 | 2 << 15)
    order = (2, 2, 0, 0, 3, 3, 1, 1)
    for pages, period in ((1 << 14, 1024), (4096, None)):
        found = solve_regions(times(hashed(masks), order, pages=pages, noise=60.0), MI300X)
        assert isinstance(found, PageMap) and found.period == period
        assert right(found, hashed(masks), order) == 1.0
        assert fit(found.die, (0, 1, 2, 3), 256).refusal, "the dies' numbers are in another order than the parts'"


REGIONLESS = {
    "granules of four pages": (interleaved(4), MI300X, "XCDs do not fall into 4 dies"),
    "exchanged within regions": (lambda page: page % 4 ^ (page % 256 < 80), MI300X, "lie on several dies"),
    "nothing": (repeating((0,)), MI300X, "XCDs do not fall into 4 dies"),
    "no hash": (interleaved(1), H200, "how h200 hashes addresses is not known"),
}


@pytest.mark.parametrize(("home", "topology", "reason"), REGIONLESS.values(), ids=REGIONLESS)
def test_memory_without_such_regions(home: Home, topology: Topology, reason: str) -> None:
    found = solve_regions(times(home, pages=4096), topology)
    assert isinstance(found, Refusal) and reason in found.reason
    few = solve_regions(times(home, pages=100), MI300X)
    assert isinstance(few, Refusal) and "100 pages tell nothing about regions; time at least 1024" in few.reason
