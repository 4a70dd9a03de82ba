"""Estimates behind :mod:`jax_mono.bringup.pages`.

Notation: `seen` is float64 [xcds, pages], times without what all XCDs have in common for a page and without what an XCD
has in common for all pages. Two kinds of estimate are used because noise does not shift them: products of different
pages of the same place in the period (their noises are independent), and differences between products of XCDs of the
same and of different dies (what centring does to the noise is the same for every pair).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_CLIPPED = 0.06
"""Part of an XCD's times on each side that is taken for outliers; a die has far more of the pages."""

_ALIKE = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5)
"""Correlations above which XCDs are taken for neighbours, strictest first."""

_UNEXPLAINED = 0.1
"""Part of the variance between places that pages of one place may have in common besides: channels, banks."""

_FEWEST = 8
"""Pages of a die below which nothing is said about it."""


def centred(times: np.ndarray) -> np.ndarray:
    """Takes page, XCD and outliers out of times.

    Args:
        times: [xcds, pages], nanoseconds.

    Returns:
        [xcds, pages], nanoseconds: lower for pages that this XCD sees nearer than others do.
    """
    seen = times - np.median(times, axis=0)
    low, high = np.quantile(seen, (_CLIPPED, 1 - _CLIPPED), axis=1, keepdims=True)
    seen = np.clip(seen, low, high)
    # The median is proof against outliers; but to whom it passes noise on depends on where the page is.
    seen -= seen.mean(axis=0)
    return seen - seen.mean(axis=1, keepdims=True)


def periods(seen: np.ndarray, *, most: int, least_z: float) -> list[int]:
    """Periods that the pages may have, the most likely one first.

    Lags are chosen by autocorrelation. Of these, the shortest one is taken that predicts pages as well as any: the
    first half of the pages predicts the second, place by place.

    Args:
        seen: [xcds, pages].
        most: Longest period, of which half of the pages hold one at least.
        least_z: Standard errors by which an autocorrelation must differ from none.

    Returns:
        At most two periods: the shortest good one and the best one.
    """
    pages = seen.shape[1]
    spectrum = (np.abs(np.fft.rfft(seen, 2 * pages, axis=1)) ** 2).sum(axis=0)
    pairs = pages - np.arange(1, most + 1)
    values = np.fft.irfft(spectrum, 2 * pages)[1 : most + 1] / pairs
    # The variance of a sum over XCDs of products of independent pages.
    error = np.sqrt(((seen @ seen.T / pages) ** 2).sum() / pairs)
    clear = values >= least_z * error
    if not clear.any():
        return []
    # A page and its successor are often on one die, so lags that are no periods may be nearly as good.
    lags = np.flatnonzero(clear & (values >= 0.7 * values[clear].max() - 2 * error)) + 1
    scores = np.stack([_predicted(seen, int(lag)) for lag in lags])
    means = scores.mean(axis=1)
    best = int(means.argmax())
    behind = scores[best] - scores
    # The best of many is best by luck, too.
    tolerance = 4 * behind.std(axis=1) / np.sqrt(scores.shape[1])
    shortest = int(np.flatnonzero(behind.mean(axis=1) <= tolerance)[0])
    return list(dict.fromkeys((int(lags[shortest]), int(lags[best]))))


def _predicted(seen: np.ndarray, period: int) -> np.ndarray:
    """Products of the pages of the second half with the mean of those of their place in the first, summed over XCDs."""
    half = seen.shape[1] // 2
    rows = half // period
    means = seen[:, : rows * period].reshape(-1, rows, period).mean(axis=1)
    places = np.arange(half, seen.shape[1]) % period
    return np.einsum("xp,xp->p", means[:, places], seen[:, half:])


def shortest_period(die: np.ndarray) -> int:
    """The shortest period of a pattern that repeats; its length at most."""
    length = len(die)
    return next(p for p in range(1, length + 1) if length % p == 0 and (die.reshape(-1, p) == die[:p]).all())


