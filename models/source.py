"""Where weights come from: one small protocol that every checkpoint format satisfies.

A checkpoint is a ``ModelConfig`` and one array for each canonical path of the parameter tree, such as
``embed``, ``layers.3.attention.wq`` or ``norm``. Sources hand out one array at a time and keep none, so that
a model can be packed layer by layer while no more than one tensor of it is in memory twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from jax_mono.config import ModelConfig

Params = dict[str, Any]
"""Nested dicts of arrays; the key ``layers`` holds a dict from layer number to layer."""

OnTensor = Callable[[str, int], None]
"""Called after each tensor with its canonical path and its size in bytes, for progress bars."""

WEIGHT_DTYPES = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names file, tensor and remedy."""


@runtime_checkable
class WeightSource(Protocol):
    """A checkpoint that is read one tensor at a time."""

    @property
    def config(self) -> ModelConfig:
        """The configuration of the model that the weights belong to."""
        ...

    def paths(self) -> tuple[str, ...]:
        """Canonical paths of all tensors, in the order in which a forward pass uses them."""
        ...

    def dtype(self, path: str) -> np.dtype:
        """The dtype that ``tensor(path)`` has when none is asked for, known without reading it."""
        ...

    def tensor(self, path: str, dtype: DTypeLike | None = None) -> np.ndarray:
        """Reads one tensor.

        Args:
            path: Canonical path.
            dtype: float32, bfloat16 or float16; None keeps what the checkpoint holds.

        Returns:
            A fresh C-contiguous array of the canonical shape; the source keeps no reference to it.

        Raises:
            CheckpointError: If the tensor cannot be read.
        """
        ...


