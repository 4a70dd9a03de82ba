"""The GGUF container: metadata and a table of tensors, read without any other package.

Layout: magic, version, counts, metadata pairs, tensor descriptions, padding to the alignment, tensor data.
    Strings are
a 64-bit length and UTF-8. See https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The ``gguf`` package
reads it too, but takes seconds for the vocabulary; a start of the program should not.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jax_mono.models.source import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

# Value types of the format by number: struct codes of scalars, then the two that have a length.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_FLOAT32 = 6
_STRING = 8
_ARRAY = 9


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as the file describes it.

    Attributes:
        name: Name in the file.
        shape: Outermost dimension first, as numpy counts.
        kind: Number of the ggml type, such as 3 for Q4_1.
        offset: Of the first byte, from the start of the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


class GGUFFile:
    """An opened GGUF file.

    Attributes:
        path: The file.
        metadata: Key to scalar, string or list. 32-bit floats are the shortest decimal that rounds to them,
            so that an epsilon of 1e-5 compares equal to 1e-5.
        tensors: Name to description.
    """

    def __init__(self, path: str | Path) -> None:
        """Reads metadata and the table of tensors.

        Args:
            path: The file.

        Raises:
            CheckpointError: If the file is missing, truncated or not GGUF.
        """
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                if file.read(4) != MAGIC:
                    raise CheckpointError(f"{path}: not a GGUF file; it does not start with 'GGUF'")
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    self._parse(data)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such file") from None
        except CheckpointError:
            raise
        except (struct.error, LookupError, ArithmeticError, ValueError, TypeError, MemoryError) as error:
            raise CheckpointError(
                f"{path}: damaged or truncated GGUF file, {self.path.stat().st_size} bytes; download it again"
            ) from error

    def _parse(self, data: mmap.mmap) -> None:
        reader = _Reader(data)
        version = reader.scalar("I")
        if version not in VERSIONS:
            raise CheckpointError(
                f"{self.path}: GGUF version {version} is not supported, only little-endian {VERSIONS}"
            )
        tensor_count, pair_count = reader.scalar("Q"), reader.scalar("Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(pair_count):
            key = reader.string()
            self.metadata[key] = reader.value(reader.scalar("I"))

        descriptions = []
        for _ in range(tensor_count):
            name = reader.string()
            sizes = [reader.scalar("Q") for _ in range(reader.scalar("I"))]
            descriptions.append((name, tuple(reversed(sizes)), reader.scalar("I"), reader.scalar("Q")))
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        start = -(-reader.offset // alignment) * alignment
        self.tensors = {name: StoredTensor(name, shape, kind, start + at) for name, shape, kind, at in descriptions}
        self._size = len(data)

    def read(self, tensor: StoredTensor, nbytes: int) -> np.ndarray:
        """Reads the bytes of a tensor into fresh memory.

        Args:
            tensor: The tensor.
            nbytes: How many bytes its type and shape take.

        Returns:
            uint8[nbytes].

        Raises:
            CheckpointError: If the file ends before the tensor does.
        """
        self.check_inside(tensor, nbytes)
        return np.fromfile(self.path, np.uint8, count=nbytes, offset=tensor.offset)

    def check_inside(self, tensor: StoredTensor, nbytes: int) -> None:
        """Refuses a tensor that reaches beyond the end of the file.

        Raises:
            CheckpointError: Naming file, tensor and sizes.
        """
        if tensor.offset + nbytes > self._size:
            raise CheckpointError(
                f"{self.path}: truncated, tensor {tensor.name!r} ends at byte {tensor.offset + nbytes} "
                f"of {self._size}; download it again"
            )


class _Reader:
    """Walks over the header. Reading past the end raises struct.error."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.offset = len(MAGIC)

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.offset)
        self.offset += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        end = self.offset + length
        if end > len(self.data):
            raise struct.error("string reaches beyond the end of the file")
        text = self.data[self.offset : end].decode()
        self.offset = end
        return text

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        value = self.scalar(_SCALARS[kind])
        return float(str(np.float32(value))) if kind == _FLOAT32 else value

    def array(self) -> list[Any]:
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind in (_STRING, _ARRAY):
            return [self.value(kind) for _ in range(count)]
        values = struct.unpack_from(f"<{count}{_SCALARS[kind]}", self.data, self.offset)
        self.offset += struct.calcsize(f"<{count}{_SCALARS[kind]}")
        return list(values)
