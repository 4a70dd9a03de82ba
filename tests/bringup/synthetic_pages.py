"""Times of pages as a device of several dies might show them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Home = Callable[[np.ndarray], np.ndarray]
"""Page numbers -> die of each."""


def interleaved(granule: int, dies: int = 4) -> Home:
    """Granules of so many pages go round the dies."""
    return lambda page: page // granule % dies


def repeating(pattern: Sequence[int]) -> Home:
    return lambda page: np.asarray(pattern)[page % len(pattern)]


def hashed(masks: Sequence[int]) -> Home:
    """Each bit of the die is the parity of some bits of the page's number."""

    def home(page: np.ndarray) -> np.ndarray:
        bits = [np.bitwise_count(page & mask) % 2 for mask in masks]
        return sum((bit.astype(int) << i for i, bit in enumerate(bits)), np.zeros(len(page), int))

    return home


def times(
    home: Home,
    die_of_xcd: Sequence[int] = (0, 0, 1, 1, 2, 2, 3, 3),
    *,
    pages: int = 2048,
    noise: float = 20.0,
    farther: float = 60.0,
    outliers: float = 0.0,
    drift: float = 0.0,
    seed: int = 0,
) -> np.ndarray:
    """float32 [xcds, pages] nanoseconds.

    A read takes 700 ns, more by an amount that an XCD or a page has for all, `farther` more to the next dies and a half
    more again to the opposite one, normal noise of that deviation, and at times much longer (refresh, a page walk).
    """
    draw = np.random.default_rng(seed)
    xcds, dies = len(die_of_xcd), max(die_of_xcd) + 1
    steps = np.abs(np.arange(dies)[:, None] - np.arange(dies))
    steps = np.minimum(steps, dies - steps)
    distance = np.where(steps == 0, 0.0, np.where(steps == 1, farther, 1.5 * farther))
    where = home(np.arange(pages))
    found = 700 + draw.normal(0, 30, (xcds, 1)) + draw.normal(0, 30, (1, pages))
    found = found + distance[np.asarray(die_of_xcd)[:, None], where] + draw.normal(0, noise, (xcds, pages))
    phase = draw.uniform(0, 2 * np.pi, (xcds, 1))
    found = found + drift * np.sin(2 * np.pi * np.arange(pages) / pages + phase)
    late = draw.random((xcds, pages)) < outliers
    return np.where(late, found + draw.exponential(2000, (xcds, pages)), found).clip(1).astype(np.float32)
