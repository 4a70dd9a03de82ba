"""Dealing out: numbered items, handed to parts in consecutive runs."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """A contiguous range of ``count`` items starting at ``first``."""

    first: int
    count: int

    @property
    def stop(self) -> int:
        """One past the last item."""
        return self.first + self.count


def even_counts(total: int, parts: int) -> list[int]:
    """Cuts ``total`` into ``parts`` counts that differ by at most one, larger ones first."""
    return [total // parts + (part < total % parts) for part in range(parts)]


def spread_counts(total: int, parts: int) -> list[int]:
    """Cuts ``total`` into ``parts`` counts that differ by at most one, and neighbouring parts together likewise."""
    return [(part + 1) * total // parts - part * total // parts for part in range(parts)]


def fill(load: Sequence[int], items: int, weight: int, at_least: int = 0, even: bool = False) -> list[int]:
    """Hands out ``items`` of equal ``weight``, each to the part that carries least.

    Args:
        load: What each part carries already.
        items: How many items to hand out; at least ``at_least * len(load)``.
        weight: Load of one item.
        at_least: Items every part gets in any case.
        even: Whether, of parts that carry equally little, the one with fewer items goes first; else the first one.

    Returns:
        Items per part.
    """
    counts = [at_least] * len(load)
    heap = [(done + at_least * weight, 0, part) for part, done in enumerate(load)]
    heapq.heapify(heap)
    for _ in range(items - at_least * len(load)):
        done, _, part = heap[0]
        counts[part] += 1
        heapq.heapreplace(heap, (done + weight, counts[part] if even else 0, part))
    return counts


def spans(counts: Iterable[int]) -> tuple[Span, ...]:
    """Consecutive runs of so many items, from item 0 on."""
    first, runs = 0, []
    for count in counts:
        runs.append(Span(first, count))
        first += count
    return tuple(runs)


def clip(runs: Iterable[Span], total: int) -> tuple[Span, ...]:
    """The same runs without items from ``total`` on."""
    return tuple(Span(run.first, min(run.stop, total) - run.first) for run in runs)
