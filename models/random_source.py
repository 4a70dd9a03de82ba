"""Random weights as a checkpoint: the sizes of a real model without its files, one tensor in memory at a time."""

from __future__ import annotations

import os
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import DTypeLike

from jax_mono.config import ModelConfig
from jax_mono.models.source import tensor_shapes, weight_dtype

_CHUNK = 1 << 20
"""Values that one generator draws: small beside a tensor, large beside the cost of a generator."""


class RandomSource:
    """A ``WeightSource`` that draws what it is asked for, with the statistics of a fresh ``Transformer``.

    Matrices are normal with standard deviation ``fan_in ** -0.5``, norms one and biases zero. A tensor depends only on
    the seed, its path and its shape; 16-bit values are the float32 values rounded.

    Attributes:
        config: The model.
        seed: Of the random numbers.
    """

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        """Draws nothing yet.

        Args:
            config: The model.
            seed: Same seed, same weights.
        """
        self.config = config
        self.seed = seed

    def paths(self) -> tuple[str, ...]:
        """Canonical paths of all tensors."""
        return tuple(tensor_shapes(self.config))

    def dtype(self, path: str) -> np.dtype:
        """The dtype of a tensor when none is asked for: float32."""
        return np.dtype(np.float32)

    def tensor(self, path: str, dtype: DTypeLike | None = None) -> np.ndarray:
        """Draws one tensor; see ``WeightSource.tensor``."""
        shape = tensor_shapes(self.config)[path]
        target = weight_dtype(np.float32 if dtype is None else dtype)
        name = path.rpartition(".")[2]
        if "norm" in name:
            return np.ones(shape, target)
        if name.startswith("b"):
            return np.zeros(shape, target)
        # The lanes of these two add up, so the sum has the columns of all of them.
        row_parallel = name in ("wo", "w2")
        deviation = np.float32((shape[-1] * (shape[0] if row_parallel else 1)) ** -0.5)
        values = np.empty(shape, target)
        flat = values.reshape(-1)
        path_seed = zlib.crc32(path.encode())

        def draw(chunk: int) -> None:
            part = flat[chunk * _CHUNK : (chunk + 1) * _CHUNK]
            generator = np.random.Generator(np.random.SFC64([self.seed, path_seed, chunk]))
            part[:] = generator.standard_normal(len(part), np.float32) * deviation

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(draw, range(-(-len(flat) // _CHUNK))))
        return values
