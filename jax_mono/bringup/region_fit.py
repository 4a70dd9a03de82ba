"""How regions of memory exchange the dies of a period: one number of each region explains all its pages.

So all pages of a region vote for it together, and some wrong ones do not matter. :func:`explain` finds the numbers, and
the order of the dies, from times; :func:`fit` the swizzle that tapes need (:mod:`jax_mono.swizzle`), from a map.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FEWEST_KNOWN = 8
"""Pages of a region whose die is known, below which nothing is said about it."""

LEAST_AGREEMENT = 0.6
"""Of a region's known pages, the part that must lie as its swizzle says."""

LEAST_LEAD = 0.25
"""Of a region's known pages, the part by which its swizzle must explain more than any other."""

MOST_UNCLEAR = 1 / 8
"""Of the regions, the part that may stay without a swizzle; beyond it memory is not what the pattern says."""


@dataclass(frozen=True, eq=False)
class Fit:
    """What a map says about the swizzle.

    Attributes:
        swizzle: int32 [regions]; zero where the map does not say, and everywhere if it is refused.
        agreement: float64 [regions], of the known pages, the part that lies as the region's best swizzle says.
        clear: bool [regions], whether the region follows the pattern.
        refusal: Why the map is not used, or empty.
    """

    swizzle: np.ndarray
    agreement: np.ndarray
    clear: np.ndarray
    refusal: str = ""


def explain(seen: np.ndarray) -> tuple[tuple[int, ...], np.ndarray, np.ndarray]:
    """Finds the order of dies and the exchanges of regions that put pages as near as can be.

    Args:
        seen: float [dies, regions, places of a period], how each die sees the pages of a place, lower where it is
            nearer; as many places as dies, or a multiple of it, and a power of two.

    Returns:
        Die of each place where nothing is exchanged; the exchange of each region, int [regions]: place i is then as
        place i ^ exchange was; and by how much the next best one puts the region's pages farther, [regions].
    """
    dies, _, period = seen.shape
    places = np.arange(period)
    best: tuple[float, tuple[int, ...], np.ndarray] | None = None
    # Orders that differ by an exchange of all regions are the same; the first of them is found first.
    for order in sorted(set(itertools.permutations(np.repeat(np.arange(dies), period // dies).tolist()))):
        sides = np.asarray(order)[places ^ places[:, None]]
        far = np.stack([seen[row, :, places].sum(axis=0) for row in sides])  # [exchanges, regions]
        total = float(far.min(axis=0).sum())
        if best is None or total < best[0] - 1e-9 * abs(total):
            best = total, order, far
    assert best is not None
    _, order, far = best
    sides = np.asarray(order)[places ^ places[:, None]]
    _, distinct = np.unique(sides, axis=0, return_index=True)
    distinct = np.sort(distinct)
    ranked = np.sort(far[distinct], axis=0)
    return order, distinct[far[distinct].argmin(axis=0)], ranked[1] - ranked[0]


def fit(die: np.ndarray, pattern: Sequence[int], region_pages: int, skipped: int = 0) -> Fit:
    """Finds the swizzle of every region.

    Args:
        die: int [pages], the die of each page, -1 if unknown. The last region may be cut off.
        pattern: Sides of the granules of a period, each a page, without a swizzle; a power of two of them.
        region_pages: Pages of a region, whole periods.
        skipped: Pages of the first region that come before the first page, whole periods.

    Returns:
        The fit.

    Raises:
        ValueError: There is no swizzle for such a pattern.
    """
    period = len(pattern)
    if len(set(pattern)) < 2 or period & (period - 1) or region_pages % period:
        raise ValueError(f"regions of {region_pages} pages cannot be exchanged by a pattern of {period}")
    regions = -(-(skipped + len(die)) // region_pages)
    pages = np.full(regions * region_pages, -1)
    pages[skipped : skipped + len(die)] = die
    pages = pages.reshape(regions, -1, period)
    # Exchanges between granules of one side make no difference; the first of them stands for all.
    sides = np.asarray(pattern)[np.arange(period) ^ np.arange(period)[:, None]]
    _, exchanges = np.unique(sides, axis=0, return_index=True)
    exchanges = np.sort(exchanges)
    votes = np.stack([(pages == sides[exchange]).sum(axis=(1, 2)) for exchange in exchanges])
    known = (pages >= 0).sum(axis=(1, 2))
    ranked = np.sort(votes, axis=0)
    agreement = ranked[-1] / np.maximum(known, 1)
    lead = (ranked[-1] - ranked[-2]) / np.maximum(known, 1)
    clear = (known >= FEWEST_KNOWN) & (agreement >= LEAST_AGREEMENT) & (lead >= LEAST_LEAD)
    swizzle = np.where(clear, exchanges[votes.argmax(axis=0)], 0).astype(np.int32)
    unclear = 1 - clear.mean()
    if unclear <= MOST_UNCLEAR:
        return Fit(swizzle, agreement, clear)
    return Fit(
        np.zeros_like(swizzle), agreement, clear,
        f"{unclear:.0%} of the regions do not follow the pattern {tuple(pattern)}, however it is exchanged "
        f"(on average it explains {agreement.mean():.0%} of their pages)",
    )  # fmt: skip
