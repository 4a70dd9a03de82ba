"""Bits per byte of given text: how well a model predicts it, comparable between tokenizers."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jax_mono.tokenizer import Tokenizer

Score = Callable[[Sequence[int]], np.ndarray]
"""Log-probabilities in nats, float [T - 1], of every given token but the first."""


@dataclass
class Bits:
    """Sums over documents.

    Attributes:
        documents: How many.
        bytes: UTF-8 bytes of all scored text.
        tokens: Scored tokens.
        nats: Negative log-likelihood.
    """

    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    nats: float = 0.0

    @property
    def bits_per_byte(self) -> float:
        """The number to compare."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan

    def record(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self) | {"bits_per_byte": self.bits_per_byte}


def windows(tokens: int, context: int, fresh: int) -> Iterator[tuple[int, int, int]]:
    """Cuts a document into windows such that every token but the first is scored once.

    The first window scores all it has. Each of the others scores up to ``fresh`` new tokens and repeats as many of the
    old ones as fit before them.

    Args:
        tokens: Length of the document.
        context: Tokens that a window may have, at least 2.
        fresh: New tokens of a window, below ``context``.

    Yields:
        First token of the window, first token that it scores, one past the last.
    """
    done = 1
    while done < tokens:
        end = min(tokens, context if done == 1 else done + fresh)
        yield max(0, end - context), done, end
        done = end


def add_document(
    bits: Bits, text: str, tokenizer: Tokenizer, start: int | None, score: Score, context: int, fresh: int
) -> None:
    """Scores a document.

    Args:
        bits: Sums to add to.
        text: The document.
        tokenizer: The model's.
        start: Token that stands before a document in training, or None. Without one the first token of a document
            cannot be scored (nor can more, if it is half a character), and its bytes do not count.
        score: Scores tokens.
        context: See :func:`windows`.
        fresh: See :func:`windows`.
    """
    ids = tokenizer.encode(text, add_special_tokens=False)
    if not ids:
        return
    given, known = (1, "") if start is not None else _opening(text, ids, tokenizer)
    if start is not None:
        ids = [start, *ids]
    nats = 0.0
    for begin, first, end in windows(len(ids), context, fresh):
        scored = score(ids[begin:end])[max(first, given) - begin - 1 :]
        nats -= float(np.sum(scored, dtype=np.float64))
    bits.documents += 1
    bits.bytes += len(text.encode()) - len(known.encode())
    bits.tokens += len(ids) - given
    bits.nats += nats


def _opening(text: str, ids: Sequence[int], tokenizer: Tokenizer) -> tuple[int, str]:
    """The fewest tokens, and their text, that are whole characters."""
    for count in range(1, len(ids)):
        piece = tokenizer.decode(ids[:count], skip_special_tokens=False)
        if piece and text.startswith(piece):
            return count, piece
    return len(ids), text


def read_documents(paths: Sequence[str | Path]) -> Iterator[tuple[str, str]]:
    """Reads text.

    Args:
        paths: Text files; directories, all of whose ``.py`` files are read; ``.jsonl`` and ``.jsonl.gz`` files, each
            line an object with ``text``.

    Yields:
        Name and text of each document.

    Raises:
        FileNotFoundError: A path is not there.
        ValueError: A line has no text, or a file is not UTF-8.
    """
    for path in map(Path, paths):
        if path.is_dir():
            yield from read_documents(sorted(path.rglob("*.py")))
        elif path.name.endswith((".jsonl", ".jsonl.gz")):
            data = path.read_bytes()
            for number, line in enumerate((gzip.decompress(data) if path.suffix == ".gz" else data).splitlines(), 1):
                row = json.loads(line)
                if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                    raise ValueError(f"{path}: line {number} is no object with 'text'")
                yield str(row.get("path", number)), row["text"]
        else:
            yield str(path), path.read_text(encoding="utf-8")