class Votes:
    """Pages put together by their place in a period.

    Args:
        seen: [xcds, pages].
        place: [pages], of each page, below `period`; every place has a page.
        period: Places.
    """

    def __init__(self, seen: np.ndarray, place: np.ndarray, period: int) -> None:
        self._counts = np.bincount(place, minlength=period)
        sums = np.stack([np.bincount(place, weights=row, minlength=period) for row in seen])
        self._means = sums / self._counts
        rest = seen - self._means[:, place]
        self._noise = rest @ rest.T / max(1, len(place) - period)

    def covariance(self) -> np.ndarray:
        """[xcds, xcds], of what XCDs see of places, diagonal included without noise."""
        return self._means @ self._means.T / len(self._counts) - self._noise * (1 / self._counts).mean()

    def hides_more(self) -> bool:
        """Whether two XCDs agree about what pages of one place do not have in common.

        Then the map has a part that does not repeat, and XCDs that it tells apart may have been put on one die. Noise
        of two XCDs has nothing in common but what centring does, which is the same for every pair.
        """
        noise = self._noise
        excess = noise - noise[~np.eye(len(noise), dtype=bool)].mean()
        error = np.sqrt(np.outer(np.diag(noise), np.diag(noise)) / self._counts.sum())
        beyond = excess > np.maximum(_UNEXPLAINED * np.diag(self.covariance()).mean(), 4 * error)
        return bool(beyond[~np.eye(len(noise), dtype=bool)].any())

    def dies(self, groups: np.ndarray) -> tuple[np.ndarray, float]:
        """The die of each place.

        Args:
            groups: [xcds], die of each XCD.

        Returns:
            int [period], and by how many standard errors the least certain place was decided.
        """
        die, lead = _vote(self._means, groups, self._noise, self._counts)
        return die, float(lead.min())

    def seen_by(self, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How each die sees each place, lower where it is nearer.

        Args:
            groups: [xcds], die of each XCD.

        Returns:
            float [dies, period], and the variance of the difference of two dies there, [period].
        """
        member = _members(groups)
        spread = member @ self._noise @ member.T
        # Of all pairs of dies, the least certain one.
        own = np.diag(spread)
        return member @ self._means, (own[:, None] + own - 2 * spread).max() / self._counts


def page_dies(seen: np.ndarray, groups: np.ndarray, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """The die of each page by itself.

    Args:
        seen: [xcds, pages].
        groups: [xcds], die of each XCD.
        noise: Variance of one time.

    Returns:
        int [pages], and by how many standard errors each was decided, [pages].
    """
    return _vote(seen, groups, np.eye(len(groups)) * noise, np.ones(seen.shape[1]))


def _vote(
    means: np.ndarray, groups: np.ndarray, noise: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The die that sees each column nearest, and its lead in standard errors; `noise` is [xcds, xcds] of one page."""
    member = _members(groups)
    scores = member @ means
    order = np.argsort(scores, axis=0)
    best, next_best = order[0], order[1]
    columns = np.arange(scores.shape[1])
    lead = scores[next_best, columns] - scores[best, columns]
    spread = member @ noise @ member.T
    variance = spread[best, best] + spread[next_best, next_best] - 2 * spread[best, next_best]
    return best, lead / np.sqrt(np.maximum(variance, 1e-12) / counts)


def _members(groups: np.ndarray) -> np.ndarray:
    """[dies, xcds], what takes the mean of a die's XCDs."""
    member = np.stack([groups == group for group in range(groups.max() + 1)]).astype(float)
    return member / member.sum(axis=1, keepdims=True)


def page_covariance(seen: np.ndarray) -> np.ndarray:
    """[xcds, xcds], of what XCDs see of pages; nan on the diagonal, where there is noise."""
    covariance = seen @ seen.T / seen.shape[1]
    covariance -= covariance[~np.eye(len(covariance), dtype=bool)].min()  # what centring does to all pairs alike
    np.fill_diagonal(covariance, np.nan)
    return covariance


def groups(covariance: np.ndarray) -> np.ndarray | None:
    """Which XCDs lie on one die.

    Args:
        covariance: [xcds, xcds]. Where the diagonal is nan, each XCD's largest covariance stands for it, so that no XCD
            can be alone.

    Returns:
        int [xcds], die of each XCD, numbered by their lowest XCD; None if there are no two dies of the same size.
    """
    xcds = len(covariance)
    own = np.diag(covariance)
    alone = not np.isnan(own).any()
    if not alone:
        own = np.nanmax(covariance, axis=1)
    if own.min() <= 0:
        return None
    alike = covariance / np.sqrt(np.outer(own, own))
    np.fill_diagonal(alike, 1.0)
    for least in _ALIKE:
        near = alike > least
        # Cliques: neighbours have the same neighbours.
        if (near == near[near.argmax(axis=1)]).all():
            found = np.unique(near.argmax(axis=1), return_inverse=True)[1]
            sizes = np.bincount(found)
            if len(sizes) > 1 and sizes.min() == sizes.max() > 1:
                return found
    off = alike[~np.eye(xcds, dtype=bool)]
    return np.arange(xcds) if alone and off.max() < _ALIKE[-1] else None


def _pairs(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Masks [xcds, xcds] of pairs of different XCDs: of one die, of two."""
    same = groups[:, None] == groups
    return same & ~np.eye(len(groups), dtype=bool), ~same


def agreement_z(seen: np.ndarray, groups: np.ndarray) -> float:
    """Standard errors by which XCDs of one die agree about pages more than those of two; 0 if each die has one XCD."""
    same, other = _pairs(groups)
    if not same.any():
        return 0.0

    def products(pairs: np.ndarray) -> np.ndarray:
        return np.einsum("xp,xy,yp->p", seen, pairs.astype(float), seen) / pairs.sum()

    differences = products(same) - products(other)
    return float(differences.mean() / (differences.std() / np.sqrt(len(differences)) + 1e-12))


def noise(seen: np.ndarray, groups: np.ndarray) -> float:
    """Variance of one time, from differences between XCDs of one die, which see pages alike."""
    same, _ = _pairs(groups)
    return max(float(np.mean([np.var(seen[a] - seen[b]) / 2 for a, b in np.argwhere(same)])), 1e-12)


@dataclass(frozen=True)
class Contrast:
    """How times bear out a prediction.

    Attributes:
        nearer_ns: By how much pages are nearer to XCDs of their own die than to the others.
        z: The same in standard errors.
        weakest_z: Of the die whose pages show it least; 0 for a die with hardly any pages.
        agreement: Part of the pages that are nearer at all.
    """

    nearer_ns: float
    z: float
    weakest_z: float
    agreement: float


def contrast(times: np.ndarray, die: np.ndarray, groups: np.ndarray) -> Contrast:
    """Compares each page's times on its own die with those on the others.

    Args:
        times: [xcds, pages], nanoseconds.
        die: int [pages], the prediction.
        groups: int [xcds], die of each XCD.
    """
    seen = centred(times)
    own = groups[:, None] == die
    near = (seen * own).sum(axis=0) / np.maximum(own.sum(axis=0), 1)
    far = (seen * ~own).sum(axis=0) / np.maximum((~own).sum(axis=0), 1)
    nearer = far - near

    def z(values: np.ndarray) -> float:
        if len(values) < _FEWEST:
            return 0.0
        return float(values.mean() / (values.std() / np.sqrt(len(values)) + 1e-12))

    each = [z(nearer[die == group]) for group in np.unique(groups)]
    return Contrast(float(nearer.mean()), z(nearer), min(each), float((nearer > 0).mean()))
