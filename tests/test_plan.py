"""A plan gives everything away exactly once, and evenly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from plans import dies, plans
from tiny import tiny

from jax_mono import plan as plan_module
from jax_mono.config import ConfigError, ModelConfig
from jax_mono.models.presets import preset
from jax_mono.plan import CPU, GPU, LAYER_STAGES, MAX_DEVICES, STAGES, Plan, TileFormat, make_plan
from jax_mono.spans import Span


def assert_partition(spans: list[Span], total: int) -> None:
    """The spans follow each other without gap or overlap from 0 to ``total``."""
    position = 0
    for span in spans:
        assert span.first == position and span.count >= 0
        position = span.stop
    assert position == total


@settings(max_examples=200)
@given(plans())
def test_devices_share_heads_neurons_and_vocabulary(plan: Plan) -> None:
    config = plan.config
    assert len(plan.devices) == plan.num_devices
    assert_partition([share.kv_heads for share in plan.devices], config.num_kv_heads)
    assert_partition([share.neurons for share in plan.devices], config.intermediate_size)
    assert_partition([share.vocab for share in plan.devices], config.vocab_size)
    assert all(share.neurons.count and share.vocab.count for share in plan.devices)
    if config.lanes is not None:
        assert_partition([share.lanes for share in plan.devices], config.num_lanes)
    else:
        assert {share.lanes for share in plan.devices} == {Span(0, 1)}


@settings(max_examples=200)
@given(plans())
def test_blocks_share_every_stage(plan: Plan) -> None:
    for share in plan.devices:
        for stage in share.stages.values():
            assert len(stage.shares) == len(stage.offsets) == plan.num_blocks
            in_order = stage.name != "qkv" or len(plan.placement.roles) == 1
            runs = stage.shares if in_order else sorted(stage.shares, key=lambda run: (run.first, run.stop))
            assert_partition([run for run in runs if run.count], stage.tiles)
        assert_partition(list(share.attention), share.kv_heads.count * plan.kv_splits)


@settings(max_examples=200)
@given(plans())
def test_every_block_owns_hidden_rows_and_the_same_ones_everywhere(plan: Plan) -> None:
    assert_partition(list(plan.hidden), plan.tile.row_tiles(plan.config.hidden_size))
    assert all(span.count >= 1 for span in plan.hidden)
    for share in plan.devices:
        assert share.stages["o"].shares == share.stages["down"].shares == plan.hidden


@settings(max_examples=200)
@given(plans())
def test_stages_follow_each_other_on_the_tape(plan: Plan) -> None:
    for share in plan.devices:
        for block in range(plan.num_blocks):
            position = 0
            for name in STAGES:
                stage = share.stages[name]
                position = 0 if name == "head" else position
                assert stage.offsets[block] == position
                position += stage.shares[block].count * stage.tile_words
                limit = plan.head_words if name == "head" else plan.layer_words
                assert position <= limit


def coarsest(plan: Plan, device: int) -> int:
    """Weights of the largest step in which a block's share can grow over a whole token.

    That is one hidden row tile (its o and down tile together), one qkv tile or one up tile in every layer, or one tile
    of the head.
    """
    words = {name: plan.devices[device].stages[name].tile_words for name in STAGES}
    layer = max(words["o"] + words["down"], words["qkv"], words["up"])
    return max(plan.config.num_layers * layer, words["head"])


def loads(plan: Plan, device: int) -> np.ndarray:
    """Weights per block and token."""
    return np.array([plan.block_words(device, block) for block in range(plan.num_blocks)])


@settings(max_examples=300)
@given(plans())
def test_blocks_differ_by_one_step_at_most(plan: Plan) -> None:
    """Hidden rows are dealt out evenly, everything after goes to the block that has least.

    Either way two blocks differ by one step of what was dealt out last or before, whichever is larger. A share of 34
    steps is therefore within 3 % of the average, whatever the model; a share of a few steps cannot be.
    """
    for device, share in enumerate(plan.devices):
        load, step = loads(plan, device), coarsest(plan, device)
        if len(plan.placement.roles) > 1:  # rows of a head stay with the head, whoever carries least
            qkv = share.stages["qkv"]
            step += plan.config.num_layers * qkv.tile_words * max(run.count for run in qkv.shares)
        assert load.max() - load.min() <= step


@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen2.5-coder-0.5b", "qwen3-0.6b", "smollm2-135m", "laneformer-2b"])
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_with_40_tiles_of_a_layer_no_block_reads_3_percent_more_than_the_average(name: str, devices: int) -> None:
    config = preset(name)
    for blocks in (1, 2, 3, 7, 16, 33, 64):
        if blocks > config.hidden_size // 8:
            continue
        plan = make_plan(config, devices=devices, blocks=blocks)
        for device, share in enumerate(plan.devices):
            if sum(share.stages[stage].tiles for stage in LAYER_STAGES) >= 40 * blocks:
                load = loads(plan, device)
                assert load.max() <= 1.03 * load.mean(), (blocks, device)


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("blocks", [2, 132, 304])
def test_laneformer_2b_on_real_machines(devices: int, blocks: int) -> None:
    """The busiest block sets the pace. 304 blocks on 4 or 8 devices own 6 or 4 tiles of a layer each: 6 % is a tile."""
    plan = make_plan(preset("laneformer-2b"), devices=devices, blocks=blocks)
    load = np.concatenate([loads(plan, device) for device in range(devices)])
    bound = 1.06 if blocks == 304 and devices >= 4 else 1.03
    assert load.max() <= bound * load.mean()


def test_dense_devices_weigh_the_same_in_spite_of_uneven_heads() -> None:
    """3 KV heads on 2 devices: whoever has fewer heads gets more neurons."""
    plan = make_plan(preset("smollm2-135m"), devices=2)
    assert [share.kv_heads.count for share in plan.devices] == [2, 1]
    load = np.array([loads(plan, device).sum() for device in range(2)])
    assert load.max() <= 1.01 * load.mean()


@settings(max_examples=50)
@given(plans())
def test_equal_arguments_give_equal_plans(plan: Plan) -> None:
    plan_module._make_plan.cache_clear()
    shape = {"devices": plan.num_devices, "blocks": plan.num_blocks, "kv_splits": plan.kv_splits}
    roles, sides = plan.placement.roles, plan.placement.num_sides
    topology = dies(len(roles), sides) if len(roles) > 1 else None
    again = make_plan(plan.config.replace(), target=plan.target, topology=topology, **shape)
    assert again == plan and hash(again) == hash(plan) and again is not plan
    other = make_plan(plan.config, target=CPU if plan.target is GPU else GPU, **shape)
    assert other != plan and hash(other) != hash(plan)
    if topology is None:
        assert other.devices == plan.devices, "targets differ in hand-offs, not in who owns what"


def test_kv_splits_leave_no_block_two_splits() -> None:
    plan = make_plan(tiny("llama", num_kv_heads=2), blocks=5)
    assert plan.kv_splits == 2
    assert sorted(span.count for span in plan.devices[0].attention) == [0, 1, 1, 1, 1]
    assert make_plan(tiny("llama", num_kv_heads=4), blocks=3).kv_splits == 1


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        (tiny("llama"), {"devices": 0}, "devices is 0, must be between 1 and 16"),
        (tiny("llama"), {"devices": MAX_DEVICES + 1}, "devices is 17"),
        (tiny("llama"), {"blocks": 0}, "blocks is 0, must be at least 1"),
        (tiny("llama"), {"blocks": 9}, "9 blocks are too many for hidden_size 64.*at most 8"),
        (tiny("llama", vocab_size=24), {"devices": 4}, "4 devices are too many for this model, at most 3"),
        (tiny("llama"), {"kv_splits": 0}, "kv_splits is 0, must be at least 1"),
        (tiny("laneformer"), {"devices": 3}, r"8 lanes do not divide over 3 devices; use one of \[1, 2, 4, 8\]"),
    ],
)
def test_what_cannot_be_planned(config: ModelConfig, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan(config, **arguments)


@pytest.mark.parametrize("rows", [0, 7, -8])
def test_tile_rows_pair_up(rows: int) -> None:
    with pytest.raises(ConfigError, match=f"tile rows must be even and positive, not {rows}"):
        TileFormat(rows=rows)


def test_tile_needs_columns() -> None:
    with pytest.raises(ConfigError, match="tile cols must be positive, not 0"):
        TileFormat(cols=0)
