"""What the decoder remembers between requests: the caches of the latest conversations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jax_mono.decode import Cache
from jax_mono.decoder import Decoder

WORTH_A_COPY = 32
"""Shared tokens from which copying a cache is cheaper than feeding them again."""


@dataclass(frozen=True)
class _Kept:
    """A conversation: ``tokens`` are those whose keys and values are in the cache."""

    tokens: list[int]
    cache: Cache


class Prefixes:
    """The latest conversations, the least recently used one first. For one thread.

    Args:
        decoder: Whose caches they are.
        capacity: Conversations to keep, at least 1. Each takes the memory of a whole context.
    """

    def __init__(self, decoder: Decoder, capacity: int) -> None:
        self._decoder, self._capacity = decoder, capacity
        self._kept: list[_Kept] = []

    def __len__(self) -> int:
        """Conversations that are kept."""
        return len(self._kept)

    def take(self, prompt: Sequence[int]) -> tuple[Cache, int]:
        """A cache to run a prompt with; it leaves this memory until :meth:`put` brings it back.

        A conversation that the prompt continues goes on in its own cache. One that shares a beginning but has much else
        is copied and lives on. Otherwise the oldest cache is emptied, so that memory does not grow.

        Args:
            prompt: Tokens; none for a cache with nothing in it.

        Returns:
            The cache, and how many tokens of the prompt are in it: all but one at most, since one must be fed.
        """
        shared = [common(kept.tokens, prompt[:-1]) for kept in self._kept]
        best = max(range(len(shared)), key=shared.__getitem__, default=-1)
        if best >= 0:
            kept, length = self._kept[best], shared[best]
            if length and (2 * length >= len(kept.tokens) or self._capacity == 1):
                del self._kept[best]
                return kept.cache.keep(length), length
            if length >= WORTH_A_COPY:
                if len(self._kept) == self._capacity:  # makes room first: memory stays within its bound
                    oldest = 1 if best == 0 else 0
                    del self._kept[oldest]
                return kept.cache.keep(length).copy(), length
        if len(self._kept) == self._capacity:
            return self._kept.pop(0).cache.keep(0), 0
        return self._decoder.new_cache(), 0

    def put(self, tokens: Sequence[int], cache: Cache) -> None:
        """Remembers a conversation as the latest one."""
        self._kept.append(_Kept(list(tokens[: int(cache.fed)]), cache))


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    length = min(len(first), len(second))
    for index in range(length):
        if first[index] != second[index]:
            return index
    return length
