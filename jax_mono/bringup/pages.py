"""Which page of memory lies on which die: solved from the times at which each XCD reads each page.

A device of several dies reads memory of its own die sooner than that of others. AMD's driver has the map from physical
addresses to dies (docs/mi300x-placement.md); a program sees virtual ones, so it is measured: every XCD times every
page, and :func:`solve` looks for

1. a period, by autocorrelation over the pages: pages that far apart are seen alike by all XCDs; or, where the topology
   has a hash of addresses, its regions, in which dies follow each other in one order but for an exchange;
2. the dies, by which XCDs see the same pages near;
3. the die of each page, by a vote of all pages of the same place in the period (or page by page, without a period);
4. a contradiction, on pages (or XCDs) that had no part in 1 to 3.

What is not clearly there is refused with the reason, and tapes are then laid without regard to dies: a wrong map costs
more than none. :mod:`jax_mono.bringup.page_statistics` has the estimates and says which of them are free of bias.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from jax_mono.bringup import page_statistics as statistics
from jax_mono.bringup.region_fit import explain
from jax_mono.topology import Topology

FEWEST_PAGES = 128
"""Below this no answer is given."""

REPEATS = 8
"""A period is believed if the pages hold it at least this often."""

_Z = 6.0
"""Standard errors by which an effect must differ from none; thousands of lags are looked at, so 3 would be too few."""

_Z_VOTE = 4.0
"""Standard errors by which the winning die of a vote must lead."""

_CONFIRMED = 0.85
"""Part of single pages that must be nearer where they should be, where no second XCD of the die confirms that."""

_HELD_BACK = 0.25
"""Part of the pages, the last ones, that only the cross-check sees."""

_PERIODS_OF_CHECK = 4
"""Of so many periods, only the cross-check sees the last, unless it is a region's first."""

_FEWEST_REGIONS = 4
"""Below this regions are no explanation: what one of them shows may be chance, or a hash of other bits."""

_KNOWN = 0.75
"""Part of the pages whose die must be clear in a map without a period."""


@dataclass(frozen=True, eq=False)
class PageMap:
    """Where pages lie.

    Attributes:
        die: int32 [pages], die of each page of the measured range; -1 for those that noise hides, which only maps
            without a period have.
        die_of_xcd: Die of each XCD; dies are numbered by their lowest XCD.
        period: Pages after which the map repeats, or None if no period was found.
        nearer_ns: How much sooner pages of the own die answer, mean of the cross-check.
        deviation: The same in standard errors.
        agreement: Of the cross-check's pages, the part that is measured nearer where it should be.
        confidence: Probability that the least certain page is placed right, by the lead of its die in the vote.
    """

    die: np.ndarray
    die_of_xcd: tuple[int, ...]
    period: int | None
    nearer_ns: float
    deviation: float
    agreement: float
    confidence: float

    @property
    def dies(self) -> int:
        """How many there are."""
        return max(self.die_of_xcd) + 1

    @property
    def pattern(self) -> tuple[int, ...] | None:
        """Die of each page of one period, or None without a period."""
        return None if self.period is None else tuple(int(die) for die in self.die[: self.period])

    def as_expected(self, topology: Topology) -> list[str]:
        """What differs from a topology: empty if it has as many dies, with the same XCDs on them, evenly filled."""
        found = []
        if self.dies != topology.io_dies.whole:
            found.append(f"{self.dies} dies with memory, not {topology.io_dies.whole}")
        elif self.die_of_xcd != tuple(topology.io_die_of(xcd) for xcd in range(len(self.die_of_xcd))):
            found.append(f"XCDs lie on dies {self.die_of_xcd}, not in the order of their numbers")
        shares = np.bincount(self.die[self.die >= 0], minlength=self.dies) / max(1, int((self.die >= 0).sum()))
        if shares.max() > 1.1 / self.dies:
            found.append(f"dies hold {', '.join(f'{share:.0%}' for share in shares)} of the pages")
        return found


@dataclass(frozen=True)
class Refusal:
    """Why there is no map; tapes are then laid without regard to dies.

    Attributes:
        reason: In words, with what would help.
    """

    reason: str


