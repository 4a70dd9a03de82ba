"""Packing: a checkpoint becomes tapes, one stage of one layer at a time.

Never more than the tapes, the matrices of one stage and their tiles are in memory together. GPUs arrange tiles
themselves; for CPUs the host does.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jax_mono import settings
from jax_mono.compression import compress
from jax_mono.config import ConfigError
from jax_mono.device_tapes import DeviceTapes
from jax_mono.models.source import OnTensor, WeightSource, weight_dtype
from jax_mono.plan import LAYER_STAGES, Plan, StageName
from jax_mono.prefill import AXIS
from jax_mono.tape import (
    STAGE_WEIGHTS,
    Tapes,
    own_weights,
    pack_constants,
    stage_tiles,
    storage,
    store_tiles,
    tape_storage,
)
from jax_mono.tile import TileFormat


class IncompressibleError(ConfigError):
    """Weights do not fit into compressed tapes: too many exceptions in one place, or numbers that are not finite."""


def pack(
    plan: Plan,
    source: WeightSource,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    mesh: Mesh | None = None,
    on_tensor: OnTensor | None = None,
) -> Tapes:
    """Reads a checkpoint and packs it for a plan.

    Args:
        plan: The plan; its configuration must be the source's.
        source: The checkpoint, read one tensor at a time.
        dtype: float32, bfloat16 or float16, of the tapes and of the KV cache.
        mesh: A 1-D mesh with axis ``devices`` puts each of its devices' share on that device; None puts all on the
            default device.
        on_tensor: Progress callback.

    Returns:
        The tapes.

    Raises:
        ConfigError: The plan or mesh does not fit, or the plan compresses weights of another dtype than bfloat16.
        IncompressibleError: The plan's tapes are compressed, and these weights cannot be.
        CheckpointError: A tensor cannot be read.
    """
    if source.config != plan.config:
        raise ConfigError("the plan was made for another configuration than the checkpoint's")
    target, config = weight_dtype(dtype), plan.config
    on = [home()] if mesh is None else mesh_devices(mesh, plan.num_devices)
    # On the host wherever weights are read there, and where tapes lie in granules.
    on_host = on[0].platform == "cpu" or plan.placement.interleaved
    tapes = _HostTapes(plan, target, on) if on_host else DeviceTapes(plan, target, on)

    def read(path: str) -> np.ndarray:
        array = source.tensor(path, target)
        if path.rsplit(".", 1)[-1] in _MATRICES:
            array = array.view(storage(target))
        if on_tensor is not None:
            on_tensor(path, array.nbytes)
        return array

    head_path = "embed" if config.tie_word_embeddings else "lm_head"
    embed = read("embed")
    vectors = {}
    for layer in range(config.num_layers):
        for name in LAYER_STAGES:
            matrices = [read(f"layers.{layer}.{path}") for path in STAGE_WEIGHTS[name]]
            tapes.store(name, matrices, layer)
            del matrices
        for path in source.paths():
            if path.startswith(f"layers.{layer}.") and path.rsplit(".", 1)[1] not in _MATRICES:
                vectors[path] = read(path)
    vectors["norm"] = read("norm")
    tapes.store("head", [embed if head_path == "embed" else read(head_path)], None)
    return finish(plan, tapes, on, mesh, embed, vectors, target)


_MATRICES = {"embed", *(path.rsplit(".", 1)[-1] for paths in STAGE_WEIGHTS.values() for path in paths)}


class _HostTapes:
    """Tapes under construction on the host, so that they can lie in huge pages, or in granules."""

    def __init__(self, plan: Plan, dtype: np.dtype, devices: Sequence[jax.Device]) -> None:
        self.plan, self.rows = plan, plan.num_devices // len(devices)
        tapes, stored = plan.placement.tape_rows, tape_storage(plan.tile, dtype)
        shape = (self.rows, tapes, plan.config.num_layers, plan.layer_words)
        self.layers = [_allocate(shape, stored) for _ in devices]
        self.head = [_allocate((self.rows, tapes, plan.head_words), stored) for _ in devices]
        self.spoiled = 0

    def store(self, name: StageName, matrices: Sequence[np.ndarray], layer: int | None) -> None:
        for index, share in enumerate(self.plan.devices):
            tapes = (self.head if layer is None else self.layers)[index // self.rows][index % self.rows]
            tiles = stage_tiles(self.plan.tile, name, own_weights(self.plan, index, name, matrices))
            if self.plan.tile.compressed and not share.stages[name].empty:
                tiles, spoiled = _compressed(self.plan.tile, share.stages[name].cols, tiles)
                self.spoiled += spoiled
            store_tiles(self.plan, share.stages[name], tiles, tapes, layer)


_AT_ONCE = 1 << 20
"""Weights that a core of the host compresses at once: few enough that temporary arrays stay in its caches."""


def _compressed(tile: TileFormat, cols: int, tiles: np.ndarray) -> tuple[np.ndarray, int]:
    """:func:`jax_mono.tape.stored_words` on the host, some tiles at a time and by all cores.

    Tiles come in batches of equally many pieces, padded with zeros, so that the same code serves all stages.
    """
    length = tile.piece_chunks(cols)
    piece = length * tile.rows * tile.cols
    count = max(1, _AT_ONCE // tiles[0].size)
    pieces = max(_AT_ONCE, tiles[0].size) // piece
    found = np.empty((len(tiles), tiles[0].size // piece * tile.part_words(length * tile.cols)), np.uint16)

    def store(first: int) -> int:
        batch, run = np.zeros((pieces, length, tile.rows, tile.cols), np.uint16), tiles[first : first + count]
        batch.reshape(-1)[: run.size].reshape(run.shape)[...] = run
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            words, spoiled = _compress(tile, batch, length * tile.cols)
        stored = found[first : first + count]
        stored[...] = np.asarray(words).reshape(-1)[: stored.size].reshape(stored.shape)
        return int(spoiled)

    with ThreadPoolExecutor(settings.cores()) as threads:
        spoiled = sum(threads.map(store, range(0, len(tiles), count)))
    return found, spoiled


_compress = jax.jit(compress, static_argnums=(0, 2))


def finish(
    plan: Plan,
    tapes: _HostTapes | DeviceTapes,
    devices: Sequence[jax.Device],
    mesh: Mesh | None,
    embed: np.ndarray | jax.Array,
    vectors: dict[str, np.ndarray],
    dtype: np.dtype,
) -> Tapes:
    """Hands complete tapes to JAX; on CPU it takes them as they are, without a copy.

    Args:
        plan: The plan.
        tapes: Per JAX device.
        devices: Those devices.
        mesh: As for :func:`pack`.
        embed: [vocab, hidden], as it is stored.
        vectors: As for :func:`jax_mono.tape.pack_constants`.
        dtype: Of the weights.

    Raises:
        IncompressibleError: The plan's tapes are compressed, and these weights cannot be.
    """
    spoiled = int(np.sum(jax.device_get(tapes.spoiled)))
    if spoiled:
        raise IncompressibleError(
            f"{spoiled} pieces of the weights cannot be compressed without loss; decode them with compress=False"
        )
    constants = np.stack([pack_constants(plan, device, vectors) for device in range(plan.num_devices)])
    if mesh is None:
        parts = (tapes.layers[0], tapes.head[0], constants, embed)
        return Tapes(*(jax.device_put(part, devices[0], may_alias=True) for part in parts), dtype=dtype)
    cut, whole = NamedSharding(mesh, P(AXIS)), NamedSharding(mesh, P())

    def join(parts: Sequence[np.ndarray | jax.Array]) -> jax.Array:
        placed = [jax.device_put(part, device, may_alias=True) for part, device in zip(parts, devices, strict=True)]
        return jax.make_array_from_single_device_arrays((plan.num_devices, *parts[0].shape[1:]), cut, placed)

    return Tapes(
        layers=join(tapes.layers),
        head=join(tapes.head),
        constants=jax.device_put(constants, cut),
        embed=jax.device_put(embed, whole),
        dtype=dtype,
    )


def _allocate(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeroed memory on page boundaries, in huge pages where the system grants them.

    Weights are read once per token from end to end; with 4 KiB pages address translation costs bandwidth.
    """
    # Private: shared memory, which is Python's default, gets no huge pages.
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # advice; kernels without huge pages refuse it
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype).reshape(shape)


def home() -> jax.Device:
    """The device on which JAX puts arrays: its first one, or that of ``jax.default_device``."""
    chosen = jax.config.jax_default_device
    if isinstance(chosen, jax.Device):
        return chosen
    return jax.local_devices(backend=chosen)[0]  # the name of a platform, or None for the usual one


def mesh_devices(mesh: Mesh, shared_by: int) -> list[jax.Device]:
    """The devices of a 1-D mesh in order, each for as many of a plan's devices.

    Args:
        mesh: The mesh.
        shared_by: Devices of the plan.

    Raises:
        ConfigError: The mesh has another shape or axis name.
    """
    if mesh.axis_names != (AXIS,) or shared_by % mesh.size:
        raise ConfigError(
            f"the mesh has axes {dict(mesh.shape)}, the plan needs one axis {AXIS!r} of {shared_by} devices, or of a "
            "number that divides that"
        )
    return list(mesh.devices)
