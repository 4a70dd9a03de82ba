"""The steps of the blocks agree with the layout of the exchange memory, with each other and with the trace."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import plans

from jax_mono.flow import Attend, Flow, Moment, Product, Publish, Receive, Visible, token_steps
from jax_mono.handoffs import exchange, writers
from jax_mono.models.presets import preset
from jax_mono.plan import GPU, STAGES, Plan, make_plan
from jax_mono.trace import LAYER_MARKS, MARKS

KINDS = st.sampled_from(["fed", "sampled", "filtered"])


def accesses(plan: Plan, position: int, kind: str) -> tuple[dict, dict]:
    """(device, channel, layer) -> how often each word is published, and whether it is received, in one token."""
    published, received = defaultdict(dict), defaultdict(dict)
    for device in range(plan.num_devices):
        for block in range(plan.num_blocks):
            for step in token_steps(plan, device, block, position, kind):
                if isinstance(step, Publish):
                    count = published[step.device, step.channel, step.layer]
                    for word in step.words.tolist():
                        count[word] = count.get(word, 0) + 1
                elif isinstance(step, Receive):
                    received[device, step.channel, step.layer].update(dict.fromkeys(step.words.tolist(), 1))
    return published, received


@settings(max_examples=12, deadline=None)
@given(plans(), st.integers(0, 50), KINDS)
def test_whatever_is_received_is_published_once_in_the_same_token(plan: Plan, position: int, kind: str) -> None:
    if plan.num_devices * plan.num_blocks > 24:
        plan = make_plan(plan.config, devices=plan.num_devices, blocks=3, target=plan.target)
    published, received = accesses(plan, position, kind)
    for key, words in received.items():
        assert words.keys() <= published[key].keys(), key
    for (device, channel, layer), words in published.items():
        assert set(words.values()) <= {1}
        assert max(words, default=0) <= exchange(plan, device).channels[channel].words
        # A device may have no heads; the LM head may want sums only, or have no rows here, or not be needed.
        needless = plan.devices[device].kv_heads.count == 0 or layer == plan.config.num_layers - 1
        if not (channel == "residual_mlp" and needless) and channel not in ("attention", "summary", "logits", "choice"):
            assert received[device, channel, layer].keys() == words.keys(), (channel, layer)


@settings(max_examples=25, deadline=None)
@given(plans(), st.integers(0, 50), st.randoms(use_true_random=False))
def test_blocks_publish_what_the_layout_says(plan: Plan, position: int, random) -> None:
    device, block = random.randrange(plan.num_devices), random.randrange(plan.num_blocks)
    for step in Flow(plan, device).steps(block, position, "filtered"):
        if isinstance(step, Publish):
            owned = [
                words
                for source, number, words in writers(plan, step.device, step.channel)
                if (source, number) == (device, block)
            ]
            assert np.isin(step.words, np.concatenate(owned)).all()
            if step.channel != "attention":
                assert len(step.words) == sum(map(len, owned))


@pytest.mark.parametrize("model", ["laneformer-2b", "llama-3.2-1b"])
def test_moments_are_those_of_a_trace_and_products_those_of_the_plan(model: str) -> None:
    plan = make_plan(preset(model), devices=2, blocks=4, target=GPU)
    steps = token_steps(plan, 1, 3, 5)
    moments = [(step.mark, step.layer) for step in steps if isinstance(step, Moment)]
    layered = [(mark, layer) for layer in range(plan.config.num_layers) for mark in LAYER_MARKS]
    after = [(mark, None) for mark in MARKS[MARKS.index("mlp_mixed") + 1 :]]
    assert list(dict.fromkeys(moments)) == [("begun", None), *layered, *after]
    products = [step for step in steps if isinstance(step, Product)]
    assert sum(step.weights for step in products) == plan.block_words(1, 3)
    assert [step.stage for step in products] == [*(STAGES[:4] * plan.config.num_layers), "head"]


@settings(max_examples=50, deadline=None)
@given(plans(), st.integers(0, 400))
def test_splits_share_the_visible_positions(plan: Plan, position: int) -> None:
    for layer, window in enumerate(plan.config.sliding_windows):
        visible = Visible.of(plan, layer, position)
        assert sum(visible.positions(plan, split) for split in visible.splits) == min(
            position + 1, window or position + 1
        )
        assert all(visible.positions(plan, split) > 0 for split in visible.splits)


def test_attention_reads_every_visible_position_of_every_head() -> None:
    plan = make_plan(preset("laneformer-2b"), devices=2, blocks=16, target=GPU)
    read = [sum(s.positions for s in token_steps(plan, 0, block, 700) if isinstance(s, Attend)) for block in range(16)]
    assert sum(read) == 8 * (10 * 512 + 5 * 701)
