"""Writes a model as a GGUF file, one tensor in memory at a time, laid out as llama.cpp's converter does.

Matrices have the dtype asked for, norms and biases are float32. The vocabulary has a size and no text, so that files
are for programs that take and return token numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np

from jax_mono.config import ModelConfig
from jax_mono.models.gguf import ARCHITECTURES, gguf_name
from jax_mono.models.rope import rope_table
from jax_mono.models.source import WeightSource, tensor_shapes, weight_dtype
from peers.work import Missing

_TYPES = {
    "bfloat16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "float16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "float32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
}


def write_gguf(path: Path, source: WeightSource, dtype: str) -> None:
    """Writes a file.

    Args:
        path: Where to.
        source: A dense model.
        dtype: bfloat16, float16 or float32, of matrices.

    Raises:
        Missing: llama.cpp, or this writer, has nothing for what the configuration asks for.
    """
    config = source.config
    check(config)
    kind, file_type = _TYPES[dtype]
    writer = gguf.GGUFWriter(path, config.family)
    writer.add_file_type(file_type)
    writer.add_tokenizer_model("none")
    _add_sizes(writer, config)
    for name, shape in tensor_shapes(config).items():
        wide = _is_vector(name) or dtype == "float32"
        shape = _stored_shape(name, shape)
        nbytes = math.prod(shape) * (4 if wide else 2)
        stored = gguf.GGMLQuantizationType.F32 if wide else kind
        writer.add_tensor_info(gguf_name(name), shape, np.dtype(np.float32), nbytes, raw_dtype=stored)
    factors = _rope_factors(config)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for array in _arrays(source, dtype):
        writer.write_tensor_data(array)
    if factors is not None:
        writer.write_tensor_data(factors)
    writer.close()


def check(config: ModelConfig) -> None:
    """See ``write_gguf`` for what it raises."""
    if config.family not in ARCHITECTURES:
        raise ValueError(f"{config.family} has no GGUF architecture; take dense_twin of the configuration")
    if config.rope_interleaved and config.family != "llama":
        raise Missing(f"llama.cpp rotates the two halves of a head in {config.family}, not adjacent pairs")
    if config.rope_scaling is not None and config.rope_scaling.kind != "llama3":
        raise Missing(f"the writer of GGUF files has no rotary scaling of kind {config.rope_scaling.kind}")


def file_size(config: ModelConfig, dtype: str) -> int:
    """Bytes that a file takes, to within a few percent of the smallest models."""
    return config.num_parameters * weight_dtype(dtype).itemsize


def _add_sizes(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)


def _is_vector(path: str) -> bool:
    name = path.rpartition(".")[2]
    return "norm" in name or name.startswith("b")


def _stored_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without the lane axis, which is 1."""
    return shape[-1:] if _is_vector(path) else shape[-2:]


def _arrays(source: WeightSource, dtype: str) -> Iterator[np.ndarray[Any, Any]]:
    """Tensors as they lie in the file, in the order of ``tensor_shapes``."""
    config = source.config
    for path, shape in tensor_shapes(config).items():
        array = source.tensor(path, "float32" if _is_vector(path) else dtype).reshape(_stored_shape(path, shape))
        if config.family == "llama" and not config.rope_interleaved and path.endswith((".wq", ".wk")):
            array = _pairs_from_halves(array, config.head_dim)
        yield array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array


def _pairs_from_halves(array: np.ndarray[Any, Any], head_dim: int) -> np.ndarray[Any, Any]:
    """Rows of Q or K [rows, columns]: row i + head_dim / 2 of every head comes right after row i."""
    halves = array.reshape(-1, 2, head_dim // 2, array.shape[-1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)


def _rope_factors(config: ModelConfig) -> np.ndarray[Any, Any] | None:
    """What each rotary frequency is divided by, float32 [head_dim / 2]; None where nothing is."""
    if config.rope_scaling is None:
        return None
    plain, scaled = (
        np.arctan2(table[1, :, 1], table[1, :, 0])  # a frequency is the angle at position 1, below half a turn
        for table in (rope_table(config.replace(rope_scaling=None), 2), rope_table(config, 2))
    )
    return (plain / scaled).astype(np.float32)
