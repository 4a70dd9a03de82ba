"""Drops documents that repeat others, and documents that know the problems of HumanEval."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np

_LINES = 5
"""Lines of a window; two files share a window if they share so many lines in a row."""
_MOST_SEEN = 0.5
"""A document is dropped if more of its windows were seen before."""

_WORDS = 13
"""Words in a row that make a document suspect, as in GPT-3 (arXiv:2005.14165, appendix C)."""
_WORD = re.compile(r"\w+")


class Duplicates:
    """Remembers all windows of five lines, blank lines and indentation aside."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def is_new(self, text: str) -> bool:
        """Whether most of a document was not seen before; if so it is remembered.

        Hashes have 64 bits and depend on the process (``PYTHONHASHSEED``), the outcome, collisions aside, does not.
        """
        lines = [stripped for line in text.splitlines() if (stripped := line.strip())]
        if len(lines) < _LINES:
            windows = {hash(tuple(lines))}
        else:
            windows = {hash(tuple(lines[index : index + _LINES])) for index in range(len(lines) - _LINES + 1)}
        if len(windows & self._seen) > _MOST_SEEN * len(windows):
            return False
        self._seen |= windows
        return True


class Contamination:
    """Finds runs of 13 words that given texts contain."""

    def __init__(self, texts: Iterable[str]) -> None:
        """Remembers all runs of the texts.

        Args:
            texts: Prompts, solutions and tests. Shorter ones than 13 words are of no use.
        """
        self._ids: dict[str, int] = {}
        runs = []
        for text in texts:
            words = _WORD.findall(text.lower())
            ids = [self._ids.setdefault(word, len(self._ids) + 1) for word in words]
            runs.append(_runs(ids))
        self._runs = np.unique(np.concatenate(runs)) if runs else np.empty(0, np.uint64)

    def touches(self, text: str) -> bool:
        """Whether a document has one of the runs."""
        ids = list(map(self._ids.get, _WORD.findall(text.lower())))
        array = np.array([0 if one is None else one for one in ids], np.uint64)
        if len(array) < _WORDS:
            return False
        known = np.convolve(array > 0, np.ones(_WORDS, np.int64), "valid") == _WORDS
        return bool(known.any() and np.isin(_runs(array)[known], self._runs).any())


def _runs(ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """A hash of every run of words; arithmetic modulo 2**64."""
    array = np.asarray(ids, np.uint64)
    count = len(array) - _WORDS + 1
    if count < 1:
        return np.empty(0, np.uint64)
    hashes = np.zeros(count, np.uint64)
    for offset in range(_WORDS):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + array[offset : offset + count]
    return hashes
