"""Random parameters and an empty cache of the reference model, made on the devices that share it.

Matrices are cut as in tensor parallelism: Laneformers by lanes, dense models by the outputs of the first and the inputs
of the second product of a module, the LM head by its rows. What does not divide evenly is on every device. XLA
(GSPMD) finds the exchanges itself.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jax_mono.models.source import Params, tensor_shapes, unflatten
from jax_mono.models.transformer import KVCache
from jax_mono.noise import noise
from peers.work import Missing, Work

AXIS = "model"


def sharding(work: Work, shape: tuple[int, ...], axis: int | None) -> Sharding:
    found = jax.devices()
    if len(found) < work.devices:
        raise Missing(f"{work.devices} devices are asked for, JAX has {len(found)}")
    if work.devices == 1:
        return SingleDeviceSharding(found[0])
    mesh = Mesh(np.array(found[: work.devices]), (AXIS,))
    even = axis is not None and shape[axis] % work.devices == 0
    return NamedSharding(mesh, P(*[None] * axis, AXIS) if axis is not None and even else P())


def cut_axis(work: Work, path: str) -> int | None:
    """Along which axis a tensor is cut."""
    name = path.rpartition(".")[2]
    if name == "lm_head":
        return 0
    if name not in ("wq", "wk", "wv", "bq", "bk", "bv", "w1", "w3", "wo", "w2"):
        return None
    if work.config.num_lanes > 1:
        return 0
    return 2 if name in ("wo", "w2") else 1


def make_params(work: Work) -> Params:
    arrays = {}
    for number, (path, shape) in enumerate(tensor_shapes(work.config).items()):
        where = sharding(work, shape, cut_axis(work, path))
        arrays[path] = _draw(path.rpartition(".")[2], shape, work.dtype, where)(np.uint32(number))
    return unflatten(arrays)


def make_cache(work: Work) -> KVCache:
    cache = jax.eval_shape(lambda: KVCache.zeros(work.config, work.context, work.dtype))
    where = sharding(work, cache.k.shape, 1)
    return jax.jit(lambda: KVCache.zeros(work.config, work.context, work.dtype), out_shardings=where)()


@functools.cache
def _draw(name: str, shape: tuple[int, ...], dtype: str, where: Sharding):
    """One compiled function for all layers."""

    def draw(seed: jax.Array) -> jax.Array:
        if "norm" in name or name.startswith("b"):
            return jnp.full(shape, 1.0 if "norm" in name else 0.0, dtype)
        fan_in = shape[-1] * (shape[0] if name in ("wo", "w2") else 1)
        return (noise(shape, seed) * fan_in**-0.5).astype(dtype)

    return jax.jit(draw, out_shardings=where)
