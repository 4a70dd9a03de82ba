"""What attention hands over stays within a die, where a device's heads allow."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
from hypothesis import given, settings
from plans import plans

from jax_mono.cut import default_blocks
from jax_mono.draw import plan_text
from jax_mono.models.presets import preset
from jax_mono.nearness import attention_nearness
from jax_mono.placement import place
from jax_mono.plan import GPU, Plan, make_plan
from jax_mono.topology import MI300X

FRACTIONS = {  # on 1, 2, 4 and 8 devices: of what attention reads, from the own die and from the own side
    "laneformer-2b": ((1, 1), (1, 1), (1 / 2, 1), (1 / 4, 1 / 2)),
    "llama-2-7b": ((1, 1), (1, 1), (1, 1), (1 / 2, 1)),
    "qwen2.5-coder-7b": ((1 / 2, 1), (1 / 4, 1 / 2), (1 / 8, 1 / 4), (1 / 8, 1 / 4)),
    "smollm2-1.7b": ((0.97, 0.98), (1, 1), (1, 1), (1 / 2, 1)),  # on one, runs of rows do not quite fit
}


def mi300x_plan(model: str, devices: int) -> Plan:
    config = preset(model)
    blocks = default_blocks(config, 1, MI300X.units)
    return make_plan(config, devices=devices, blocks=blocks, target=GPU, topology=MI300X)


@pytest.mark.parametrize("model", FRACTIONS)
def test_heads_stay_on_as_few_dies_as_they_can(model: str) -> None:
    for devices, (die, side) in zip((1, 2, 4, 8), FRACTIONS[model], strict=True):
        near = attention_nearness(mi300x_plan(model, devices))
        assert near.die >= die - 1e-9 and near.side >= side - 1e-9, devices


def test_a_head_has_no_more_dies_than_chunks_of_positions_need() -> None:
    config = preset("laneformer-2b").replace(max_position_embeddings=60 * GPU.kv_chunk)
    plan = make_plan(config, devices=8, blocks=304, target=GPU, topology=MI300X)
    assert plan.kv_splits == 76 and mi300x_plan("laneformer-2b", 8).kv_splits == 152
    near = attention_nearness(plan)
    assert (near.die, near.side) == pytest.approx((1 / 2, 1))


def test_without_a_topology_rows_come_from_everywhere() -> None:
    """The measure is not blind: the same blocks in the same places, planned as if it did not matter."""
    config = preset("llama-2-7b")
    flat = make_plan(config, blocks=304, target=GPU)
    assert attention_nearness(dataclasses.replace(flat, placement=place(304, MI300X))).die < 0.2
    assert attention_nearness(flat).die == 1, "there is but one die"


@settings(max_examples=100)
@given(plans())
def test_every_item_has_one_block_and_homes_are_no_wider_than_they_must(plan: Plan) -> None:
    for share in plan.devices:
        runs = [run for run in share.attention if run.count]
        assert [run.first for run in runs] == [0, *(run.stop for run in runs)][: len(runs)]
        assert sum(run.count for run in runs) == share.kv_heads.count * plan.kv_splits
        dies = [span.count for span in plan.placement.roles]
        if share.kv_heads.count < len(dies) or min(dies) == 0:
            continue
        homes: dict[int, set[int]] = {}
        for block, run in enumerate(share.attention):
            for item in range(run.first, run.stop):
                homes.setdefault(item // plan.kv_splits, set()).add(plan.placement.die_of(block))
        assert all(len(home) == 1 for home in homes.values())


@settings(max_examples=100)
@given(plans())
def test_no_block_multiplies_more_rows_than_it_must(plan: Plan) -> None:
    if len(plan.placement.roles) == 1:
        return
    for share in plan.devices:
        stage = share.stages["qkv"]
        counts = Counter(run.count for run in stage.shares)
        assert max(counts) <= -(-stage.tiles // plan.num_blocks)


def test_a_plan_says_so() -> None:
    lines = plan_text(mi300x_plan("laneformer-2b", 4)).splitlines()
    (line,) = (line for line in lines if line.startswith("dies "))
    assert line == (
        "dies               8 of 38 blocks on 4 sides; attention reads 50% of its rows from its die, 100% from its side"
    )
    assert "dies " not in plan_text(make_plan(preset("laneformer-2b"), devices=8, blocks=132, target=GPU))
