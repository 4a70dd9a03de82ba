"""Writes small GGUF files with the gguf package, laid out as llama.cpp's converter does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType as Kind

from jax_mono.config import ModelConfig
from jax_mono.models.gguf import gguf_name
from jax_mono.models.source import flatten


def pairs_from_halves(array: np.ndarray, heads: int) -> np.ndarray:
    """Reorders the rows of Q and K as the converter does for architecture llama."""
    rows, columns = array.shape
    return array.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def metadata(config: ModelConfig) -> dict[str, Any]:
    """The keys that describe a model, without the architecture's name in front."""
    return {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": config.rope_theta,
    }


def tensors(config: ModelConfig, params: Mapping[Any, Any]) -> dict[str, np.ndarray]:
    """Float32 tensors under their names in the file."""
    result = {}
    for path, value in flatten(params):
        array = np.asarray(value, np.float32)
        if path.startswith("layers.") and array.ndim > 1:
            array = array[0]  # the lane axis
        if config.family == "llama" and path.endswith((".wq", ".wk")):
            array = pairs_from_halves(array, config.num_heads if path.endswith("q") else config.num_kv_heads)
        result[gguf_name(path)] = array
    return result


def write(
    path: Path,
    architecture: str,
    keys: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray | tuple[np.ndarray, Kind]],
    other_keys: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a file.

    Args:
        path: Where to.
        architecture: Such as ``llama``.
        keys: Metadata below the architecture's name; None leaves a key out.
        arrays: Name to float32 values, or to raw rows and their type.
        other_keys: Metadata under their full names.
    """
    writer = gguf.GGUFWriter(path, architecture)
    named = {f"{architecture}.{key}": value for key, value in keys.items()} | dict(other_keys or {})
    for key, value in named.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    for name, array in arrays.items():
        if isinstance(array, tuple):
            writer.add_tensor(name, array[0], raw_dtype=array[1])
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
