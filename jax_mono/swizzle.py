"""Swizzles: the granules of a period exchanged, region by region of memory, as the device exchanges its sides.

A hash of physical addresses may exchange the sides of a device from one region of memory to the next
(:class:`jax_mono.topology.AddressHash`). Tapes follow: what would be granule i of a period lies in granule i ^ s, where
s is the region's. They depend on where arrays happen to lie, so they are data, not plan: they travel with the tapes'
constants, a number per region that an array touches, and where in the first one it starts. Zeros are the layout that
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
from jax_mono.granules import Swizzle, head_swizzle, layers_swizzle
from jax_mono.plan import Plan
from jax_mono.prefill import AXIS
from jax_mono.record import constants_layout
from jax_mono.tape import Tapes

Array = jax.Array


def swizzled(plan: Plan, tapes: Tapes, layers: Swizzle, head: Swizzle, *, mesh: Mesh | None = None) -> Tapes:
    """Moves the granules of tapes, in place, from the swizzle that they have to another one.

    Args:
        plan: The plan, whose tapes can be swizzled.
        tapes: The tapes; those of layers and head are donated.
        layers: What the layer tapes get, [D].
        head: What the LM head's tapes get, [D].
        mesh: The mesh that the tapes are sharded over, if they are.

    Returns:
        The tapes, with constants that say so.

    Raises:
        ConfigError: The plan's tapes cannot be swizzled like this.
    """
    placement = plan.placement
    if not placement.region_periods:
        raise ConfigError("the plan's tapes have no swizzle: it knows no regions of memory that exchange granules")
    wanted = []
    for swizzle, regions in zip((layers, head), plan.tape_regions, strict=True):
        begun, exchanges = np.asarray(swizzle.begun, np.int32), np.asarray(swizzle.exchanges, np.int32)
        if begun.shape != (plan.num_devices,) or exchanges.shape != (plan.num_devices, regions):
            raise ConfigError(
                f"a swizzle has shapes {begun.shape} and {exchanges.shape}, the plan needs {(plan.num_devices,)} and "
                f"{(plan.num_devices, regions)}"
            )
        if not ((begun >= 0) & (begun < placement.region_periods)).all():
            raise ConfigError(f"an array begins 0 to {placement.region_periods - 1} periods behind a region's start")
        if not ((exchanges >= 0) & (exchanges < len(placement.pattern))).all():
            raise ConfigError(f"granules of a period are exchanged by 0 to {len(placement.pattern) - 1}")
        wanted.append(Swizzle(begun, exchanges))
    moved = _move(tapes.layers, tapes.head, tapes.constants, *wanted, plan=plan, mesh=mesh)
    return dataclasses.replace(tapes, layers=moved[0], head=moved[1], constants=moved[2])


@functools.partial(jax.jit, static_argnames=("plan", "mesh"), donate_argnums=(0, 1))
def _move(
    layers: Array, head: Array, constants: Array, layers_to: Swizzle, head_to: Swizzle, *, plan: Plan, mesh: Mesh | None
) -> tuple[Array, Array, Array]:
    first = constants_layout(plan)["layers_swizzle"]

    def on_device(
        layers: Array, head: Array, constants: Array, layers_to: Swizzle, head_to: Swizzle
    ) -> tuple[Array, Array, Array]:
        words = [layers_to.begun[:, None], layers_to.exchanges, head_to.begun[:, None], head_to.exchanges]
        return (
            _exchanged(plan, layers, layers_swizzle(plan, constants), layers_to),
            _exchanged(plan, head, head_swizzle(plan, constants), head_to),
            constants.at[:, first:].set(jnp.concatenate(words, axis=1).astype(constants.dtype)),
        )

    if mesh is not None:
        on_device = jax.shard_map(on_device, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS), check_vma=False)
    return on_device(layers, head, constants, layers_to, head_to)


def _exchanged(plan: Plan, tapes: Array, before: Swizzle | None, after: Swizzle) -> Array:
    """Exchanges granules of [D, R, ...], a region's length at a time: there need not be memory for a copy."""
    placement = plan.placement
    period, region = len(placement.pattern), placement.region_periods
    parts = tapes.reshape(tapes.shape[0], -1, period, placement.granule_words)

    def of_periods(swizzle: Swizzle, periods: Array) -> Array:
        return jax.vmap(lambda own: own.of_periods(plan, periods))(swizzle)

    def exchange(index: ArrayLike, parts: Array, count: int) -> Array:
        periods = index * region + jnp.arange(count)
        change = of_periods(before, periods) ^ of_periods(after, periods)
        order = jnp.arange(period) ^ change[:, :, None]
        part = jax.lax.dynamic_slice_in_dim(parts, index * region, count, axis=1)
        part = jnp.take_along_axis(part, order[..., None], axis=2)
        return jax.lax.dynamic_update_slice_in_dim(parts, part, index * region, axis=1)

    whole, rest = divmod(parts.shape[1], region)
    parts = jax.lax.fori_loop(0, whole, lambda index, parts: exchange(index, parts, region), parts)
    if rest:
        parts = exchange(whole, parts, rest)
    return parts.reshape(tapes.shape)
