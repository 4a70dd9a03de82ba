"""``jax-mono convert``: the same model in another format, ready to generate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from checkpoints import gguf_files
from cli.conftest import TEMPLATE, make_tokenizer
from test_tokenizer import gguf_metadata
from tiny import random_params, tiny

from jax_mono.checkpoint import OrbaxCheckpoint, open_checkpoint
from jax_mono.models.hf import HFCheckpoint
from jax_mono.tokenizer import Tokenizer


def test_hf_to_orbax_and_back(run, chat_model: Path, tmp_path: Path) -> None:
    ran = run("convert", chat_model, tmp_path / "orbax", "--to", "orbax")
    assert (ran.code, ran.out, ran.err) == (0, "", f"jax-mono: wrote {tmp_path / 'orbax'}\n")
    assert isinstance(open_checkpoint(tmp_path / "orbax"), OrbaxCheckpoint)
    assert run("convert", tmp_path / "orbax", tmp_path / "hf", "--to", "hf").code == 0
    before, after = HFCheckpoint(chat_model), HFCheckpoint(tmp_path / "hf")
    assert after.config == before.config
    for path in before.paths():
        assert np.array_equal(before.tensor(path), after.tensor(path)), path
    for directory in ("orbax", "hf"):
        tokenizer = Tokenizer.open(tmp_path / directory)
        assert (tokenizer.chat_template, tokenizer.eos_ids) == (TEMPLATE, (1,))
    arguments = ["-p", "the fox", "-n", "4", "--dtype", "float32", "--blocks", "2"]
    assert (
        run("generate", "-c", tmp_path / "orbax", *arguments).out == run("generate", "-c", chat_model, *arguments).out
    )


def test_dtype_and_overwrite(run, chat_model: Path, tmp_path: Path) -> None:
    target = tmp_path / "half"
    for format_name in ("hf", "orbax"):
        arguments = ["convert", chat_model, target, "--to", format_name, "--dtype", "bfloat16", "--overwrite", "-q"]
        assert run(*arguments)[::2] == (0, "")
        source = open_checkpoint(target)
        assert {source.dtype(path).name for path in source.paths()} == {"bfloat16"}
    before = sorted(target.rglob("*"))
    ran = run("convert", chat_model, target, "--to", "hf")
    assert ran.code == 2 and "not empty" in ran.err
    assert sorted(target.rglob("*")) == before


def test_gguf_brings_its_tokenizer(run, tmp_path: Path) -> None:
    config = tiny("llama", vocab_size=320, eos_token_ids=(1, 3), bos_token_id=0)
    arrays = gguf_files.tensors(config, random_params(config))
    about = gguf_metadata(make_tokenizer(), add_bos_token=True)
    file = gguf_files.write(tmp_path / "m.gguf", "llama", gguf_files.metadata(config), arrays, about)
    assert run("convert", file, tmp_path / "hf", "--to", "hf").code == 0
    before, after = Tokenizer.open(file), Tokenizer.open(tmp_path / "hf")
    for text in ("the quick déjà 日本", "<|user|>x<|end|>"):
        assert after.encode(text) == before.encode(text)
    assert after.encode("x")[0] == 0
    assert after.chat([{"role": "user", "content": "x"}]) == before.chat([{"role": "user", "content": "x"}])
    assert set(after.eos_ids) == set(before.eos_ids)
    assert open_checkpoint(tmp_path / "hf").config == open_checkpoint(file).config


def test_without_a_tokenizer(run, tmp_path: Path) -> None:
    config = tiny("llama")
    file = gguf_files.write(
        tmp_path / "m.gguf", "llama", gguf_files.metadata(config), gguf_files.tensors(config, random_params(config))
    )
    ran = run("convert", file, tmp_path / "hf", "--to", "hf")
    assert ran.code == 0 and "the result has no tokenizer: " in ran.err


def test_bad_input(run, tmp_path: Path) -> None:
    assert run("convert", tmp_path / "none", tmp_path / "hf", "--to", "hf").code == 2
    assert not (tmp_path / "hf").exists()
