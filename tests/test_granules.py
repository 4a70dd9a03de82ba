"""Tapes that take turns in memory: each in granules of its block's side, all of them whole."""

from __future__ import annotations

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import dies, plans
from test_tape import any_bits, assert_unpacks_to, bits
from tiny import random_params, tiny

from jax_mono.config import ConfigError
from jax_mono.draw import plan_text
from jax_mono.granules import block_tape, check_alignment
from jax_mono.models.presets import preset
from jax_mono.models.source import ArraySource
from jax_mono.packing import pack
from jax_mono.placement import MOST_IDLE, place
from jax_mono.plan import GPU, Plan, make_plan
from jax_mono.random_tapes import random_tapes
from jax_mono.topology import H200, MI300X, MI355X, Figure, Topology
from jax_mono.unpacking import unpack_matrix

CASES = [
    ("llama", 512, (0, 1)),
    ("qwen2", 1024, (1, 0, 0, 1)),
    ("laneformer", 4096, (0, 1, 1, 0, 1, 0, 0, 1)),
]


def small(topology: Topology, granule_bytes: int) -> Topology:
    return dataclasses.replace(topology, granule_bytes=Figure(granule_bytes, "reported"))


@settings(max_examples=40, deadline=None)
@given(plans())
def test_every_granule_belongs_to_one_tape_of_its_side(plan: Plan) -> None:
    placement, period = plan.placement, len(plan.placement.pattern)
    for length in plan.tape_granules:
        used = np.zeros(placement.tape_rows * length, np.int64)
        sides = np.resize(placement.pattern, used.size)
        for block in range(plan.num_blocks):
            first = placement.first_granule(block, length)
            own = first + period * np.arange(length)
            used[own] += 1
            assert not placement.interleaved or (sides[own] == placement.side_of(block)).all()
        assert used.max() == 1 and used.sum() == plan.num_blocks * length
    assert placement.tape_rows <= (1 + MOST_IDLE) * plan.num_blocks
    assert plan.layer_words % placement.granule_words == plan.head_words % placement.granule_words == 0


@pytest.mark.parametrize(("family", "granule_bytes", "pattern"), CASES)
def test_interleaved_tapes_hold_what_tapes_in_one_piece_hold(
    family: str, granule_bytes: int, pattern: tuple[int, ...]
) -> None:
    config, topology = tiny(family, num_layers=2), small(dies(4, 2), granule_bytes)
    params = any_bits(config, jnp.bfloat16)
    plan, flat = (
        make_plan(config, devices=2, blocks=8, target=GPU, topology=topology, pattern=chosen)
        for chosen in (pattern, (0,))
    )
    assert plan.placement.interleaved and not flat.placement.interleaved
    assert plan.devices[0].stages == flat.devices[0].stages, "memory does not matter to who owns what"
    tapes, whole = (pack(one, ArraySource(config, params), dtype=jnp.bfloat16) for one in (plan, flat))
    for device in range(2):
        for block in range(8):
            for layer in range(2):
                own = block_tape(plan, np.asarray(tapes.layers[device]), block, layer).reshape(-1)
                np.testing.assert_array_equal(own[: flat.layer_words], np.asarray(whole.layers)[device, block, layer])
                assert not own[flat.layer_words :].any()
            own = block_tape(plan, np.asarray(tapes.head[device]), block, None).reshape(-1)
            np.testing.assert_array_equal(own[: flat.head_words], np.asarray(whole.head)[device, block])
    assert_unpacks_to(plan, tapes, params)


def test_random_tapes_lie_where_packed_ones_do() -> None:
    config, topology = tiny("laneformer", num_layers=2), small(dies(4, 2), 1024)
    plan, flat = (
        make_plan(config, devices=2, blocks=8, target=GPU, topology=topology, pattern=chosen)
        for chosen in ((0, 1, 1, 0), (0,))
    )
    tapes, whole = random_tapes(plan, seed=5), random_tapes(flat, seed=5)
    packed = pack(plan, ArraySource(config, random_params(config, dtype=jnp.bfloat16)), dtype=jnp.bfloat16)
    for name in ("layers", "head"):
        made, placed = np.asarray(getattr(tapes, name)), np.asarray(getattr(packed, name))
        assert made.shape == placed.shape and made.dtype == placed.dtype
        assert not made[placed == 0].any(), "where packing pads, nothing is drawn"
        assert made.any() and getattr(whole, name).dtype == made.dtype


