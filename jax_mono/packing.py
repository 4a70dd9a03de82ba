"""Packing: a checkpoint becomes tapes, one stage of one layer at a time.

Never more than the tapes, the matrices of one stage and their tiles are in memory together.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jax_mono import native
from jax_mono.config import ConfigError
from jax_mono.models.source import OnTensor, WeightSource, weight_dtype
from jax_mono.plan import LAYER_STAGES, Plan, StageName
from jax_mono.prefill import AXIS
from jax_mono.tape import STAGE_WEIGHTS, Tapes, pack_constants, stage_tiles, store_tiles


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
        dtype: float32 or bfloat16, of the tapes and of the KV cache.
        mesh: A 1-D mesh with axis ``devices`` puts each device's tapes on its device; None puts all on the default
            device.
        on_tensor: Progress callback.

    Returns:
        The tapes.

    Raises:
        ConfigError: The plan or mesh does not fit.
        CheckpointError: A tensor cannot be read.
    """
    if source.config != plan.config:
        raise ConfigError("the plan was made for another configuration than the checkpoint's")
    target, config = weight_dtype(dtype), plan.config
    builder = _Builder(plan, target, mesh)

    def read(path: str) -> np.ndarray:
        array = source.tensor(path, target)
        if on_tensor is not None:
            on_tensor(path, array.nbytes)
        return array

    head_path = "embed" if config.tie_word_embeddings else "lm_head"
    embed = read("embed")
    vectors = {}
    for layer in range(config.num_layers):
        for name in LAYER_STAGES:
            matrices = [read(f"layers.{layer}.{path}") for path in STAGE_WEIGHTS[name]]
            builder.store(name, matrices, layer)
            del matrices
        for path in source.paths():
            if path.startswith(f"layers.{layer}.") and path.rsplit(".", 1)[1] not in _MATRICES:
                vectors[path] = read(path)
    vectors["norm"] = read("norm")
    builder.store("head", [embed if head_path == "embed" else read(head_path)], None)
    return builder.finish(embed, vectors)


_MATRICES = {path.rsplit(".", 1)[-1] for paths in STAGE_WEIGHTS.values() for path in paths}


class _Builder:
    """Tapes under construction: one array with all devices' rows, or one array per device of a mesh."""

    def __init__(self, plan: Plan, dtype: np.dtype, mesh: Mesh | None) -> None:
        self.plan, self.mesh = plan, mesh
        devices = [None] if mesh is None else mesh_devices(mesh, plan.num_devices)
        rows = plan.num_devices // len(devices)
        config = plan.config

        def empty(*shape: int) -> list[jax.Array]:
            found = []
            for device in devices:
                with jax.default_device(device):
                    found.append(jnp.zeros((rows, plan.num_blocks, *shape), dtype))
            return found

        self.layers = empty(config.num_layers, plan.layer_words)
        self.head = empty(plan.head_words)
        for array in (*self.layers, *self.head):
            if array.nbytes > 1 << 24 and next(iter(array.devices())).platform == "cpu":
                native.advise_huge_pages(array)

    def _place(self, device: int) -> tuple[int, int]:
        """Array and row of a device."""
        return (0, device) if self.mesh is None else (device, 0)

    def store(self, name: StageName, matrices: Sequence[np.ndarray], layer: int | None) -> None:
        tapes = self.head if layer is None else self.layers
        for device in range(self.plan.num_devices):
            array, row = self._place(device)
            where = next(iter(tapes[array].devices()))
            local = jax.device_put(list(matrices), where)
            at = (row,) if layer is None else (row, layer)
            tapes[array] = _store(tapes[array], local, np.asarray(at, np.int32), self.plan, device, name)
            # The matrices may be freed and the next stage read only when this one is in place.
            tapes[array].block_until_ready()

    def finish(self, embed: np.ndarray, vectors: dict[str, np.ndarray]) -> Tapes:
        constants = jnp.stack(
            [pack_constants(self.plan, device, vectors) for device in range(self.plan.num_devices)]
        )
        if self.mesh is None:
            return Tapes(self.layers[0], self.head[0], constants, jnp.asarray(embed))
        cut, whole = NamedSharding(self.mesh, P(AXIS)), NamedSharding(self.mesh, P())

        def join(parts: list[jax.Array]) -> jax.Array:
            shape = (self.plan.num_devices, *parts[0].shape[1:])
            return jax.make_array_from_single_device_arrays(shape, cut, parts)

        return Tapes(
            layers=join(self.layers),
            head=join(self.head),
            constants=jax.device_put(constants, cut),
            embed=jax.device_put(embed, whole),
        )


def mesh_devices(mesh: Mesh, expected: int) -> list[jax.Device]:
    """The devices of a 1-D mesh in order.

    Raises:
        ConfigError: The mesh has another shape or axis name.
    """
    if mesh.axis_names != (AXIS,) or mesh.devices.shape != (expected,):
        raise ConfigError(
            f"the mesh has axes {dict(mesh.shape)}, the plan needs one axis {AXIS!r} of {expected} devices"
        )
    return list(mesh.devices)


@functools.partial(jax.jit, static_argnames=("plan", "device", "name"), donate_argnums=0)
def _store(
    tape: jax.Array, matrices: list[jax.Array], at: jax.Array, plan: Plan, device: int, name: StageName
) -> jax.Array:
    tiles = stage_tiles(plan, device, name, matrices)
    return store_tiles(plan, device, name, tape, tiles, tuple(at))

