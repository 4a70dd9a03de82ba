"""``jax-mono logits``: the same numbers from both backends, and files that are refused."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import random_params, tiny

from jax_mono.models.transformer import Transformer

TOKENS = np.random.default_rng(1).integers(0, 320, 12)


@pytest.fixture
def tokens_file(tmp_path: Path) -> Path:
    np.save(tmp_path / "t.npy", TOKENS)
    return tmp_path / "t.npy"


@pytest.mark.parametrize(
    "options",
    [
        ["--backend", "flax"],
        ["--backend", "kernel", "--blocks", "2"],
        ["--backend", "kernel", "--blocks", "1", "--devices", "2", "--form", "mesh"],
    ],
)
def test_logits(run, laneformer: Path, tokens_file: Path, tmp_path: Path, options: list[str]) -> None:
    ran = run("logits", "-c", laneformer, "--tokens-file", tokens_file, "--out", tmp_path / "l.out", *options)
    assert (ran.code, ran.out) == (0, "")
    found = np.load(tmp_path / "l.out")
    config = tiny("laneformer", vocab_size=320, eos_token_ids=(1,))
    expected, _ = jax.jit(Transformer.from_params(config, random_params(config)))(TOKENS)
    assert (found.dtype, found.shape) == (np.float32, (12, 320))
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_bfloat16(run, chat_model: Path, tokens_file: Path, tmp_path: Path) -> None:
    out = {}
    for backend in ("flax", "kernel"):
        options = ["--dtype", "bfloat16", "--backend", backend, "--quiet"]
        ran = run("logits", "-c", chat_model, "--tokens-file", tokens_file, "--out", tmp_path / backend, *options)
        assert (ran.code, ran.err) == (0, "")
        out[backend] = np.load(tmp_path / backend)
    assert 0 < np.abs(out["flax"] - out["kernel"]).max() < 0.1


def test_one_token(run, chat_model: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", TOKENS[:1])
    out = {}
    for backend in ("flax", "kernel"):
        run(
            "logits",
            "-c",
            chat_model,
            "--tokens-file",
            tmp_path / "one.npy",
            "--out",
            tmp_path / "l",
            "--backend",
            backend,
        )
        out[backend] = np.load(tmp_path / "l")
    assert out["kernel"].shape == (1, 320)
    np.testing.assert_allclose(out["kernel"], out["flax"], atol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.zeros((2, 2), int), "one-dimensional"),
        (np.zeros(3), "whole numbers"),
        (np.zeros(0, int), "holds no tokens"),
        (np.array([1, 320]), "token 320 at index 1 is outside the vocabulary of 320"),
        (np.array([-1]), "token -1 at index 0"),
        (np.zeros(129, int), "beyond the model's context of 128"),
        (b"junk", "not readable as .npy"),
        (None, "no such file"),
    ],
)
def test_bad_files(run, chat_model: Path, tmp_path: Path, tokens: np.ndarray | bytes | None, message: str) -> None:
    file = tmp_path / "bad.npy"
    if isinstance(tokens, bytes):
        file.write_bytes(tokens)
    elif tokens is not None:
        np.save(file, tokens)
    ran = run("logits", "-c", chat_model, "--tokens-file", file, "--out", tmp_path / "l.npy")
    assert ran.code == 2 and message in ran.err and "bad.npy" in ran.err
    assert not (tmp_path / "l.npy").exists()


def test_where_nothing_can_be_written(run, chat_model: Path, tokens_file: Path, tmp_path: Path) -> None:
    ran = run("logits", "-c", chat_model, "--tokens-file", tokens_file, "--out", tmp_path / "none" / "l.npy")
    assert ran.code == 2 and "no such directory" in ran.err
