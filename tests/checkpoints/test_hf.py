"""Hugging Face checkpoints: exact round trips, and one clear error for everything that can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import random_params, tiny

from jax_mono.config import ConfigError, Lanes, ModelConfig
from jax_mono.models.hf import HFCheckpoint, export_hf, hf_tensor, load_hf
from jax_mono.models.hf_config import to_hf_config
from jax_mono.models.source import ArraySource, CheckpointError, flatten, tensor_shapes

FAMILIES = ("llama", "qwen2", "qwen3", "laneformer")
BF16 = np.dtype(ml_dtypes.bfloat16)


def assert_same(left: Any, right: Any) -> None:
    """Compares two parameter trees bit for bit, names and order included."""
    pairs = list(zip(flatten(left), flatten(right), strict=True))
    assert len(pairs) > 5
    for (left_path, a), (right_path, b) in pairs:
        a, b = np.asarray(a), np.asarray(b)
        assert (left_path, a.dtype, a.shape) == (right_path, b.dtype, b.shape)
        assert a.tobytes() == b.tobytes(), left_path


def in_source_order(config: ModelConfig, params: Any) -> Any:
    """The tree in the order of a source: JAX sorts the keys of dictionaries."""
    from jax_mono.models.source import unflatten

    arrays = dict(flatten(params))
    return unflatten({path: np.asarray(arrays[path]) for path in tensor_shapes(config)})


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A small Llama on disk, for tests that damage it."""
    config = tiny("llama")
    export_hf(config, random_params(config), tmp_path / "model")
    return tmp_path / "model"


def edit_tensors(directory: Path, **changes: np.ndarray | None) -> None:
    """Replaces, adds or (None) removes tensors; ``__`` stands for a dot."""
    tensors = load_file(directory / "model.safetensors")
    for name, array in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if array is not None:
            tensors[name.replace("__", ".")] = array
    save_file(tensors, directory / "model.safetensors")


def edit_config(directory: Path, **changes: Any) -> None:
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(raw | changes))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_export_and_import_are_exact(tmp_path: Path, family: str, dtype: str) -> None:
    config = tiny(family, eos_token_ids=(2,))
    params = in_source_order(config, random_params(config, dtype=dtype))
    export_hf(config, params, tmp_path / "one")
    loaded_config, loaded = load_hf(tmp_path / "one")
    assert loaded_config == config
    assert_same(loaded, params)

    export_hf(config, HFCheckpoint(tmp_path / "one"), tmp_path / "two")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_names_and_shapes_of_dense_models(tmp_path: Path) -> None:
    config = tiny("qwen2")
    export_hf(config, random_params(config), tmp_path / "model")
    stored = {name: array.shape for name, array in load_file(tmp_path / "model" / "model.safetensors").items()}
    assert stored["model.embed_tokens.weight"] == (128, 64)
    assert stored["model.layers.0.self_attn.q_proj.weight"] == (64, 64)
    assert stored["model.layers.0.self_attn.k_proj.bias"] == (32,)
    assert stored["model.layers.2.mlp.down_proj.weight"] == (64, 128)
    assert "lm_head.weight" not in stored