def solve(times: np.ndarray, topology: Topology) -> PageMap | Refusal:
    """Finds the map.

    Args:
        times: float32 [xcds, pages], nanoseconds that each XCD takes for a read of each page; pages in the order of
            their addresses.
        topology: The device. Only how many XCDs and at most how many dies it has is believed.

    Returns:
        The map, or why there is none.

    Raises:
        ValueError: `times` has another shape or holds what is no time.
    """
    times = _checked(times)
    xcds, pages = times.shape
    if topology.dies.whole == 1 or xcds == 1:
        return Refusal("one die reads all memory: there is nothing to tell apart")
    if xcds != topology.dies.whole:
        return Refusal(
            f"{xcds} XCDs were timed, {topology.name} has {topology.dies.whole}; time a page from every one, and see "
            "that the device is not partitioned (rocm-smi --showcomputepartition)"
        )
    if pages < FEWEST_PAGES:
        return Refusal(f"{pages} pages tell nothing; time at least {FEWEST_PAGES}")
    seen = statistics.centred(times)
    used = pages - int(pages * _HELD_BACK)
    periods = statistics.periods(seen[:, :used], most=pages // REPEATS, least_z=_Z)
    for period in periods:
        found = _periodic(times, seen, used, period)
        if isinstance(found, PageMap):
            return found
    regional = solve_regions(times, topology)
    if isinstance(regional, PageMap):
        return regional
    alone = _aperiodic(times, seen)
    if isinstance(alone, PageMap) or not periods:
        return alone
    return found


def solve_regions(times: np.ndarray, topology: Topology, skipped: int = 0) -> PageMap | Refusal:
    """Finds the map where the topology's hash of addresses holds, but for bits that all of a region have in common.

    It needs no period: regions may be exchanged at random, as those of scattered pages of a larger size are.

    Args:
        times: As for :func:`solve`; the first page starts a period.
        topology: The device; its hash, its XCDs and its dies are believed.
        skipped: Pages of the first region that come before the first page.

    Returns:
        The map, or why there is none.

    Raises:
        ValueError: `times` has another shape or holds what is no time.
    """
    times = _checked(times)
    known = topology.address_hash
    if known is None:
        return Refusal(f"how {topology.name} hashes addresses is not known")
    parts, region_pages = known.parts, known.region_bytes // known.granule_bytes
    times = times[:, : times.shape[1] // parts * parts]
    page = skipped + np.arange(times.shape[1])
    if len(page) < _FEWEST_REGIONS * region_pages:
        return Refusal(f"{len(page)} pages tell nothing about regions; time at least {_FEWEST_REGIONS * region_pages}")
    seen = statistics.centred(times)
    region = page // region_pages
    place = region * parts + page % parts
    places = int(place[-1]) + 1
    # The first period of each region always takes part.
    first = page - np.maximum(region * region_pages, skipped) < parts
    used = first | (page // parts % _PERIODS_OF_CHECK != _PERIODS_OF_CHECK - 1)
    votes = statistics.Votes(seen[:, used], place[used], places)
    groups = statistics.groups(votes.covariance())
    if groups is None or groups.max() + 1 != topology.io_dies.whole:
        return Refusal(f"XCDs do not fall into {topology.io_dies.whole} dies that see the places of a period apart")
    if statistics.Votes(seen, place, places).hides_more():
        return Refusal("pages of one place of a region lie on several dies")
    by_die, variance = votes.seen_by(groups)
    order, exchange, lead = explain(by_die.reshape(len(by_die), -1, parts))
    lead = lead / np.sqrt(variance.reshape(-1, parts).sum(axis=1))
    clear = lead >= _Z_VOTE
    if clear.mean() < _KNOWN:
        return Refusal(
            f"noise hides how {1 - clear.mean():.0%} of the regions are exchanged; time more lines of each page"
        )
    die = np.where(clear[region], np.asarray(order)[page % parts ^ exchange[region]], -1)
    check = ~used & (die >= 0)
    if not check.any():
        return Refusal("regions of one period leave none to check them by")
    period = statistics.shortest_period(die) if clear.all() else len(die)
    return _judged(
        times[:, check], die[check], groups, die=die, period=period if period * REPEATS <= len(die) else None,
        confidence=_probability(float(lead[clear].min())),
    )  # fmt: skip


def verify(guess: PageMap, times: np.ndarray) -> PageMap | Refusal:
    """Holds a map, such as one solved earlier or copied from another node, against new times of the same pages.

    Args:
        guess: The map. A period is continued if there are more pages than it has.
        times: As for :func:`solve`.

    Returns:
        The map with the figures of this cross-check, or why it does not hold.

    Raises:
        ValueError: `times` has another shape, or pages that the map does not have.
    """
    times = _checked(times)
    xcds, pages = times.shape
    if xcds != len(guess.die_of_xcd):
        return Refusal(f"the map is of {len(guess.die_of_xcd)} XCDs, {xcds} were timed")
    if pages > len(guess.die) and guess.period is None:
        raise ValueError(f"the map has {len(guess.die)} pages and no period, the times have {pages}")
    die = guess.die[np.arange(pages) % guess.period] if guess.period else guess.die[:pages]
    groups = np.asarray(guess.die_of_xcd)
    known = die >= 0
    return _judged(times[:, known], die[known], groups, die=die, period=guess.period, confidence=guess.confidence)


def _checked(times: np.ndarray) -> np.ndarray:
    times = np.asarray(times, np.float64)
    if times.ndim != 2 or 0 in times.shape:
        raise ValueError(f"times must be [xcds, pages], not {times.shape}")
    if not np.isfinite(times).all() or times.min() <= 0:
        raise ValueError("times must be positive and finite; a probe that ran into its bound has no times")
    return times


def _periodic(times: np.ndarray, seen: np.ndarray, used: int, period: int) -> PageMap | Refusal:
    """A map by a vote of all pages of the same place in the period, of which the first `used` take part."""
    place = np.arange(times.shape[1]) % period
    votes = statistics.Votes(seen[:, :used], place[:used], period)
    groups = statistics.groups(votes.covariance())
    if groups is None:
        return Refusal(f"pages repeat every {period}, but XCDs do not fall into dies of the same size")
    # A part of a hash has a period, too; then pages of one place lie on several dies.
    if statistics.Votes(seen, place, period).hides_more():
        return Refusal(f"pages repeat every {period} in part only: some bits of the address that count are not seen")
    die, lead = votes.dies(groups)
    if lead < _Z_VOTE:
        return Refusal(f"noise hides the die of some pages (lead of {lead:.1f} standard errors); time more pages")
    found = _judged(
        times[:, used:], die[place[used:]], groups, die=die[place], period=statistics.shortest_period(die),
        confidence=_probability(lead),
    )  # fmt: skip
    alone = groups.max() + 1 == len(groups)
    if alone and isinstance(found, PageMap) and found.agreement < _CONFIRMED:
        return Refusal("each die has one XCD only, and single pages do not confirm the period; time more lines a page")
    return found


def _aperiodic(times: np.ndarray, seen: np.ndarray) -> PageMap | Refusal:
    """A map page by page: one XCD of each die decides, the others check."""
    none = "no period, and "
    groups = statistics.groups(statistics.page_covariance(seen))
    if groups is None or statistics.agreement_z(seen, groups) < _Z:
        return Refusal(f"{none}XCDs do not see pages differently: no dies, or too much noise, or too few pages")
    first = np.zeros(len(groups), bool)
    first[np.unique(groups, return_index=True)[1]] = True
    noise = statistics.noise(seen, groups)
    die, lead = statistics.page_dies(seen[first], groups[first], noise)
    known = lead >= _Z_VOTE
    if known.mean() < _KNOWN:
        return Refusal(f"{none}noise hides the die of {1 - known.mean():.0%} of the pages; time more lines of each")
    check = _judged(times[np.ix_(~first, known)], die[known], groups[~first], die=die, period=None, confidence=0.0)
    if isinstance(check, Refusal):
        return check
    if check.agreement < _CONFIRMED:
        return Refusal(f"{none}the XCDs of a die agree about {check.agreement:.0%} of the pages only")
    die, lead = statistics.page_dies(seen, groups, noise)
    known = lead >= _Z_VOTE
    found = np.where(known, die, -1).astype(np.int32)
    return PageMap(
        die=found,
        die_of_xcd=tuple(int(group) for group in groups),
        period=None,
        nearer_ns=check.nearer_ns,
        deviation=check.deviation,
        agreement=check.agreement,
        confidence=_probability(float(lead[known].min())),
    )


def _judged(
    times: np.ndarray, predicted: np.ndarray, groups: np.ndarray, *, die: np.ndarray, period: int | None,
    confidence: float,
) -> PageMap | Refusal:  # fmt: skip
    """The map, if times that had no part in it show every die's pages nearer to that die."""
    check = statistics.contrast(times, predicted, groups)
    if check.weakest_z < _Z_VOTE or check.z < _Z:
        return Refusal(
            f"the cross-check does not show it: pages of the own die are {check.nearer_ns:.1f} ns nearer "
            f"({check.z:.1f} standard errors; on the weakest die {check.weakest_z:.1f})"
        )
    return PageMap(
        die=die.astype(np.int32),
        die_of_xcd=tuple(int(group) for group in groups),
        period=period,
        nearer_ns=check.nearer_ns,
        deviation=check.z,
        agreement=check.agreement,
        confidence=confidence,
    )


def _probability(deviation: float) -> float:
    """Of a normal variable to be below so many standard deviations."""
    return 0.5 * (1 + math.erf(deviation / math.sqrt(2)))
