"""How long a block takes to receive words that become visible at known times."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from jax_mono.simulate.programs import Program


@dataclass(frozen=True)
class Loads:
    """Words of one receive in the order in which a block's threads ask for them.

    Attributes:
        writers: int64 [rounds, warps, lanes], whose words; -1 for lanes without one.
        distinct: All writers, sorted.
        words: How many words.
    """

    writers: np.ndarray
    distinct: np.ndarray
    words: int

    @classmethod
    def of(cls, writers: np.ndarray, program: Program) -> Loads:
        """Deals words out to threads as ``Link::read`` does: the i-th to thread i mod threads.

        Args:
            writers: int64 [words], who writes each.
            program: Says how many threads there are.
        """
        rounds = -(-len(writers) // program.threads)
        padded = np.full(rounds * program.threads, -1)
        padded[: len(writers)] = writers
        return cls(padded.reshape(rounds, -1, program.warp), np.unique(writers), len(writers))


@dataclass(frozen=True)
class Arrivals:
    """When words become visible to all who wait for them.

    Attributes:
        last: The last of all.
        warps: float64 [rounds, warps], the last of a warp's lanes.
    """

    last: float
    warps: np.ndarray

    @classmethod
    def of(cls, loads: Loads, visible: np.ndarray) -> Arrivals:
        """Looks up all words.

        Args:
            loads: The words.
            visible: By writer, from when on a load finds its words; must be known of all of them.
        """
        times = np.where(loads.writers >= 0, visible[loads.writers], -np.inf).max(axis=2)
        return cls(float(visible[loads.distinct].max()), times)


def finish(
    loads: Loads, arrivals: Arrivals, began: float, *, trip: float, program: Program, batch: int, bytes_rate: float
) -> float:
    """When a block has all words.

    Args:
        loads: The words.
        arrivals: When they become visible.
        began: When the block begins to ask.
        trip: Nanoseconds from asking to having, under the load of the moment.
        program: How it polls.
        batch: Words that a thread asks for at once.
        bytes_rate: Bytes per nanosecond that the block gets at most.

    Returns:
        The time, on the clock of ``arrivals``.
    """
    floor = began + trip + 16 * loads.words / bytes_rate
    period = trip + program.pause_ns
    if program.polls == "together":
        # All that is missing is asked for again in each period; a poll finds what is visible half a trip after it.
        missed = max(0, math.ceil((arrivals.last - began - trip / 2) / period))
        return max(floor, began + missed * period + trip)
    now = np.full(arrivals.warps.shape[1], began)
    for first in range(0, len(arrivals.warps), batch):
        group = arrivals.warps[first : first + batch]
        asked, now = now, now + trip
        while (missing := group > asked + trip / 2).any():
            # Each warp waits for the last of its words that are missing, then asks for all again.
            last = len(group) - 1 - missing[::-1].argmax(axis=0)
            late = np.take_along_axis(group, last[None], axis=0)[0]
            missed = np.maximum(0, np.ceil((late - now - trip / 2) / period))
            any_missing = missing.any(axis=0)
            asked = np.where(any_missing, now + missed * period + trip, asked)
            now = np.where(any_missing, asked + trip, now)
    return max(floor, float(now.max()))
