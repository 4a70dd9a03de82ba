"""Data: what is dropped and why, licences, the tokenizer, and which tokens a step sees."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
from mini_coder import corpus, token_file, vocabulary
from mini_coder.cleaning import Contamination, Duplicates
from mini_coder.packages import PACKAGES, Package
from mini_coder.token_file import Batches, in_order

PACKAGE = Package("toy-package", "1.2", "MIT", "MIT")


def write_wheel(directory: Path, licence: str) -> Path:
    wheel = directory / "toy_package-1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("toy/b.py", "b = 1\n" * 40)
        archive.writestr("toy/a.py", "def a():\r\n    return 1\r\n" * 9)
        archive.writestr("toy/data.bin", "x" * 100)
        archive.writestr("toy_package-1.2.dist-info/METADATA", f"Name: toy-package\nVersion: 1.2\n{licence}\n")
    return wheel


def test_wheels(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path, "License-Expression: MIT")
    assert corpus.find_wheel(tmp_path, PACKAGE) == wheel
    corpus.check_licence(wheel, PACKAGE)
    documents = list(corpus.wheel_documents(wheel, PACKAGE))
    assert [document.path for document in documents] == ["toy/a.py", "toy/b.py"]
    assert "\r" not in documents[0].text
    write_wheel(tmp_path, "Classifier: License :: OSI Approved :: GNU General Public License v3 (GPLv3)")
    with pytest.raises(corpus.CorpusError, match=r"GPLv3.*expected 1\.2 and 'MIT'"):
        corpus.check_licence(wheel, PACKAGE)


def test_a_dozen_packages_with_permissive_licences() -> None:
    assert len(PACKAGES) <= 12
    assert {package.licence for package in PACKAGES} <= {"BSD-3-Clause", "MIT", "Apache-2.0", "PSF-2.0"}
    assert [package.held_out for package in PACKAGES].count(True) == 1 and PACKAGES[0].held_out


@pytest.mark.parametrize(
    "text", ["tiny", "x = '" + "a" * 3000 + "'\n" * 50, "1234567890, " * 9 + "\n", "word " * 40 + "\n"]
)
def test_files_that_teach_nothing(text: str) -> None:
    assert corpus.readable(text.encode()) is None
    assert corpus.readable(b"# caf\xe9\n" * 20) is None


def test_duplicates() -> None:
    text = "\n".join(f"line {index} of a file" for index in range(40))
    seen = Duplicates()
    assert seen.is_new(text)
    assert not seen.is_new(text)
    assert not seen.is_new("\n\n".join(f"    {line}" for line in text.splitlines()) + "\none more line")
    assert seen.is_new(text[: len(text) // 3] + "\n".join(f"other {index}" for index in range(60)))


def test_contamination() -> None:
    words = [f"word{index}" for index in range(40)]
    contamination = Contamination([" ".join(words)])
    assert contamination.touches("before, " + "\n".join(words[5:18]).upper() + " after")  # 13 words in a row
    assert not contamination.touches(" ".join(words[5:17]) + " other " + " ".join(words[18:30]))
    assert not contamination.touches(" ".join(reversed(words)))
    assert not contamination.touches("short")


def test_tokenizer_round_trip(tmp_path: Path) -> None:
    text = "def f(x):\n    return x + 12345  # é\n"
    backend = vocabulary.train(iter([text] * 20), 400)
    assert [backend.token_to_id(name) for name in vocabulary.SPECIAL] == list(range(len(vocabulary.SPECIAL)))
    ids = backend.encode(text).ids
    assert backend.decode(ids) == text and len(ids) < 20
    digits = [token for token in ids if backend.decode([token]).strip().isdigit()]
    assert len(digits) == 5
    vocabulary.save(backend, tmp_path)
    from jax_mono.tokenizer import Tokenizer

    opened = Tokenizer.open(tmp_path)
    assert opened.encode(text) == [vocabulary.END_ID, *ids] and opened.eos_ids == (vocabulary.END_ID,)


def test_batches_show_every_sequence_once_per_epoch(tmp_path: Path) -> None:
    file = tmp_path / "t.bin"
    assert token_file.append(file, iter([list(range(50)), list(range(50, 101))])) == 101
    batches = Batches(file, length=10, size=4, seed=0)
    assert batches.sequences == 10
    rows = np.concatenate([batches.batch(step) for step in range(5)])
    assert rows.shape == (20, 11)
    assert np.array_equal(rows, rows[:, :1] + np.arange(11))
    for epoch in (rows[:10, 0], rows[10:, 0]):
        assert sorted(epoch) == list(range(0, 100, 10))
    assert not np.array_equal(rows[:10], rows[10:])
    again = Batches(file, length=10, size=4, seed=0)
    assert np.array_equal(again.batch(3), rows[12:16])  # without the steps before
    with pytest.raises(ValueError, match="fewer than"):
        Batches(file, length=101, size=1, seed=0)


def test_evaluation_predicts_every_token_once(tmp_path: Path) -> None:
    file = tmp_path / "t.bin"
    token_file.append(file, iter([list(range(38))]))
    predicted = []
    for tokens, counts in in_order(file, length=5, size=3):
        assert tokens.shape == (3, 6) and counts.shape == (3, 5)
        predicted += tokens[:, 1:][counts].tolist()
    assert predicted == list(range(1, 38))
