"""Hugging Face checkpoints: a directory with ``config.json`` and safetensors files, in and out.

Dense models store a projection as ``[out, in]``; here it has a lane axis of one in front. Laneformer files
have the lane axis already. Nothing is transposed or permuted, so a round trip is exact bit for bit.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from jax_mono.atomic import new_directory
from jax_mono.config import ModelConfig
from jax_mono.models.hf_config import from_hf_config, to_hf_config
from jax_mono.models.safetensors_file import (
    INDEX,
    SINGLE,
    StoredTensor,
    read_headers,
    read_json,
    write_safetensors,
)
from jax_mono.models.source import (
    ArraySource,
    CheckpointError,
    OnTensor,
    Params,
    WeightSource,
    check_names,
    check_shape,
    convert,
    read_params,
    tensor_shapes,
    weight_dtype,
)

_DENSE_NAMES = {
    "embed": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
    "attention_norm": "input_layernorm.weight",
    "attention.wq": "self_attn.q_proj.weight",
    "attention.wk": "self_attn.k_proj.weight",
    "attention.wv": "self_attn.v_proj.weight",
    "attention.wo": "self_attn.o_proj.weight",
    "attention.bq": "self_attn.q_proj.bias",
    "attention.bk": "self_attn.k_proj.bias",
    "attention.bv": "self_attn.v_proj.bias",
    "attention.q_norm": "self_attn.q_norm.weight",
    "attention.k_norm": "self_attn.k_norm.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "feed_forward.w1": "mlp.gate_proj.weight",
    "feed_forward.w3": "mlp.up_proj.weight",
    "feed_forward.w2": "mlp.down_proj.weight",
}

# Files that travel with an exported checkpoint although they hold no weights.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)

# Projections and their biases have a lane axis in front.
_LANE_AXIS = re.compile(r"\.[wb][qkvo123]$")

# Buffers that some writers store and that follow from the configuration.
_HARMLESS = re.compile(r"(^|\.)rotary_emb\.inv_freq$|^model\.freqs_cis$")


def hf_tensor(config: ModelConfig, path: str) -> tuple[str, tuple[int, ...]]:
    """Says where a Hugging Face checkpoint keeps a tensor.

    Args:
        config: The model.
        path: Canonical path.

    Returns:
        The tensor's name and shape in the checkpoint; the canonical tensor is a reshape of it.
    """
    shape = tensor_shapes(config)[path]
    return _hf_name(config, path), _hf_shape(config, path, shape)


def _hf_name(config: ModelConfig, path: str) -> str:
    prefix, name = "", path
    if path.startswith("layers."):
        _, layer, name = path.split(".", 2)
        prefix = f"model.layers.{layer}."
    if config.family != "laneformer":
        return prefix + _DENSE_NAMES[name]
    if name == "embed":
        return "model.tok_embeddings.weight"
    return (prefix or ("" if name == "lm_head" else "model.")) + f"{name}.weight"


def _hf_shape(config: ModelConfig, path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if config.lanes is None:
        return shape[1:] if _LANE_AXIS.search(path) else shape
    if path == "lm_head" and config.lanes.head == "per_lane":
        return (config.num_lanes, shape[0] // config.num_lanes, shape[1])
    return shape


class HFCheckpoint:
    """A Hugging Face checkpoint directory as a ``WeightSource``.

    Opening reads and checks the configuration and all headers, but no weights, except to compare an LM head
    that is stored although it is tied.

    Attributes:
        directory: Where the checkpoint lies.
        config: The model. Its end-of-text tokens include those of ``generation_config.json``.
        config_json: Content of ``config.json``, byte for byte.
    """

    def __init__(self, directory: str | Path, *, ignore_keys: Collection[str] = ()) -> None:
        """Opens a checkpoint.

        Args:
            directory: The directory.
            ignore_keys: Keys of ``config.json`` to ignore although they are unknown.

        Raises:
            CheckpointError: If files or tensors are missing, damaged, unknown or of the wrong shape.
            ConfigError: If the configuration is not supported.
        """
        self.directory = Path(directory)
        file = self.directory / "config.json"
        raw = read_json(file)
        if not isinstance(raw, dict):
            raise CheckpointError(f"{file}: not a JSON object; download the file again")
        self.config_json = file.read_bytes()
        config = from_hf_config(raw, ignore_keys=ignore_keys, where=str(file))
        self.config = config.replace(eos_token_ids=_all_eos(self.directory, config.eos_token_ids))
        self._tensors = self._check(read_headers(self.directory))

    def _check(self, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
        stored = {name: tensor for name, tensor in stored.items() if not _HARMLESS.search(name)}
        head = stored.get("lm_head.weight")
        if self.config.tie_word_embeddings and head is not None:
            embed = stored.get(_hf_name(self.config, "embed"))
            if embed is None or not _equal(embed, head):
                raise CheckpointError(
                    f"{head.file}: tie_word_embeddings is true but tensor 'lm_head.weight' differs from the "
                    "embedding; set tie_word_embeddings to false in config.json"
                )
            del stored["lm_head.weight"]
        expected = {path: hf_tensor(self.config, path) for path in tensor_shapes(self.config)}
        check_names(str(self.directory), {name: None for name, _ in expected.values()}, stored)
        for name, shape in expected.values():
            check_shape(str(stored[name].file), name, shape, stored[name].shape)
            _ = stored[name].dtype  # refuses what weights cannot be
        return {path: stored[name] for path, (name, _) in expected.items()}

    def paths(self) -> tuple[str, ...]:
        """Canonical paths of all tensors."""
        return tuple(self._tensors)

    def dtype(self, path: str) -> np.dtype:
        """The dtype of one tensor in its file."""
        return self._tensors[path].dtype

    def tensor(self, path: str, dtype: DTypeLike | None = None) -> np.ndarray:
        """Reads one tensor; see ``WeightSource.tensor``."""
        array = self._tensors[path].read()
        return convert(array.reshape(tensor_shapes(self.config)[path]), dtype)


def _all_eos(directory: Path, ids: tuple[int, ...]) -> tuple[int, ...]:
    """Adds the end-of-text tokens that only ``generation_config.json`` names."""
    file = directory / "generation_config.json"
    if not file.exists():
        return ids
    raw = read_json(file)
    more = raw.get("eos_token_id") if isinstance(raw, dict) else None
    more = more if isinstance(more, list) else [] if more is None else [more]
    return tuple(dict.fromkeys((*ids, *more)))


def _equal(one: StoredTensor, other: StoredTensor, rows: int = 4096) -> bool:
    if one.shape != other.shape or one.code != other.code:
        return False
    pairs = zip(one.rows(rows), other.rows(rows), strict=True)
    return all(np.array_equal(a.view(np.uint8), b.view(np.uint8)) for a, b in pairs)


def load_hf(
    directory: str | Path, dtype: DTypeLike | None = None, on_tensor: OnTensor | None = None
) -> tuple[ModelConfig, Params]:
    """Reads a whole Hugging Face checkpoint.

    Args:
        directory: The directory.
        dtype: float32, bfloat16 or float16 for all tensors; None keeps what the files hold.
        on_tensor: Progress callback.

    Returns:
        The configuration and the parameter tree.
    """
    source = HFCheckpoint(directory)
    return source.config, read_params(source, dtype, on_tensor)


def export_hf(
    config: ModelConfig,
    weights: WeightSource | Mapping[Any, Any],
    directory: str | Path,
    *,
    dtype: DTypeLike | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    on_tensor: OnTensor | None = None,
) -> None:
    """Writes a Hugging Face checkpoint, one tensor in memory at a time.

    An imported Hugging Face checkpoint keeps its ``config.json`` byte for byte, and its tokenizer files,
    unless configuration or dtype change.

    Args:
        config: The model.
        weights: A parameter tree or any checkpoint of that model.
        directory: Where to; it appears only once it is complete.
        dtype: float32, bfloat16 or float16 for all tensors; None keeps what ``weights`` holds.
        max_shard_bytes: Above this size the weights are split over several files.
        overwrite: Whether a directory that has content is replaced.
        on_tensor: Progress callback.

    Raises:
        FileExistsError: If the directory has content and ``overwrite`` is false.
        CheckpointError: If the weights do not belong to the configuration.
        ConfigError: If the format cannot express the configuration.
    """
    source = weights if isinstance(weights, WeightSource) else ArraySource(config, weights)
    check_names("the weights", tensor_shapes(config), dict.fromkeys(source.paths()))
    stored = {path: source.dtype(path) if dtype is None else weight_dtype(dtype) for path in source.paths()}
    names = {hf_tensor(config, path)[0]: path for path in stored}

    def load(name: str) -> np.ndarray:
        path = names[name]
        array = source.tensor(path, dtype)
        check_shape("the weights", path, tensor_shapes(config)[path], array.shape)
        if on_tensor is not None:
            on_tensor(path, array.nbytes)
        return array.reshape(hf_tensor(config, path)[1])

    specs = {name: (hf_tensor(config, path)[1], stored[path]) for name, path in names.items()}
    with new_directory(Path(directory), overwrite=overwrite) as fresh:
        (fresh / "config.json").write_bytes(_config_json(config, source, stored))
        if isinstance(source, HFCheckpoint):
            for name in COMPANIONS:
                if (source.directory / name).exists():
                    shutil.copy(source.directory / name, fresh / name)
        _write_shards(fresh, _shards(specs, max_shard_bytes), load)


def _config_json(config: ModelConfig, source: WeightSource, stored: Mapping[str, np.dtype]) -> bytes:
    if (
        isinstance(source, HFCheckpoint)
        and source.config == config
        and all(source.dtype(path) == dtype for path, dtype in stored.items())
    ):
        return source.config_json
    names = {dtype.name for dtype in stored.values()}
    raw = to_hf_config(config, dtype=names.pop() if len(names) == 1 else None)
    return (json.dumps(raw, indent=2) + "\n").encode()


_Specs = dict[str, tuple[tuple[int, ...], np.dtype]]


def _shards(specs: _Specs, limit: int) -> list[_Specs]:
    """Cuts the list of tensors where a file would grow beyond ``limit`` bytes."""
    shards: list[_Specs] = [{}]
    size = 0
    for name, (shape, dtype) in specs.items():
        nbytes = int(np.prod(shape)) * dtype.itemsize
        if shards[-1] and size + nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = (shape, dtype)
        size += nbytes
    return shards


def _write_shards(directory: Path, shards: list[_Specs], load: Any) -> None:
    if len(shards) == 1:
        write_safetensors(directory / SINGLE, shards[0], load)
        return
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(directory / file, shard, load)
        weight_map |= dict.fromkeys(shard, file)
        total += sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
