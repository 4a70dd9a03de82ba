"""What llama.cpp is measured on is the model that it is said to be: files are read back, and its logits compared."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import bench_peers
import gguf
import numpy as np
import pytest
from kernel.common import flax_logits, params_of, some_tokens
from peers import gguf_writer
from peers.llama_cpp_decoder import LlamaCpp
from peers.work import Missing, Work, dense_twin
from tiny import tiny

from jax_mono.config import ModelConfig, RopeScaling
from jax_mono.models.gguf import GGUFCheckpoint
from jax_mono.models.random_source import RandomSource
from jax_mono.models.source import ArraySource, flatten, read_params

LLAMA3 = RopeScaling(kind="llama3", factor=8.0, original_max_position_embeddings=8192)
CONFIGS = [
    tiny("llama"),
    tiny("llama", rope_interleaved=True, tie_word_embeddings=True),
    tiny("llama", head_dim=64, rope_theta=5e5, rope_scaling=LLAMA3),
    tiny("qwen2"),
    tiny("qwen3"),
]


def name_of(config: ModelConfig) -> str:
    return f"{config.family}{'-interleaved' * config.rope_interleaved}{'-scaled' * (config.rope_scaling is not None)}"


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_a_file_holds_the_model(tmp_path: Path, config: ModelConfig) -> None:
    path, tokens = tmp_path / "model.gguf", some_tokens(12)
    gguf_writer.write_gguf(path, ArraySource(config, params_of(config)), "float32")
    source = GGUFCheckpoint(path)
    assert source.config == config.replace(rope_interleaved=False)
    found = flax_logits(source.config, read_params(source), tokens)
    np.testing.assert_allclose(found, flax_logits(config, params_of(config), tokens), atol=1e-4)


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", "BF16"), ("float16", "F16")])
def test_matrices_are_narrow_and_the_rest_is_not(tmp_path: Path, dtype: str, kind: str) -> None:
    config, path = dense_twin(tiny("laneformer")), tmp_path / "model.gguf"
    source = RandomSource(config)
    gguf_writer.write_gguf(path, source, dtype)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert {tensor.tensor_type.name for name, tensor in tensors.items() if "norm" in name} == {"F32"}
    assert {tensor.tensor_type.name for name, tensor in tensors.items() if "norm" not in name} == {kind}
    assert sum(tensor.n_elements for tensor in tensors.values()) == config.num_parameters
    assert tensors["blk.0.ffn_down.weight"].shape.tolist() == [config.intermediate_size, config.hidden_size]
    assert path.stat().st_size == pytest.approx(gguf_writer.file_size(config, dtype), rel=0.1)
    read = dict(flatten(read_params(GGUFCheckpoint(path))))
    for name in source.paths():
        if not name.endswith((".wq", ".wk")):  # imported in another order of rows
            assert np.array_equal(read[name], source.tensor(name, dtype).astype(np.float32)), name


def test_what_cannot_be_written_is_said() -> None:
    with pytest.raises(ValueError, match="laneformer has no GGUF architecture; take dense_twin"):
        gguf_writer.check(tiny("laneformer"))
    with pytest.raises(Missing, match="two halves of a head in qwen3"):
        gguf_writer.check(tiny("qwen3", rope_interleaved=True))
    with pytest.raises(Missing, match="no rotary scaling of kind linear"):
        gguf_writer.check(tiny("llama", rope_scaling=RopeScaling(kind="linear", factor=2.0)))


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_llama_cpp_equals_flax(config: ModelConfig) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; docs/benchmarks.md says how")
    peer = LlamaCpp()
    peer.load(Work(config, "float32", context=32, position=8), ArraySource(config, params_of(config)))
    tokens = some_tokens(12)
    expected = flax_logits(config, params_of(config), tokens)
    for position, token in enumerate(tokens):
        peer.model.eval([token])
        np.testing.assert_allclose(peer.logits(), expected[position], atol=1e-4)


def test_llama_cpp_measures_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; docs/benchmarks.md says how")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    arguments = SimpleNamespace(new_tokens=6, runs=3, run_seconds=10.0)
    work = Work(tiny("laneformer"), "bfloat16", context=32, position=8)
    row = bench_peers.measure("llama.cpp", work, arguments)
    assert row["peer"] == "llama.cpp" and row["runs"] == 3 and row["new_tokens"] == 6
    assert 0 < row["tokens_per_s_min"] <= row["tokens_per_s"] <= row["tokens_per_s_max"]
    assert row["model_differs"] == "dense model of the same dimensions, attends to all positions in all layers"
    json.dumps(row)
    assert not list(tmp_path.iterdir())


def test_without_llama_cpp_there_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    work = Work(tiny("llama"), "bfloat16", context=32, position=8)
    row = bench_peers.measure("llama.cpp", work, SimpleNamespace())
    assert (
        row["missing"].startswith("llama_cpp is not installed; ") and "pip install llama-cpp-python" in row["missing"]
    )


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", sys.modules.get("llama_cpp") or SimpleNamespace())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2e6))
    config = tiny("llama", vocab_size=100_000)
    with pytest.raises(Missing, match=r"takes 0.03 GB and .* has 0.00 GB left; set TMPDIR"):
        LlamaCpp().load(Work(config, "bfloat16", context=32, position=8), RandomSource(config))
    assert not list(tmp_path.iterdir())