def test_names_and_lane_axis_of_laneformers(tmp_path: Path) -> None:
    config = tiny("laneformer")
    params = random_params(config)
    export_hf(config, params, tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert stored["model.tok_embeddings.weight"].shape == (128, 64)
    assert stored["model.norm.weight"].shape == (64,)
    assert stored["lm_head.weight"].shape == (128, 64)
    layer = "model.layers.3"
    assert stored[f"{layer}.attention_norm.weight"].shape == (64,)
    assert stored[f"{layer}.attention.wq.weight"].shape == (8, 16, 64)
    assert stored[f"{layer}.attention.wo.weight"].shape == (8, 64, 16)
    assert stored[f"{layer}.feed_forward.w1.weight"].shape == (8, 16, 64)
    assert stored[f"{layer}.feed_forward.w2.weight"].shape == (8, 64, 16)
    assert np.array_equal(stored[f"{layer}.attention.wo.weight"], params["layers"][3]["attention"]["wo"])


def test_a_vocabulary_parallel_head_has_a_lane_axis(tmp_path: Path) -> None:
    config = tiny("laneformer", lanes=Lanes(count=8, head="per_lane"))
    params = random_params(config)
    export_hf(config, params, tmp_path / "model")
    assert load_file(tmp_path / "model" / "model.safetensors")["lm_head.weight"].shape == (8, 16, 64)
    assert np.array_equal(HFCheckpoint(tmp_path / "model").tensor("lm_head"), params["lm_head"])


def test_shards(tmp_path: Path) -> None:
    config = tiny("llama")
    params = in_source_order(config, random_params(config))
    export_hf(config, params, tmp_path / "model", max_shard_bytes=100_000)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert all((tmp_path / "model" / shard).stat().st_size < 103_000 for shard in shards)
    assert index["metadata"]["total_size"] == 4 * config.num_parameters
    assert_same(load_hf(tmp_path / "model")[1], params)


def test_conversion_rounds_to_nearest_even(tmp_path: Path) -> None:
    config = tiny("llama")
    params = in_source_order(config, random_params(config))
    export_hf(config, params, tmp_path / "model")
    source = HFCheckpoint(tmp_path / "model")
    narrow = source.tensor("layers.1.feed_forward.w1", "bfloat16")
    assert narrow.dtype == BF16
    assert np.array_equal(narrow, params["layers"][1]["feed_forward"]["w1"].astype(BF16))
    assert source.dtype("norm") == np.float32
    with pytest.raises(CheckpointError, match=r"cannot be read as int8; ask for float32, bfloat16 or float16"):
        source.tensor("norm", "int8")


def test_float16_is_read_and_widened_exactly(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    halves = {name: array.astype(np.float16) for name, array in tensors.items()}
    save_file(halves, checkpoint / "model.safetensors")
    source = HFCheckpoint(checkpoint)
    assert source.dtype("norm") == np.float16
    assert np.array_equal(source.tensor("norm", "float32"), halves["model.norm.weight"].astype(np.float32))


def test_mixed_dtypes_survive(tmp_path: Path) -> None:
    config = tiny("llama")
    params = in_source_order(config, random_params(config, dtype="bfloat16"))
    params["norm"] = params["norm"].astype(np.float32)
    export_hf(config, params, tmp_path / "model")
    assert_same(load_hf(tmp_path / "model")[1], params)
    assert "torch_dtype" not in json.loads((tmp_path / "model" / "config.json").read_text())


def test_export_to_another_dtype_says_so(checkpoint: Path, tmp_path: Path) -> None:
    source = HFCheckpoint(checkpoint)
    export_hf(source.config, source, tmp_path / "narrow", dtype="bfloat16")
    assert json.loads((tmp_path / "narrow" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert HFCheckpoint(tmp_path / "narrow").dtype("embed") == BF16


def test_export_keeps_the_original_configuration_and_the_tokenizer(checkpoint: Path, tmp_path: Path) -> None:
    edit_config(checkpoint, transformers_version="4.0", _name_or_path="somebody/something")
    (checkpoint / "tokenizer.json").write_text("{}")
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    source = HFCheckpoint(checkpoint)
    export_hf(source.config, source, tmp_path / "copy")
    assert (tmp_path / "copy" / "config.json").read_bytes() == (checkpoint / "config.json").read_bytes()
    assert (tmp_path / "copy" / "tokenizer.json").read_text() == "{}"
    assert HFCheckpoint(tmp_path / "copy").config == source.config


def test_end_tokens_of_the_generation_config_count(checkpoint: Path) -> None:
    edit_config(checkpoint, eos_token_id=7)
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert HFCheckpoint(checkpoint).config.eos_token_ids == (7, 9)


def test_progress_is_reported(checkpoint: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int]] = []
    load_hf(checkpoint, on_tensor=lambda path, nbytes: seen.append((path, nbytes)))
    assert [path for path, _ in seen] == list(HFCheckpoint(checkpoint).paths())
    assert sum(nbytes for _, nbytes in seen) == 4 * tiny("llama").num_parameters


def test_tensors_are_independent_copies(checkpoint: Path) -> None:
    source = HFCheckpoint(checkpoint)
    first = source.tensor("norm")
    first[:] = 0
    assert first.flags.c_contiguous
    assert np.any(source.tensor("norm") != 0)


def test_harmless_buffers_are_ignored(checkpoint: Path) -> None:
    inv_freq = np.ones(8, np.float32)
    edit_tensors(checkpoint, model__layers__0__self_attn__rotary_emb__inv_freq=inv_freq)
    assert HFCheckpoint(checkpoint).paths() == tuple(tensor_shapes(tiny("llama")))


def test_a_stored_tied_head_must_be_the_embedding(tmp_path: Path) -> None:
    config = tiny("qwen3", vocab_size=5000)
    export_hf(config, random_params(config), tmp_path / "model")
    embed = load_file(tmp_path / "model" / "model.safetensors")["model.embed_tokens.weight"]
    edit_tensors(tmp_path / "model", lm_head__weight=embed)
    assert "lm_head" not in HFCheckpoint(tmp_path / "model").paths()
    embed[-1, -1] += 1
    edit_tensors(tmp_path / "model", lm_head__weight=embed)
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' differs from the embedding; set tie_word"):
        HFCheckpoint(tmp_path / "model")


def test_missing_tensor(checkpoint: Path) -> None:
    edit_tensors(checkpoint, model__layers__1__mlp__up_proj__weight=None)
    with pytest.raises(CheckpointError, match=r"tensor 'model.layers.1.mlp.up_proj.weight' is missing"):
        HFCheckpoint(checkpoint)


def test_missing_layer(checkpoint: Path) -> None:
    edit_config(checkpoint, num_hidden_layers=4)
    with pytest.raises(CheckpointError, match=r"model.layers.3.*and 6 more are missing.*number of layers"):
        HFCheckpoint(checkpoint)


def test_unknown_tensor(checkpoint: Path) -> None:
    edit_tensors(checkpoint, model__layers__0__mlp__router__weight=np.ones((4, 4), np.float32))
    with pytest.raises(CheckpointError, match=r"'model.layers.0.mlp.router.weight' is not part of this arch"):
        HFCheckpoint(checkpoint)


def test_wrong_shape(checkpoint: Path) -> None:
    edit_tensors(checkpoint, model__norm__weight=np.ones(63, np.float32))
    with pytest.raises(CheckpointError, match=r"safetensors: tensor 'model.norm.weight' has shape \[63\].*\[64\]"):
        HFCheckpoint(checkpoint)


def test_unsupported_dtype(checkpoint: Path) -> None:
    edit_tensors(checkpoint, model__norm__weight=np.ones(64, np.int8))
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' has dtype I8, supported are F32, F16, BF16"):
        HFCheckpoint(checkpoint)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_file(checkpoint: Path, keep: int) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model.safetensors: damaged or truncated.*download it again"):
        HFCheckpoint(checkpoint)


def test_garbled_header(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[20:40] = b"\xff" * 20
    file.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=r"damaged or truncated"):
        HFCheckpoint(checkpoint)


def test_missing_shard(tmp_path: Path) -> None:
    config = tiny("llama")
    export_hf(config, random_params(config), tmp_path / "model", max_shard_bytes=100_000)
    shard = sorted((tmp_path / "model").glob("model-00002*"))[0]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name}: this shard is named by .* download it"):
        HFCheckpoint(tmp_path / "model")


def test_index_that_names_the_wrong_shard(tmp_path: Path) -> None:
    config = tiny("llama")
    export_hf(config, random_params(config), tmp_path / "model", max_shard_bytes=100_000)
    file = tmp_path / "model" / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.norm.weight"] = index["weight_map"]["model.embed_tokens.weight"]
    file.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' is not in the shard"):
        HFCheckpoint(tmp_path / "model")
    file.write_text("{}")
    with pytest.raises(CheckpointError, match=r"has no weight_map"):
        HFCheckpoint(tmp_path / "model")


def test_no_weights(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"found pytorch_model.bin; save the model with transformers'"):
        HFCheckpoint(checkpoint)
    (checkpoint / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"neither model.safetensors nor .* download the weights"):
        HFCheckpoint(checkpoint)


@pytest.mark.parametrize(("content", "message"), [("{", "not readable as JSON"), ("[]", "not a JSON object")])
def test_unreadable_configuration(checkpoint: Path, content: str, message: str) -> None:
    (checkpoint / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"config.json: {message}.*download"):
        HFCheckpoint(checkpoint)


def test_missing_configuration(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config.json: no such file"):
        HFCheckpoint(tmp_path)


def test_unknown_key_names_the_file(checkpoint: Path) -> None:
    edit_config(checkpoint, surprise=1)
    with pytest.raises(ConfigError, match=r"config.json: unknown keys.*surprise = 1"):
        HFCheckpoint(checkpoint)
    assert HFCheckpoint(checkpoint, ignore_keys=["surprise"]).config == tiny("llama")


def test_export_never_overwrites_silently(checkpoint: Path) -> None:
    config = tiny("qwen3")
    params = random_params(config)
    before = (checkpoint / "config.json").read_bytes()
    with pytest.raises(FileExistsError, match=r"is not empty; choose another directory or pass overwrite=True"):
        export_hf(config, params, checkpoint)
    assert (checkpoint / "config.json").read_bytes() == before
    export_hf(config, params, checkpoint, overwrite=True)
    assert HFCheckpoint(checkpoint).config == config
    with pytest.raises(FileExistsError, match=r"is a file"):
        export_hf(config, params, checkpoint / "config.json")


def test_a_failed_export_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    class Breaks(HFCheckpoint):
        def tensor(self, path: str, dtype: Any = None) -> np.ndarray:
            if path == "norm":
                raise CheckpointError("the disk is gone")
            return super().tensor(path, dtype)

    source = Breaks(checkpoint)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=r"the disk is gone"):
        export_hf(source.config, source, tmp_path / "copy")
    with pytest.raises(CheckpointError, match=r"the disk is gone"):
        export_hf(source.config, source, checkpoint, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert HFCheckpoint(checkpoint).config == source.config


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    params = random_params(tiny("llama"))
    with pytest.raises(CheckpointError, match=r"'lm_head' is not part of this architecture"):
        ArraySource(tiny("llama", tie_word_embeddings=True), params)
    with pytest.raises(CheckpointError, match=r"'embed' has shape \[128, 64\].*\[256, 64\]"):
        export_hf(tiny("llama", vocab_size=256), params, tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"'embed' has shape"):
        export_hf(tiny("llama", vocab_size=256), ArraySource(tiny("llama"), params), tmp_path / "model")
    with pytest.raises(ConfigError, match=r"cannot express qkv_bias"):
        config = tiny("llama", qkv_bias=True)
        export_hf(config, random_params(config), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_every_tensor_has_its_own_name() -> None:
    for family in FAMILIES:
        config = tiny(family)
        names = [hf_tensor(config, path)[0] for path in tensor_shapes(config)]
        assert len(set(names)) == len(names)
        assert to_hf_config(config)["model_type"] == family
