"""Tokens on disk, and which of them a step of training sees."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

DTYPE = np.dtype("<u2")
"""Little-endian 16 bits: vocabularies have at most 65,536 entries."""


def append(file: Path, tokens: Iterator[list[int]]) -> int:
    """Writes a token file, document after document, and returns the number of tokens."""
    count = 0
    with file.open("wb") as out:
        for document in tokens:
            np.asarray(document, DTYPE).tofile(out)
            count += len(document)
    return count


class Batches:
    """Sequences of a token file in an order that only the seed decides.

    Every epoch shows every sequence once, in an order of its own. A step is a pure function of its number, so training
    goes on after an interruption with exactly the batches that it would have seen.

    Attributes:
        tokens: uint16 [N], memory-mapped.
        length: Tokens of a sequence that are predicted.
        size: Sequences of a batch.
        seed: Of the order.
    """

    def __init__(self, file: Path, *, length: int, size: int, seed: int) -> None:
        """Opens a token file.

        Args:
            file: Written by :func:`append`.
            length: Tokens of a sequence that are predicted.
            size: Sequences of a batch.
            seed: Of the order.

        Raises:
            ValueError: The file is shorter than one sequence.
        """
        self.tokens = np.memmap(file, DTYPE, mode="r")
        self.length, self.size, self.seed = length, size, seed
        self.sequences = (len(self.tokens) - 1) // length
        if self.sequences < 1:
            raise ValueError(f"{file}: {len(self.tokens)} tokens are fewer than a sequence of {length + 1}")

    def batch(self, step: int) -> np.ndarray:
        """The batch of a step.

        Args:
            step: From 0.

        Returns:
            int32 [size, length + 1]; the last token of a sequence is the first of the one behind it in the file.
        """
        first = step * self.size
        rows = [self._sequence(index) for index in range(first, first + self.size)]
        starts = np.asarray(rows)[:, None] * self.length
        return self.tokens[starts + np.arange(self.length + 1)].astype(np.int32)

    def _sequence(self, index: int) -> int:
        epoch, place = divmod(index, self.sequences)
        return int(self._order(epoch)[place])

    def _order(self, epoch: int) -> np.ndarray:
        if getattr(self, "_epoch", None) != epoch:
            self._epoch = epoch
            self._permutation = np.random.default_rng([self.seed, epoch]).permutation(self.sequences)
        return self._permutation


def in_order(file: Path, *, length: int, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All tokens of a file in batches, for evaluation; every token but the first is predicted once.

    Args:
        file: Written by :func:`append`.
        length: Tokens of a sequence that are predicted.
        size: Sequences of a batch.

    Yields:
        int32 [size, length + 1], padded with zeros, and bool [size, length]: which predictions count.
    """
    tokens = np.memmap(file, DTYPE, mode="r")
    predicted = len(tokens) - 1
    span = length * size
    for start in range(0, predicted, span):
        block = np.zeros(span + 1, np.int32)
        part = tokens[start : start + span + 1]
        block[: len(part)] = part
        index = np.arange(size)[:, None] * length + np.arange(length + 1)
        yield block[index], (start + index[:, :-1]) < predicted
