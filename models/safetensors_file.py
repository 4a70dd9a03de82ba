"""Safetensors files and sharded directories: headers first, then one tensor at a time.

The library checks headers and reads tensors. Writing is done here, because the library wants all tensors of a
file in memory at once and a model is exported one tensor at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jax_mono.extras import require
from jax_mono.models.source import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file, as its header describes it.

    Attributes:
        file: The file.
        name: Name of the tensor in the file.
        shape: Shape in the file.
        code: The format's name of the dtype, such as ``BF16``.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    code: str

    @property
    def dtype(self) -> np.dtype:
        """The dtype as numpy knows it.

        Raises:
            CheckpointError: If weights of that dtype are not supported.
        """
        if self.code not in DTYPES:
            raise CheckpointError(
                f"{self.file}: tensor {self.name!r} has dtype {self.code}, supported are "
                f"{', '.join(DTYPES)}; quantised checkpoints must be converted to one of these first"
            )
        return DTYPES[self.code]

    def read(self) -> np.ndarray:
        """Reads the whole tensor into fresh memory; the file is closed again."""
        with _opened(self.file) as file:
            return file.get_tensor(self.name)

    def rows(self, count: int) -> Iterator[np.ndarray]:
        """Reads ``count`` rows at a time."""
        with _opened(self.file) as file:
            view = file.get_slice(self.name)
            for start in range(0, self.shape[0], count):
                yield view[start : min(start + count, self.shape[0])]


def read_json(file: Path) -> Any:
    """Reads a JSON file.

    Raises:
        CheckpointError: If it is missing or unreadable.
    """
    try:
        return json.loads(file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file; a checkpoint directory needs it") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not readable as JSON ({error}); download the file again") from error


def read_headers(directory: Path) -> dict[str, StoredTensor]:
    """Lists the tensors of a single-file or sharded checkpoint.

    Args:
        directory: Holds ``model.safetensors``, or ``model.safetensors.index.json`` and the shards it names.

    Returns:
        Name to tensor, over all shards.

    Raises:
        CheckpointError: If a file is missing, damaged or contradicts the index.
    """
    if not (directory / INDEX).exists():
        if not (directory / SINGLE).exists():
            raise CheckpointError(f"{directory}: neither {SINGLE} nor {INDEX} is there; {_what_else(directory)}")
        return _read_header(directory / SINGLE)

    index = read_json(directory / INDEX)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{directory / INDEX}: has no weight_map; download the file again")
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(weight_map.values())):
        file = directory / shard
        if not file.exists():
            raise CheckpointError(f"{file}: this shard is named by {INDEX} but is not there; download it")
        tensors |= _read_header(file)
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file.name != shard:
            raise CheckpointError(f"{directory / shard}: tensor {name!r} is not in the shard that {INDEX} names")
    return tensors


def _what_else(directory: Path) -> str:
    found = sorted(entry.name for entry in directory.glob("*") if entry.suffix in (".safetensors", ".bin", ".pth"))
    if not found:
        return "download the weights into this directory"
    return f"found {', '.join(found[:3])}; save the model with transformers' save_pretrained first"


def _read_header(file: Path) -> dict[str, StoredTensor]:
    with _opened(file) as opened:
        tensors = {}
        for name in opened.keys():  # noqa: SIM118  # not a dict
            view = opened.get_slice(name)
            tensors[name] = StoredTensor(file, name, tuple(view.get_shape()), view.get_dtype())
        return tensors


def _opened(file: Path) -> Any:
    safetensors = require("safetensors", "hf")
    try:
        return safetensors.safe_open(file, framework="numpy")
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file}: damaged or truncated safetensors file, {file.stat().st_size} bytes ({error}); download it again"
        ) from error


def write_safetensors(
    file: Path,
    tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    load: Callable[[str], np.ndarray],
) -> None:
    """Writes a safetensors file, one tensor in memory at a time.

    Args:
        file: Where to.
        tensors: Name to shape and dtype. Wider dtypes are written first, so that all values are aligned.
        load: Returns the values of a tensor.

    Raises:
        CheckpointError: If a loaded tensor is not what ``tensors`` says.
    """
    ordered = sorted(tensors.items(), key=lambda item: -item[1][1].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (shape, dtype) in ordered:
        size = int(np.prod(shape)) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensor data starts on an 8-byte boundary
    with file.open("wb") as out:
        out.write(len(encoded).to_bytes(8, "little"))
        out.write(encoded)
        for name, (shape, dtype) in ordered:
            array = np.ascontiguousarray(load(name))
            if array.shape != shape or array.dtype != dtype:
                raise CheckpointError(
                    f"{file}: tensor {name!r} came as {array.dtype}{list(array.shape)}, "
                    f"announced as {dtype}{list(shape)}"
                )
            out.write(array.view(np.uint8).reshape(-1).data)
