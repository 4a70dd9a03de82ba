"""Swizzled tapes: the same granules, exchanged within their periods, and read as if they were not."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from plans import dies
from test_tape import any_bits, assert_unpacks_to
from tiny import tiny

from jax_mono.config import ConfigError
from jax_mono.granules import Swizzle, head_swizzle, layers_swizzle
from jax_mono.models.source import ArraySource
from jax_mono.packing import pack
from jax_mono.plan import GPU, Plan, make_plan
from jax_mono.prefill import AXIS
from jax_mono.random_tapes import random_tapes
from jax_mono.record import constants_layout
from jax_mono.swizzle import _move, swizzled
from jax_mono.topology import AddressHash, Figure

REGION = 1 << 12


def plan_of(
    family: str = "llama", *, ways: int = 4, sides: int = 2, granule: int = 512, devices: int = 2, blocks: int = 8
) -> Plan:
    """A plan whose tapes are exchanged from one region of 4 KiB to the next."""
    masks = tuple(granule << bit | REGION << bit | REGION << 4 + bit for bit in range(ways.bit_length() - 1))
    topology = dataclasses.replace(
        dies(4, sides),
        granule_bytes=Figure(granule, "reported"),
        interleave_ways=Figure(ways, "reported"),
        address_hash=AddressHash(masks, "reported"),
    )
    plan = make_plan(tiny(family, num_layers=2), devices=devices, blocks=blocks, target=GPU, topology=topology)
    assert plan.placement.region_periods == REGION // granule // ways and min(plan.tape_regions) > 1
    return plan


def drawn(plan: Plan, seed: int = 0) -> list[Swizzle]:
    """Swizzles of layers and head at random."""
    draw, devices = np.random.default_rng(seed), plan.num_devices
    return [
        Swizzle(
            draw.integers(0, plan.placement.region_periods, devices),
            draw.integers(0, len(plan.placement.pattern), (devices, count)),
        )
        for count in plan.tape_regions
    ]


def assert_same(found: Swizzle | None, expected: Swizzle) -> None:
    assert found is not None
    np.testing.assert_array_equal(np.asarray(found.begun), expected.begun)
    np.testing.assert_array_equal(np.asarray(found.exchanges), expected.exchanges)


def exchanged(plan: Plan, tapes: np.ndarray, swizzle: Swizzle) -> np.ndarray:
    """One granule after the other, as the module says it."""
    placement = plan.placement
    period = len(placement.pattern)
    granules = np.array(tapes).reshape(tapes.shape[0], -1, placement.granule_words)
    found = np.empty_like(granules)
    for device, row in enumerate(granules):
        for index, granule in enumerate(row):
            region = (index // period + swizzle.begun[device]) // placement.region_periods
            at = index // period * period + (index % period ^ swizzle.exchanges[device, region])
            found[device, at] = granule
    return found.reshape(tapes.shape)


PLANS = {
    "four sides": {"sides": 4},
    "two of each side": {"family": "qwen2", "granule": 1024},
    "two sides": {"family": "laneformer", "ways": 2, "granule": 2048},
    "one device": {"sides": 4, "devices": 1},
}


@pytest.mark.parametrize("shape", PLANS.values(), ids=PLANS)
def test_granules_move_and_weights_stay(shape: dict) -> None:
    plan = plan_of(**shape)
    params = any_bits(plan.config, jnp.bfloat16)
    tapes = pack(plan, ArraySource(plan.config, params), dtype=jnp.bfloat16)
    none = [jax.tree.map(np.zeros_like, swizzle) for swizzle in drawn(plan)]
    assert_same(layers_swizzle(plan, tapes.constants), none[0])
    flat = {name: np.array(getattr(tapes, name)) for name in ("layers", "head", "constants")}
    for seed in range(2):  # the second time from one swizzle to another
        wanted = drawn(plan, seed)
        tapes = swizzled(plan, tapes, *wanted)
        for name, swizzle in zip(("layers", "head"), wanted, strict=True):
            np.testing.assert_array_equal(np.asarray(getattr(tapes, name)), exchanged(plan, flat[name], swizzle))
        assert_same(layers_swizzle(plan, tapes.constants), wanted[0])
        assert_same(head_swizzle(plan, tapes.constants), wanted[1])
        assert_unpacks_to(plan, tapes, params)
    back = swizzled(plan, tapes, *none)
    for name, array in flat.items():
        np.testing.assert_array_equal(np.asarray(getattr(back, name)), array)


def test_a_table_that_nobody_reads_is_noticed() -> None:
    plan = plan_of(sides=4)
    params = any_bits(plan.config, jnp.bfloat16)
    tapes = swizzled(plan, pack(plan, ArraySource(plan.config, params), dtype=jnp.bfloat16), *drawn(plan))
    first = constants_layout(plan)["layers_swizzle"]
    ignored = dataclasses.replace(tapes, constants=tapes.constants.at[:, first:].set(0))
    with pytest.raises(AssertionError):
        assert_unpacks_to(plan, ignored, params)


def test_each_device_of_a_mesh_moves_its_own() -> None:
    plan = plan_of(sides=4)
    mesh = Mesh(np.array(jax.devices()[:2]), (AXIS,))
    wanted = drawn(plan)
    tapes = random_tapes(plan, mesh=mesh)
    flat = np.array(tapes.layers)
    found = swizzled(plan, tapes, *wanted, mesh=mesh)
    assert found.layers.sharding == found.constants.sharding == random_tapes(plan, mesh=mesh).layers.sharding
    np.testing.assert_array_equal(np.asarray(found.layers), exchanged(plan, flat, wanted[0]))
    assert_same(layers_swizzle(plan, found.constants), wanted[0])


def test_there_need_not_be_memory_for_a_copy() -> None:
    plan = plan_of(sides=4)
    arrays = [jax.ShapeDtypeStruct((2, 8, 2, plan.layer_words), jnp.uint16)]
    arrays += [jax.ShapeDtypeStruct((2, 8, plan.head_words), jnp.uint16)]
    constants = random_tapes(plan).constants
    moves = _move.lower(*arrays, constants, *drawn(plan), plan=plan, mesh=None).compile().memory_analysis()
    size = sum(array.size * array.dtype.itemsize for array in arrays)
    assert moves.alias_size_in_bytes >= size, "it writes where it reads"
    assert moves.temp_size_in_bytes < 8 * REGION < size


def test_swizzles_that_do_not_fit() -> None:
    plan = plan_of(sides=4)
    tapes, (layers, head) = random_tapes(plan), drawn(plan)
    with pytest.raises(ConfigError, match=r"has shapes \(2,\) and \(1, \d+\), the plan needs \(2,\) and \(2, \d+\)"):
        swizzled(plan, tapes, Swizzle(layers.begun, layers.exchanges[:1]), head)
    for wrong in (4, -1):
        with pytest.raises(ConfigError, match="granules of a period are exchanged by 0 to 3"):
            swizzled(plan, tapes, layers, Swizzle(head.begun, np.full_like(head.exchanges, wrong)))
    for wrong in (plan.placement.region_periods, -1):
        with pytest.raises(ConfigError, match="an array begins 0 to 1 periods behind a region's start"):
            swizzled(plan, tapes, Swizzle(np.full(2, wrong), layers.exchanges), head)


def test_plans_without_regions_have_no_swizzle() -> None:
    plain = make_plan(tiny("llama", num_layers=1), blocks=8, target=GPU, topology=dies(3, 3), pattern=(0, 1, 2))
    flat = make_plan(tiny("llama", num_layers=1), blocks=8, target=GPU)
    for plan in (plain, flat):
        tapes, nothing = random_tapes(plan), Swizzle(np.zeros(1), np.zeros((1, 0)))
        assert plan.tape_regions == (0, 0) and layers_swizzle(plan, tapes.constants) is None
        with pytest.raises(ConfigError, match="knows no regions of memory"):
            swizzled(plan, tapes, nothing, nothing)
