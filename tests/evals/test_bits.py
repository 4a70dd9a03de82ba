"""Bits per byte: every token is scored once, with as much before it as fits."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from jax_mono.evals.bits import Bits, add_document, read_documents, windows
from jax_mono.tokenizer import Tokenizer


def byte_tokenizer() -> Tokenizer:
    """One token per byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend)


@pytest.mark.parametrize("tokens", [2, 7, 8, 9, 30, 64])
@pytest.mark.parametrize(("context", "fresh"), [(8, 4), (8, 7), (2, 1), (100, 50)])
def test_windows_score_every_token_once(tokens: int, context: int, fresh: int) -> None:
    scored = []
    for begin, first, end in windows(tokens, context, fresh):
        assert 0 <= begin < first < end <= tokens and end - begin <= context
        assert first == 1 or first - begin >= min(first, context - fresh)
        scored += range(first, end)
    assert scored == list(range(1, tokens))


def test_a_uniform_model_needs_eight_bits_per_byte() -> None:
    def uniform(tokens: Sequence[int]) -> np.ndarray:
        assert 2 <= len(tokens) <= 16
        return np.full(len(tokens) - 1, -math.log(256))

    for start, size in ((0, 104), (None, 101)):
        bits = Bits()
        for text in ("é" * 50, "", "abcd"):
            add_document(bits, text, byte_tokenizer(), start, uniform, 16, 8)
        assert (bits.documents, bits.bytes, bits.tokens) == (2, size, size)
        assert bits.bits_per_byte == pytest.approx(8.0)


def test_documents(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.py").write_text("a = 1")
    (tmp_path / "src" / "b.txt").write_text("no")
    row = json.dumps({"path": "c.py", "text": "c = 3"}) + "\n"
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(row.encode()))
    found = list(read_documents([tmp_path / "src", tmp_path / "d.jsonl.gz", tmp_path / "src" / "b.txt"]))
    assert [text for _, text in found] == ["a = 1", "c = 3", "no"]
    (tmp_path / "bad.jsonl").write_text("[]\n")
    with pytest.raises(ValueError, match="line 1"):
        list(read_documents([tmp_path / "bad.jsonl"]))
