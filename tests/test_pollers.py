"""How many blocks of a device poll one line of its exchange memory, counted from what every block reads for a token."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from plans import plans

from jax_mono.bringup.probe_steps import MOST_POLLERS
from jax_mono.cut import default_blocks
from jax_mono.flow import Flow, Receive
from jax_mono.handoffs import LINE_BYTES, exchange
from jax_mono.models.presets import preset
from jax_mono.plan import GPU, Plan, make_plan
from jax_mono.topology import MI300X, Topology


def polled_lines(plan: Plan, device: int) -> np.ndarray:
    """bool [blocks, lines]: which lines a block polls for the last tokens of a full cache, however they are chosen."""
    layout, flow = exchange(plan, device), Flow(plan, device)
    per_line = LINE_BYTES // plan.target.word_bytes
    polled = np.zeros((plan.num_blocks, -(-layout.words // per_line)), bool)
    for block in range(plan.num_blocks):
        for kind in ("sampled", "filtered"):
            for step in flow.steps(block, plan.config.max_position_embeddings - 1, kind):
                if isinstance(step, Receive):
                    channel = layout.channels[step.channel]
                    first = channel.offset + (step.layer or 0) * layout.layer_stride + step.copy * layout.copy_words
                    for turn in range(channel.turns):
                        polled[block, (first + turn * channel.words + step.words) // per_line] = True
    return polled


def large_plan(model: str, devices: int, topology: Topology | None) -> Plan:
    """With a block on every compute unit of an MI300X that the model can employ; layers are alike, so two of them."""
    config = preset(model)
    config = config.replace(num_layers=2, sliding_windows=config.sliding_windows[:2])
    blocks = default_blocks(config, 1, MI300X.units)
    return make_plan(config, devices=devices, blocks=blocks, target=GPU, topology=topology)


LARGE = [("laneformer-2b", 1), ("laneformer-2b", 8), ("llama-3.1-8b", 8), ("qwen2.5-coder-0.5b", 4)]


@pytest.mark.parametrize(("model", "devices"), LARGE)
def test_no_line_has_more_pollers_than_an_mi300x_bears(model: str, devices: int) -> None:
    plan = large_plan(model, devices, MI300X)
    for device in {0, devices - 1}:
        assert polled_lines(plan, device).sum(0).max() == max(span.count for span in plan.placement.roles)
    assert max(span.count for span in plan.placement.roles) <= MI300X.units_per_die.whole <= MOST_POLLERS


@pytest.mark.parametrize(("model", "devices"), LARGE)
def test_without_copies_all_blocks_would_poll_a_line(model: str, devices: int) -> None:
    plan = large_plan(model, devices, None)
    assert polled_lines(plan, 0).sum(0).max() == plan.num_blocks > MOST_POLLERS


@settings(max_examples=25, deadline=None)
@given(plans())
def test_blocks_poll_the_copy_of_their_die(plan: Plan) -> None:
    layout, per_line = exchange(plan, 0), LINE_BYTES // plan.target.word_bytes
    polled = polled_lines(plan, 0)
    by_die = np.array([polled[span.first : span.stop].any(0) for span in plan.placement.roles])
    for channel in layout.channels.values():
        if channel.copies > 1:
            for copy in range(channel.copies):
                first = channel.offset + copy * layout.copy_words
                lines = by_die[:, first // per_line : -(-(first + channel.words) // per_line)]
                assert not np.delete(lines, copy, axis=0).any(), channel.name
