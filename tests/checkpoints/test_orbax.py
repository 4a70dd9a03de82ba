"""Orbax checkpoints: exact on any number of devices, read layer by layer, strict about configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from checkpoints.gguf_files import metadata, tensors, write
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tiny import random_params, tiny

from jax_mono import checkpoint
from jax_mono.checkpoint import OrbaxCheckpoint, config_from_dict, config_to_dict, open_checkpoint
from jax_mono.config import ConfigError, Lanes, ModelConfig, RopeScaling
from jax_mono.models.gguf import GGUFCheckpoint
from jax_mono.models.hf import HFCheckpoint, export_hf
from jax_mono.models.source import (
    ArraySource,
    CheckpointError,
    WeightSource,
    flatten,
    read_params,
    tensor_shapes,
    unflatten,
)

CONFIGS = [
    tiny("llama", eos_token_ids=(2, 3), bos_token_id=1),
    tiny("qwen2", rope_scaling=RopeScaling(kind="yarn", factor=2.0, original_max_position_embeddings=64)),
    tiny("qwen3"),
    tiny("laneformer", lanes=Lanes(count=8, delay=1, head="per_lane", own_scale="one")),
]


def over(devices: int) -> Any:
    """Splits the lane axis of projections over some devices and copies everything else to all of them."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("lane",))
    shapes = tensor_shapes(tiny("laneformer"))

    def place(path: str) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec("lane") if len(shapes[path]) == 3 else PartitionSpec())

    return place


def assert_same(left: Any, right: Any) -> None:
    left, right = dict(flatten(left)), dict(flatten(right))
    assert left.keys() == right.keys()
    for path, array in left.items():
        a, b = np.asarray(array), np.asarray(right[path])
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.family)
def test_round_trip_is_exact(tmp_path: Path, config: ModelConfig, dtype: str) -> None:
    params = random_params(config, dtype=dtype)
    checkpoint.save(tmp_path / "model", config, params)
    loaded_config, loaded = checkpoint.restore(tmp_path / "model")
    assert loaded_config == config
    assert_same(loaded, params)
    assert all(isinstance(array, np.ndarray) for _, array in flatten(loaded))
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


@pytest.mark.parametrize("saved_by", [8, 1])
def test_any_number_of_devices(tmp_path: Path, saved_by: int) -> None:
    config = tiny("laneformer")
    params = random_params(config, dtype="bfloat16")
    placed = {path: jax.device_put(array, over(saved_by)(path)) for path, array in flatten(params)}
    checkpoint.save(tmp_path / "model", config, unflatten(placed))
    for devices in (8, 4, 1):
        _, loaded = checkpoint.restore(tmp_path / "model", sharding=over(devices))
        assert_same(loaded, params)
        wq = loaded["layers"][0]["attention"]["wq"]
        assert len(wq.addressable_shards) == devices
        assert wq.addressable_shards[0].data.shape[0] == 8 // devices
        assert len(loaded["norm"].sharding.device_set) == devices


def test_one_sharding_for_all_and_conversion(tmp_path: Path) -> None:
    config = tiny("llama")
    params = random_params(config)
    checkpoint.save(tmp_path / "model", config, params)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    seen: list[str] = []
    _, loaded = checkpoint.restore(
        tmp_path / "model", dtype="bfloat16", sharding=device, on_tensor=lambda path, _: seen.append(path)
    )
    assert_same(loaded, jax.tree.map(lambda array: array.astype("bfloat16"), params))
    assert loaded["norm"].sharding == device
    assert sorted(seen) == sorted(tensor_shapes(config))


def test_one_tensor_at_a_time(tmp_path: Path) -> None:
    config = tiny("qwen2")
    params = random_params(config, dtype="bfloat16")
    checkpoint.save(tmp_path / "model", config, params)
    source = OrbaxCheckpoint(tmp_path / "model")
    assert source.paths() == tuple(tensor_shapes(config))
    assert source.dtype("embed") == "bfloat16"
    assert_same(read_params(source), params)
    wide = source.tensor("layers.1.attention.bk", "float32")
    assert np.array_equal(wide, params["layers"][1]["attention"]["bk"].astype(np.float32))
    with pytest.raises(CheckpointError, match=r"ask for float32, bfloat16 or float16"):
        source.restore(["norm"], "int8")


