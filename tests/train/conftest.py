"""Token files of a toy language: training has something to learn within a few steps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from mini_coder import token_file

VOCABULARY = 512


def sentences(count: int, seed: int) -> list[list[int]]:
    """Documents in which every token follows from the one before: t -> 5 t + 3, within 64 tokens."""
    rng = np.random.default_rng(seed)
    documents = []
    for _ in range(count):
        token, words = int(rng.integers(64)), []
        for _ in range(int(rng.integers(20, 60))):
            words.append(100 + token)
            token = (5 * token + 3) % 64
        documents.append([*words, 0])
    return documents


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory like that of prepare_mini_coder.py."""
    directory = tmp_path_factory.mktemp("data")
    token_file.append(directory / "train.bin", iter([[0], *sentences(300, seed=0)]))
    held_out = sentences(20, seed=1)
    token_file.append(directory / "held_out.bin", iter([[0], *held_out]))
    about = {"held_out": {"bytes": sum(map(len, held_out)) - len(held_out)}, "vocabulary": VOCABULARY}
    (directory / "manifest.json").write_text(json.dumps(about))
    return directory