def test_a_traced_layer() -> None:
    config = tiny("llama", num_layers=3)
    params = random_params(config, dtype=jnp.bfloat16)
    plan = make_plan(config, blocks=8, target=GPU, topology=small(dies(4, 2), 512))
    tapes = pack(plan, ArraySource(config, params), dtype=jnp.bfloat16)
    unpack = jax.jit(lambda tape, layer: unpack_matrix(plan, plan.devices[0], "w2", tape, layer))
    for layer in range(3):
        expected = params["layers"][layer]["feed_forward"]["w2"]
        np.testing.assert_array_equal(bits(unpack(tapes.layers[0], layer)), bits(np.asarray(expected)))


@settings(deadline=None)
@given(st.integers(1, 304), st.lists(st.integers(0, 3), min_size=4, max_size=64))
def test_any_pattern_that_fits(blocks: int, pattern: list[int]) -> None:
    try:
        placement = place(blocks, MI300X, pattern)
    except ConfigError:
        return
    assert placement.tape_rows <= (1 + MOST_IDLE) * blocks
    rows = {placement.first_granule(block, 1) for block in range(blocks)}
    assert len(rows) == blocks and max(rows) < placement.tape_rows


def test_patterns_of_known_devices() -> None:
    assert place(304, MI300X).pattern == (0, 1, 2, 3) and place(304, MI300X).tape_rows == 304
    assert place(256, MI355X).pattern == (0, 0, 1, 1)
    assert place(132, H200).pattern == (0,)
    assert place(304, MI300X, (3, 2, 1, 0) * 4).pattern == (3, 2, 1, 0), "the period, however often it is given"
    assert not place(5, MI300X).interleaved, "too much memory would lie idle"
    assert place(303, MI300X).tape_rows == 304


@pytest.mark.parametrize(
    ("topology", "pattern", "message"),
    [
        (None, (0, 1), "a pattern of memory granules needs the topology"),
        (MI300X, (0, 1, 2), r"\(0, 1, 2\) does not give granules to each side of mi300x, 0 to 3"),
        (MI300X, (0, 1, 2, 3, 4), "does not give granules to each side"),
        (MI300X, (0, *(1,) * 40, *(2,) * 41, *(3,) * 42), "of 124 granules the tapes of 304 blocks need the memory of"),
        (small(MI300X, 3000), (0, 1, 2, 3), "granules of 3000 bytes cannot be dealt"),
        (small(MI300X, 256), (0, 1, 2, 3), "a power of two, of at least 512"),
    ],
)
def test_patterns_that_do_not_fit(topology: Topology | None, pattern: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan(preset("laneformer-2b"), blocks=304, target=GPU, topology=topology, pattern=pattern)


def test_tapes_that_start_within_a_period_are_noticed() -> None:
    config = tiny("llama", num_layers=1)
    topology = small(dies(4, 2), 1024)
    plan, flat = (
        make_plan(config, blocks=8, target=GPU, topology=topology, pattern=chosen) for chosen in ((0, 1), (0,))
    )
    room = np.zeros(1 << 16, np.uint8)
    start = -room.ctypes.data % 2048
    whole, beyond = (jax.device_put(room[start + skip :][:4096].view(np.uint16), may_alias=True) for skip in (0, 64))
    assert beyond.unsafe_buffer_pointer() == room.ctypes.data + start + 64
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_alignment(plan, [whole])
        check_alignment(flat, [beyond])
    with pytest.warns(UserWarning, match=r"start 64 bytes beyond a multiple of 2048.*XLA_PYTHON_CLIENT_ALLOCATOR"):
        check_alignment(plan, [whole, beyond])


def test_a_plan_counts_what_lies_idle() -> None:
    def line(**placed: object) -> str:
        text = plan_text(make_plan(preset("laneformer-2b"), devices=8, blocks=304, target=GPU, **placed))
        (found,) = (line for line in text.splitlines() if line.startswith("tapes "))
        return found

    assert line(topology=MI300X).startswith("tapes              a granule of 4.096 kB in every 4; ")
    assert line(topology=MI300X, pattern=(0,)).startswith("tapes              in one piece; ")
