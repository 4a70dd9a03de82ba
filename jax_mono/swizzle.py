"""Swizzles: the granules of a period exchanged, region by region of memory, as the device exchanges its sides.

A hash of physical addresses may exchange the sides of a device from one region of memory to the next
(:class:`jax_mono.topology.AddressHash`). Tapes follow: what would be granule i of a period lies in granule i ^ s, where
s is the swizzle of the region. It depends on where arrays happen to lie, so it is data, not plan: it travels with the
tapes' constants, a number per region of each array of tapes, counted from the array's start. Zeros are the layout that
packing makes. Where the numbers come from: :mod:`jax_mono.address_hash`, or measured times of pages.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from jax_mono.config import ConfigError
from jax_mono.granules import head_swizzle, layers_swizzle
from jax_mono.plan import Plan
from jax_mono.prefill import AXIS
from jax_mono.record import constants_layout
from jax_mono.tape import Tapes

Array = jax.Array


def swizzled(plan: Plan, tapes: Tapes, layers: ArrayLike, head: ArrayLike, *, mesh: Mesh | None = None) -> Tapes:
    """Moves the granules of tapes, in place, from the swizzle that they have to another one.

    Args:
        plan: The plan.
        tapes: The tapes; those of layers and head are donated.
        layers: int [D, regions], the swizzle that the layer tapes get.
        head: int [D, regions], that of the LM head's tapes.
        mesh: The mesh that the tapes are sharded over, if they are.

    Returns:
        The tapes, with constants that say so.

    Raises:
        ConfigError: The plan's tapes cannot be swizzled like this.
    """
    wanted = [np.asarray(table, np.int32) for table in (layers, head)]
    for table, regions in zip(wanted, plan.tape_regions, strict=True):
        if table.shape != (plan.num_devices, regions):
            raise ConfigError(f"a swizzle has shape {table.shape}, the plan needs {(plan.num_devices, regions)}")
        if table.size and not 0 <= table.min() <= table.max() < len(plan.placement.pattern):
            raise ConfigError(
                f"a swizzle has numbers of granules of a period, 0 to {len(plan.placement.pattern) - 1}, not "
                f"{table.min()} to {table.max()}"
            )
    if not plan.placement.region_periods:
        return tapes
    moved = _move(tapes.layers, tapes.head, tapes.constants, *wanted, plan=plan, mesh=mesh)
    return dataclasses.replace(tapes, layers=moved[0], head=moved[1], constants=moved[2])


@functools.partial(jax.jit, static_argnames=("plan", "mesh"), donate_argnums=(0, 1))
def _move(
    layers: Array, head: Array, constants: Array, layers_to: Array, head_to: Array, *, plan: Plan, mesh: Mesh | None
) -> tuple[Array, Array, Array]:
    first = constants_layout(plan)["layers_swizzle"]

    def on_device(
        layers: Array, head: Array, constants: Array, layers_to: Array, head_to: Array
    ) -> tuple[Array, Array, Array]:
        return (
            _exchanged(plan, layers, layers_swizzle(plan, constants) ^ layers_to),
            _exchanged(plan, head, head_swizzle(plan, constants) ^ head_to),
            constants.at[:, first:].set(jnp.concatenate([layers_to, head_to], axis=1).astype(constants.dtype)),
        )

    if mesh is not None:
        on_device = jax.shard_map(on_device, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS), check_vma=False)
    return on_device(layers, head, constants, layers_to, head_to)


def _exchanged(plan: Plan, tapes: Array, change: Array) -> Array:
    """Exchanges granules of [D, R, ...] by [D, regions], a region at a time: there need not be memory for a copy."""
    placement = plan.placement
    period, region = len(placement.pattern), placement.region_periods
    parts = tapes.reshape(tapes.shape[0], -1, period, placement.granule_words)

    def exchange(index: ArrayLike, parts: Array, count: int) -> Array:
        part = jax.lax.dynamic_slice_in_dim(parts, index * region, count, axis=1)
        order = jnp.arange(period) ^ change[:, index, None]
        part = jnp.take_along_axis(part, order[:, None, :, None], axis=2)
        return jax.lax.dynamic_update_slice_in_dim(parts, part, index * region, axis=1)

    whole, rest = divmod(parts.shape[1], region)
    parts = jax.lax.fori_loop(0, whole, lambda index, parts: exchange(index, parts, region), parts)
    if rest:
        parts = exchange(whole, parts, rest)
    return parts.reshape(tapes.shape)