def test_saving_from_another_format(tmp_path: Path) -> None:
    config = tiny("llama")
    export_hf(config, random_params(config), tmp_path / "hf")
    checkpoint.save(tmp_path / "orbax", config, HFCheckpoint(tmp_path / "hf"))
    assert_same(checkpoint.restore(tmp_path / "orbax")[1], random_params(config))
    export_hf(config, OrbaxCheckpoint(tmp_path / "orbax"), tmp_path / "again")
    left, right = (tmp_path / name / "model.safetensors" for name in ("hf", "again"))
    assert left.read_bytes() == right.read_bytes()


def test_saving_never_overwrites_silently(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "model", tiny("llama"), random_params(tiny("llama")))
    with pytest.raises(FileExistsError, match=r"is not empty; choose another directory or pass overwrite=True"):
        checkpoint.save(tmp_path / "model", tiny("qwen3"), random_params(tiny("qwen3")))
    assert OrbaxCheckpoint(tmp_path / "model").config == tiny("llama")
    checkpoint.save(tmp_path / "model", tiny("qwen3"), random_params(tiny("qwen3")), overwrite=True)
    assert OrbaxCheckpoint(tmp_path / "model").config == tiny("qwen3")


def test_saving_checks_the_tree(tmp_path: Path) -> None:
    params = random_params(tiny("llama"))
    del params["layers"][1]["ffn_norm"]
    with pytest.raises(CheckpointError, match=r"the parameter tree: tensor 'layers.1.ffn_norm' is missing"):
        checkpoint.save(tmp_path / "model", tiny("llama"), params)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.family)
def test_configuration_survives_json(config: ModelConfig) -> None:
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


def test_configuration_is_strict() -> None:
    raw = config_to_dict(tiny("laneformer"))
    with pytest.raises(ConfigError, match=r"ModelConfig: unknown fields novelty; .* another version"):
        config_from_dict(raw | {"novelty": 1})
    with pytest.raises(ConfigError, match=r"ModelConfig: missing fields norm_eps"):
        config_from_dict({key: value for key, value in raw.items() if key != "norm_eps"})
    with pytest.raises(ConfigError, match=r"Lanes: unknown fields colour"):
        config_from_dict(raw | {"lanes": raw["lanes"] | {"colour": "red"}})


def edit(path: Path, **changes: Any) -> None:
    file = path / "config" / "metadata"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_damage_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "model"
    checkpoint.save(path, tiny("llama"), random_params(tiny("llama")))
    edit(path, format=2)
    with pytest.raises(CheckpointError, match=r"has format 2, this version of jax_mono reads format 1"):
        OrbaxCheckpoint(path)
    edit(path, format=1, model=config_to_dict(tiny("llama", vocab_size=64)))
    with pytest.raises(CheckpointError, match=r"'embed' has shape \[128, 64\]"):
        OrbaxCheckpoint(path)
    edit(path, model=config_to_dict(tiny("llama", num_layers=4)))
    with pytest.raises(CheckpointError, match=r"layers.3.*missing"):
        OrbaxCheckpoint(path)
    (path / "config" / "metadata").write_text("{")
    with pytest.raises(CheckpointError, match=r"damaged or incomplete Orbax checkpoint"):
        OrbaxCheckpoint(path)


def test_missing_array_files_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "model"
    checkpoint.save(path, tiny("llama"), random_params(tiny("llama")))
    source = OrbaxCheckpoint(path)
    for file in (path / "params").rglob("d/*"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"damaged or incomplete Orbax checkpoint"):
        source.tensor("embed")


def test_open_checkpoint_knows_every_format(tmp_path: Path) -> None:
    config = tiny("llama")
    params = random_params(config)
    checkpoint.save(tmp_path / "orbax", config, params)
    export_hf(config, params, tmp_path / "hf")
    (tmp_path / "gguf").mkdir()
    file = write(tmp_path / "gguf" / "model.gguf", "llama", metadata(config), tensors(config, params))
    for path, kind in {
        tmp_path / "orbax": OrbaxCheckpoint,
        tmp_path / "hf": HFCheckpoint,
        file: GGUFCheckpoint,
        file.parent: GGUFCheckpoint,
    }.items():
        source = open_checkpoint(path)
        assert isinstance(source, kind)
        assert isinstance(source, WeightSource)
        assert source.config == config
        assert_same(read_params(source), params)
    assert isinstance(ArraySource(config, params), WeightSource)


def test_open_checkpoint_says_what_it_looked_for(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no such file or directory"):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"looked for config.json .* params/ \(Orbax\) and one .gguf file"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"not an Orbax checkpoint"):
        OrbaxCheckpoint(tmp_path)