@functools.lru_cache(maxsize=16)
def tensor_shapes(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """Says which tensors a model has.

    Args:
        config: The model.

    Returns:
        Canonical path to shape, in the order in which a forward pass uses them. The lane axis of a
        projection is always there; it is 1 for a dense model.
    """
    lanes, hidden = config.num_lanes, config.hidden_size
    q = config.num_heads * config.head_dim // lanes
    kv = config.num_kv_heads * config.head_dim // lanes
    ffn = config.intermediate_size // lanes

    layer: dict[str, tuple[int, ...]] = {
        "attention_norm": (hidden,),
        "attention.wq": (lanes, q, hidden),
        "attention.wk": (lanes, kv, hidden),
        "attention.wv": (lanes, kv, hidden),
    }
    if config.qkv_bias:
        layer |= {"attention.bq": (lanes, q), "attention.bk": (lanes, kv), "attention.bv": (lanes, kv)}
    if config.qk_norm:
        layer |= {"attention.q_norm": (config.head_dim,), "attention.k_norm": (config.head_dim,)}
    layer |= {
        "attention.wo": (lanes, hidden, q),
        "ffn_norm": (hidden,),
        "feed_forward.w1": (lanes, ffn, hidden),
        "feed_forward.w3": (lanes, ffn, hidden),
        "feed_forward.w2": (lanes, hidden, ffn),
    }

    shapes: dict[str, tuple[int, ...]] = {"embed": (config.vocab_size, hidden)}
    for index in range(config.num_layers):
        shapes |= {f"layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes["norm"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head"] = (config.vocab_size, hidden)
    return MappingProxyType(shapes)


def convert(array: np.ndarray, dtype: DTypeLike | None) -> np.ndarray:
    """Converts weights to the dtype asked for, rounding to nearest even.

    Args:
        array: float32, bfloat16 or float16.
        dtype: float32, bfloat16, float16, or None for no conversion.

    Returns:
        A C-contiguous array.

    Raises:
        CheckpointError: If the dtype is none of those that weights may have, or too narrow for the weights.
    """
    if dtype is None:
        return np.ascontiguousarray(array)
    target = weight_dtype(dtype)
    with np.errstate(over="ignore"):
        converted = np.ascontiguousarray(array.astype(target, copy=False))
    if target == np.float16 and array.dtype != np.float16 and not np.isfinite(converted).all():
        largest = np.abs(array[np.isfinite(array)].astype(np.float32)).max(initial=0.0)
        if largest > np.finfo(np.float16).max:
            raise CheckpointError(
                f"a weight of {largest:g} is beyond float16, which ends at {np.finfo(np.float16).max:g}; use bfloat16"
            )
    return converted


def weight_dtype(dtype: DTypeLike) -> np.dtype:
    """Checks that weights may have a dtype.

    Raises:
        CheckpointError: If it is none of float32, bfloat16 and float16.
    """
    target = np.dtype(dtype)
    if target not in WEIGHT_DTYPES:
        raise CheckpointError(f"weights cannot be read as {target.name}; ask for float32, bfloat16 or float16")
    return target


def flatten(params: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Walks a parameter tree.

    Args:
        params: Nested mappings with arrays at the leaves.
        prefix: Canonical path of ``params`` itself.

    Yields:
        Canonical path and array of each leaf.
    """
    for key, value in params.items():
        path = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping):
            yield from flatten(value, path)
        else:
            yield path, value


def unflatten(arrays: Mapping[str, Any]) -> Params:
    """Builds a parameter tree from canonical paths; the inverse of ``flatten``."""
    tree: Params = {}
    for path, array in arrays.items():
        *parents, leaf = path.split(".")
        node: dict[Any, Any] = tree
        for key in parents:
            node = node.setdefault(int(key) if key.isdigit() else key, {})
        node[leaf] = array
    return tree


def read_params(source: WeightSource, dtype: DTypeLike | None = None, on_tensor: OnTensor | None = None) -> Params:
    """Reads a whole model.

    Args:
        source: The checkpoint.
        dtype: float32, bfloat16 or float16 for all tensors; None keeps what the checkpoint holds.
        on_tensor: Progress callback.

    Returns:
        The parameter tree, as numpy arrays.
    """
    arrays = {}
    for path in source.paths():
        arrays[path] = source.tensor(path, dtype)
        if on_tensor is not None:
            on_tensor(path, arrays[path].nbytes)
    return unflatten(arrays)


class ArraySource:
    """A parameter tree in memory as a ``WeightSource``.

    Arrays may be numpy or JAX arrays, sharded ones included.

    Attributes:
        config: The model.
        arrays: Canonical path to array.
    """

    def __init__(self, config: ModelConfig, params: Mapping[Any, Any]) -> None:
        """Checks the tree against the configuration.

        Args:
            config: The model.
            params: Nested mappings in the canonical layout.

        Raises:
            CheckpointError: If a tensor is missing, unknown or has the wrong shape.
        """
        self.config = config
        self.arrays = dict(flatten(params))
        shapes = tensor_shapes(config)
        check_names("the parameter tree", shapes, self.arrays)
        for path, shape in shapes.items():
            check_shape("the parameter tree", path, shape, tuple(self.arrays[path].shape))

    def paths(self) -> tuple[str, ...]:
        """Canonical paths of all tensors."""
        return tuple(tensor_shapes(self.config))

    def dtype(self, path: str) -> np.dtype:
        """The dtype of one tensor."""
        return np.dtype(self.arrays[path].dtype)

    def tensor(self, path: str, dtype: DTypeLike | None = None) -> np.ndarray:
        """Copies one tensor out of the tree."""
        return convert(np.array(self.arrays[path]), dtype)


def check_names(where: str, expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Refuses a checkpoint whose tensor names are not exactly those expected.

    Args:
        where: File or directory, for the message.
        expected: Mapping whose keys are the names that must be there.
        found: Mapping whose keys are the names that are there.

    Raises:
        CheckpointError: Naming the missing or the unexpected tensors.
    """
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    if missing:
        raise CheckpointError(
            f"{where}: {_some(missing)} missing; the file is incomplete or the configuration describes "
            "another model (check the number of layers, tie_word_embeddings and the model type)"
        )
    if extra:
        raise CheckpointError(
            f"{where}: {_some(extra)} not part of this architecture; "
            "the configuration describes another model, or the model has parts that are not supported"
        )


def check_shape(where: str, name: str, expected: tuple[int, ...], found: tuple[int, ...]) -> None:
    """Refuses a tensor whose shape is not the expected one.

    Raises:
        CheckpointError: Naming file, tensor and both shapes.
    """
    if expected != found:
        raise CheckpointError(
            f"{where}: tensor {name!r} has shape {list(found)}, the configuration asks for {list(expected)}; "
            "weights and configuration do not belong together"
        )


def _some(names: list[str], limit: int = 3) -> str:
    """Names a few tensors: ``tensor 'a' is`` or ``tensors 'a', 'b', 'c' and 7 more are``."""
    shown = ", ".join(repr(name) for name in names[:limit])
    if len(names) > limit:
        shown += f" and {len(names) - limit} more"
    return f"tensor {shown} is" if len(names) == 1 else f"tensors {shown} are"
