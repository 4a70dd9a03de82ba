"""GGUF checkpoints: dequantisation, the order of rotated rows, metadata, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints.gguf_files import metadata, tensors, write
from gguf import GGUFReader
from gguf.constants import GGMLQuantizationType as Kind
from gguf.quants import quantize
from reference import ggml_blocks
from tiny import random_params, tiny

from jax_mono.config import ConfigError, ModelConfig, RopeScaling
from jax_mono.models.gguf import GGUFCheckpoint
from jax_mono.models.gguf_file import GGUFFile
from jax_mono.models.source import CheckpointError, flatten, read_params, tensor_shapes


def save(path: Path, config: ModelConfig, changes: dict[str, Any] | None = None, **other: Any) -> Path:
    """Writes a random model of a configuration; ``arrays`` and ``other_keys`` add to the file."""
    arrays = tensors(config, random_params(config)) | other.pop("arrays", {})
    arrays = {name: array for name, array in arrays.items() if array is not None}
    return write(path, config.family, metadata(config) | (changes or {}), arrays, **other)


def factors(config: ModelConfig, factor: float = 8.0, original: int = 8192, high: float = 4.0) -> np.ndarray:
    """What each frequency is divided by under the scaling of Llama 3, one frequency at a time."""
    result = []
    for pair in range(config.head_dim // 2):
        wavelength = 2 * np.pi * config.rope_theta ** (2 * pair / config.head_dim)
        if wavelength < original / high:
            result.append(1.0)
        elif wavelength > original:
            result.append(factor)
        else:
            smooth = (original / wavelength - 1.0) / (high - 1.0)
            result.append(1.0 / ((1.0 - smooth) / factor + smooth))
    return np.array(result, np.float32)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_float_files_are_exact(tmp_path: Path, family: str) -> None:
    config = tiny(family, bos_token_id=1, eos_token_ids=(2, 7))
    ids = {"bos": 1, "eos": 2, "eot": 7, "eom": 2}
    path = save(
        tmp_path / "model.gguf",
        config,
        other_keys={f"tokenizer.ggml.{k}_token_id": v for k, v in ids.items()},
    )
    source = GGUFCheckpoint(path)
    assert source.config == config
    assert source.paths() == tuple(tensor_shapes(config))
    expected = dict(flatten(random_params(config)))
    for name, array in flatten(read_params(source)):
        assert array.dtype == np.float32 == source.dtype(name)
        assert np.array_equal(array, expected[name]), name


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_half_precision(tmp_path: Path, kind: str) -> None:
    config = tiny("llama")
    values = tensors(config, random_params(config))["output.weight"]
    rows = quantize(values, Kind[kind])
    path = save(tmp_path / "model.gguf", config, arrays={"output.weight": (rows, Kind[kind])})
    narrow = values.astype(np.float16 if kind == "F16" else ml_dtypes.bfloat16)
    source = GGUFCheckpoint(path)
    assert np.array_equal(source.tensor("lm_head"), narrow.astype(np.float32))
    assert source.tensor("lm_head", "bfloat16").dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("kind", ggml_blocks.KINDS)
def test_quantised_blocks(tmp_path: Path, kind: str) -> None:
    config = tiny("qwen3", hidden_size=256, intermediate_size=256, vocab_size=16, num_layers=1)
    rng = np.random.default_rng(0)
    rows = ggml_blocks.random_rows(kind, (16, 256), rng)
    gate = ggml_blocks.random_rows(kind, (256, 256), rng)
    path = save(
        tmp_path / "model.gguf",
        config,
        arrays={"token_embd.weight": (rows, Kind[kind]), "blk.0.ffn_gate.weight": (gate, Kind[kind])},
    )
    source = GGUFCheckpoint(path)
    np.testing.assert_allclose(source.tensor("embed"), ggml_blocks.dequantise(kind, rows), rtol=1e-6)
    w1 = source.tensor("layers.0.feed_forward.w1", "float32")
    assert w1.shape == (1, 256, 256)
    np.testing.assert_allclose(w1[0], ggml_blocks.dequantise(kind, gate), rtol=1e-6)


@pytest.mark.parametrize(("kind", "error"), [("Q8_0", 0.01), ("Q4_0", 0.15), ("Q4_1", 0.12)])
def test_quantised_rows_of_q_are_put_back_in_order(tmp_path: Path, kind: str, error: float) -> None:
    config = tiny("llama")
    arrays = tensors(config, random_params(config))
    quantised = {
        name: (quantize(array, Kind[kind]), Kind[kind])
        for name, array in arrays.items()
        if name.endswith(("attn_q.weight", "attn_k.weight"))
    }
    source = GGUFCheckpoint(save(tmp_path / "model.gguf", config, arrays=quantised))
    expected = dict(flatten(random_params(config)))
    for path in ("layers.1.attention.wq", "layers.2.attention.wk"):
        largest = np.abs(expected[path]).max()
        assert np.abs(source.tensor(path) - expected[path]).max() < error * largest


def test_own_reader_agrees_with_the_gguf_package(tmp_path: Path) -> None:
    others = {
        "a.list": ["x", "déjà", ""],
        "a.numbers": [1.5, 2.5],
        "a.flag": True,
        "a.text": "🦊",
        "a.int": 7,
    }
    path = save(tmp_path / "model.gguf", tiny("llama"), other_keys=others)
    ours, theirs = GGUFFile(path), GGUFReader(path)
    assert {key: ours.metadata[key] for key in others} == others
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            value = field.contents()
            assert ours.metadata[key] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value)
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        stored = ours.tensors[tensor.name]
        assert (stored.kind, stored.offset) == (tensor.tensor_type, tensor.data_offset)
        assert stored.shape == tuple(reversed(tensor.shape.tolist()))


def test_metadata_that_may_be_absent(tmp_path: Path) -> None:
    config = tiny("llama", num_kv_heads=4, tie_word_embeddings=True)
    absent = ("vocab_size", "attention.head_count_kv", "attention.key_length", "attention.value_length")
    absent += ("rope.dimension_count", "rope.freq_base")
    path = save(tmp_path / "model.gguf", config, dict.fromkeys(absent))
    assert GGUFCheckpoint(path).config == config


@pytest.mark.parametrize(
    ("changes", "scaling"),
    [
        ({"type": "none"}, None),
        ({"type": "linear", "factor": 2.5}, RopeScaling(kind="linear", factor=2.5)),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 32, "finetuned": True},
            RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=32),
        ),
        (
            {"type": "yarn", "factor": 4.0, "yarn_beta_fast": 16.0, "yarn_ext_factor": 1.0},
            RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=128, beta_fast=16.0),
        ),
    ],
)
def test_rotary_scaling(tmp_path: Path, changes: dict[str, Any], scaling: RopeScaling | None) -> None:
    keys = {f"rope.scaling.{key}": value for key, value in changes.items()}
    assert GGUFCheckpoint(save(tmp_path / "model.gguf", tiny("llama"), keys)).config.rope_scaling == scaling


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rotary_scaling_of_llama3_is_recognised(tmp_path: Path, factor: float) -> None:
    config = tiny("llama", head_dim=64, rope_theta=5e5)
    path = save(tmp_path / "model.gguf", config, arrays={"rope_freqs.weight": factors(config, factor)})
    expected = RopeScaling(kind="llama3", factor=factor, original_max_position_embeddings=8192)
    assert GGUFCheckpoint(path).config == config.replace(rope_scaling=expected)


@pytest.mark.parametrize("changes", [{"original": 4096}, {"high": 8.0}])
def test_other_rotary_factors_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = tiny("llama", head_dim=64, rope_theta=5e5)
    path = save(tmp_path / "model.gguf", config, arrays={"rope_freqs.weight": factors(config, **changes)})
    with pytest.raises(CheckpointError, match=r"'rope_freqs.weight' does not hold the rotary scaling of Llama 3"):
        GGUFCheckpoint(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_count": None}, "the key 'block_count' is missing"),
        ({"expert_count": 8}, "expert_count 8 is not supported"),
        ({"attention.sliding_window": 4096}, "unknown keys.*attention.sliding_window = 4096"),
        ({"rope.dimension_count": 8}, "rope.dimension_count 8 is not supported, only 16"),
        ({"attention.value_length": 8}, "attention.value_length 8 is not supported, only 16"),
        ({"vocab_size": 127}, "vocab_size 127 is not supported, only 128"),
        ({"rope.scaling.type": "longrope"}, "rope.scaling.type 'longrope' is not supported"),
        ({"rope.scaling.factor": 4.0}, "rope.scaling.factor 4.0 has no rope.scaling.type"),
        ({"rope.scaling.type": "yarn", "rope.scaling.yarn_attn_factor": 2.0}, "yarn_attn_factor 2.0 is not"),
        ({"attention.head_count": [4, 4, 4]}, r"attention.head_count \[4, 4, 4\] is not an integer"),
    ],
)
def test_metadata_that_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = save(tmp_path / "model.gguf", tiny("llama"), changes)
    with pytest.raises(ConfigError, match=message):
        GGUFCheckpoint(path)


def test_unknown_keys_can_be_ignored_on_request(tmp_path: Path) -> None:
    path = save(tmp_path / "model.gguf", tiny("llama"), {"novelty": 1})
    assert GGUFCheckpoint(path, ignore_keys=["novelty"]).config == tiny("llama")


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", "gemma", {}, {})
    with pytest.raises(ConfigError, match=r"architecture 'gemma' is not supported; known: llama, qwen2, qwen3"):
        GGUFCheckpoint(path)


def test_unsupported_type_is_named(tmp_path: Path) -> None:
    config = tiny("llama", hidden_size=256)
    rows = np.zeros((128, 176), np.uint8)
    path = save(tmp_path / "model.gguf", config, arrays={"output.weight": (rows, Kind.Q5_K)})
    with pytest.raises(CheckpointError, match=r"'output.weight' has type Q5_K, supported are F32, F16, Q4_0"):
        GGUFCheckpoint(path)


def test_parts_are_refused(tmp_path: Path) -> None:
    writer_path = save(tmp_path / "model.gguf", tiny("llama"), other_keys={"split.count": 3})
    with pytest.raises(CheckpointError, match=r"one of 3 parts; join them with: llama-gguf-split --merge"):
        GGUFCheckpoint(writer_path)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"blk.1.ffn_up.weight": None}, r"tensor 'blk.1.ffn_up.weight' is missing"),
        ({"token_embd.weight": None}, r"'token_embd.weight' is missing; the file holds no model"),
        ({"blk.0.attn_q.bias": np.zeros(64, np.float32)}, r"'blk.0.attn_q.bias' is not part of this arch"),
        ({"output_norm.weight": np.zeros(63, np.float32)}, r"'output_norm.weight' has shape \[63\].*\[64\]"),
        ({"rope_freqs.weight": np.ones(4, np.float32)}, r"'rope_freqs.weight' has shape \[4\].*\[8\]"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    path = save(tmp_path / "model.gguf", tiny("llama"), arrays=arrays)
    with pytest.raises(CheckpointError, match=message):
        GGUFCheckpoint(path)


@pytest.mark.parametrize("keep", [5, 30, 300, 2000, -10])
def test_truncated_file(tmp_path: Path, keep: int) -> None:
    path = save(tmp_path / "model.gguf", tiny("llama"))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model.gguf: (damaged or )?truncated.*download it again"):
        GGUFCheckpoint(path)


def test_other_files(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    with pytest.raises(CheckpointError, match=r"no such file"):
        GGUFCheckpoint(path)
    path.write_bytes(b"PK\x03\x04 and more")
    with pytest.raises(CheckpointError, match=r"not a GGUF file"):
        GGUFCheckpoint(path)
    path.write_bytes(b"GGUF" + (1).to_bytes(4, "little") + bytes(16))
    with pytest.raises(CheckpointError, match=r"GGUF version 1 is not supported"):
        GGUFCheckpoint(path)


def test_damage_anywhere_in_the_header_is_reported_not_raised(tmp_path: Path) -> None:
    path = save(tmp_path / "model.gguf", tiny("llama", num_layers=1), other_keys={"a.list": ["x", "y"]})
    intact = path.read_bytes()
    header = min(tensor.offset for tensor in GGUFFile(path).tensors.values())
    rng = np.random.default_rng(0)
    refused = 0
    for at in rng.integers(4, header, 400):
        damaged = bytearray(intact)
        damaged[at] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            GGUFCheckpoint(path)
        except (CheckpointError, ConfigError):
            refused += 1
    assert refused > 200
