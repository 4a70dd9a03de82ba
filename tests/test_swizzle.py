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
from jax_mono.granules import head_swizzle, layers_swizzle
from jax_mono.models.source import ArraySource
from jax_mono.packing import pack
from jax_mono.plan import GPU, Plan, make_plan
from jax_mono.prefill import AXIS
from jax_mono.random_tapes import random_tapes
from jax_mono.swizzle import _move, swizzled
from jax_mono.tape import Tapes
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


def tables(plan: Plan, seed: int = 0) -> list[np.ndarray]:
    """Swizzles drawn at random, [D, regions] of layers and head."""
    draw = np.random.default_rng(seed)
    return [draw.integers(0, len(plan.placement.pattern), (plan.num_devices, count)) for count in plan.tape_regions]


def exchanged(plan: Plan, tapes: np.ndarray, table: np.ndarray) -> np.ndarray:
    """One granule after the other, as the module says it."""
    placement = plan.placement
    period = len(placement.pattern)
    granules = np.array(tapes).reshape(tapes.shape[0], -1, placement.granule_words)
    found = np.empty_like(granules)
    for device, row in enumerate(granules):
        for index, granule in enumerate(row):
            region = index // (period * placement.region_periods)
            at = index // period * period + (index % period ^ table[device, region])
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
    assert not np.asarray(layers_swizzle(plan, tapes.constants)).any(), "packing lays tapes without a swizzle"
    flat = {name: np.array(getattr(tapes, name)) for name in ("layers", "head", "constants")}
    for seed in range(2):  # the second time from one swizzle to another
        wanted = tables(plan, seed)
        tapes = swizzled(plan, tapes, *wanted)
        for name, table in zip(("layers", "head"), wanted, strict=True):
            np.testing.assert_array_equal(np.asarray(getattr(tapes, name)), exchanged(plan, flat[name], table))
        np.testing.assert_array_equal(np.asarray(layers_swizzle(plan, tapes.constants)), wanted[0])
        np.testing.assert_array_equal(np.asarray(head_swizzle(plan, tapes.constants)), wanted[1])
        assert_unpacks_to(plan, tapes, params)
    back = swizzled(plan, tapes, *(np.zeros_like(table) for table in wanted))
    for name, array in flat.items():
        np.testing.assert_array_equal(np.asarray(getattr(back, name)), array)


def test_a_table_that_nobody_reads_is_noticed() -> None:
    plan = plan_of(sides=4)
    params = any_bits(plan.config, jnp.bfloat16)
    tapes = swizzled(plan, pack(plan, ArraySource(plan.config, params), dtype=jnp.bfloat16), *tables(plan))
    ignored = dataclasses.replace(tapes, constants=tapes.constants.at[:, -sum(plan.tape_regions) :].set(0))
    with pytest.raises(AssertionError):
        assert_unpacks_to(plan, ignored, params)


def test_each_device_of_a_mesh_moves_its_own() -> None:
    plan = plan_of(sides=4)
    mesh = Mesh(np.array(jax.devices()[:2]), (AXIS,))
    wanted = tables(plan)
    tapes = random_tapes(plan, mesh=mesh)
    flat = np.array(tapes.layers)
    found = swizzled(plan, tapes, *wanted, mesh=mesh)
    assert found.layers.sharding == found.constants.sharding == random_tapes(plan, mesh=mesh).layers.sharding
    np.testing.assert_array_equal(np.asarray(found.layers), exchanged(plan, flat, wanted[0]))
    np.testing.assert_array_equal(np.asarray(layers_swizzle(plan, found.constants)), wanted[0])


def test_there_need_not_be_memory_for_a_copy() -> None:
    plan = plan_of(sides=4)
    arrays = [jax.ShapeDtypeStruct((2, 8, 2, plan.layer_words), jnp.uint16)]
    arrays += [jax.ShapeDtypeStruct((2, 8, plan.head_words), jnp.uint16)]
    constants = random_tapes(plan).constants
    moves = _move.lower(*arrays, constants, *tables(plan), plan=plan, mesh=None).compile().memory_analysis()
    size = sum(array.size * array.dtype.itemsize for array in arrays)
    assert moves.alias_size_in_bytes >= size, "it writes where it reads"
    assert moves.temp_size_in_bytes < 8 * REGION < size


def test_tables_that_do_not_fit() -> None:
    plan = plan_of(sides=4)
    tapes, (layers, head) = random_tapes(plan), tables(plan)
    with pytest.raises(ConfigError, match=r"has shape \(1, \d+\), the plan needs \(2, \d+\)"):
        swizzled(plan, tapes, layers[:1], head)
    for wrong in (4, -1):
        with pytest.raises(ConfigError, match="numbers of granules of a period, 0 to 3, not "):
            swizzled(plan, tapes, layers, np.full_like(head, wrong))


def test_plans_without_regions_have_no_swizzle() -> None:
    plain = make_plan(tiny("llama", num_layers=1), blocks=8, target=GPU, topology=dies(3, 3), pattern=(0, 1, 2))
    flat = make_plan(tiny("llama", num_layers=1), blocks=8, target=GPU)
    for plan in (plain, flat):
        tapes: Tapes = random_tapes(plan)
        assert plan.tape_regions == (0, 0) and layers_swizzle(plan, tapes.constants) is None
        nothing = np.zeros((1, 0))
        assert swizzled(plan, tapes, nothing, nothing) is tapes
        with pytest.raises(ConfigError, match=r"has shape \(1, 1\), the plan needs \(1, 0\)"):
            swizzled(plan, tapes, np.ones((1, 1)), nothing)
