"""Every word of exchange memory has one writer: the first half of the proof in ffi/kernel/handoff.h."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from plans import plans
from tiny import tiny

from jax_mono import handoffs
from jax_mono.plan import Plan, make_plan
from jax_mono.record import constants_layout, plan_record


def count_writers(plan: Plan, device: int, channel: handoffs.Channel) -> np.ndarray:
    """Per word of one copy of a channel, how many blocks write it."""
    writers = np.zeros(channel.words, np.int64)
    for source, block, words in handoffs.writers(plan, device, channel.name):
        assert 0 <= source < plan.num_devices and 0 <= block < plan.num_blocks
        if channel.source == "local":
            assert source == device or len(words) == 0
        elif channel.source == "peers":
            assert source != device
        np.add.at(writers, words, 1)  # counts a word twice that a block names twice
    return writers


@settings(max_examples=60, deadline=None)
@given(plans())
def test_every_word_has_exactly_one_writer(plan: Plan) -> None:
    for device in range(plan.num_devices):
        for channel in handoffs.exchange(plan, device).channels.values():
            writers = count_writers(plan, device, channel)
            if channel.source == "peers":  # [devices, hidden]; nobody sends to itself
                writers = writers.reshape(plan.num_devices, -1)
                assert not writers[device].any()
                writers = np.delete(writers, device, axis=0)
            assert (writers == 1).all(), channel.name


@settings(max_examples=60, deadline=None)
@given(plans())
def test_channels_do_not_overlap_and_fill_the_memory(plan: Plan) -> None:
    for device in range(plan.num_devices):
        layout = handoffs.exchange(plan, device)
        used = np.zeros(layout.words, np.int64)
        for channel in layout.channels.values():
            for layer in range(plan.config.num_layers if channel.per_layer else 1):
                first = channel.offset + layer * layout.layer_stride
                used[first : first + channel.copies * channel.words] += 1
        assert (used == 1).all()


def test_what_successive_tokens_could_confuse_has_two_copies() -> None:
    """A block publishes its summary, and what belongs to it, before it has read the others' of the same token."""
    channels = handoffs.exchange(make_plan(tiny("laneformer"), devices=2, blocks=2), 0).channels
    assert {name for name, channel in channels.items() if channel.copies == 2} == {"summary", "logits", "choice"}
    assert {channel.copies for channel in channels.values()} == {1, 2}


def test_an_unknown_channel() -> None:
    with pytest.raises(KeyError):
        list(handoffs.writers(make_plan(tiny("llama")), 0, "telepathy"))


@settings(max_examples=60, deadline=None)
@given(plans())
def test_records_and_constants_are_as_long_as_they_say(plan: Plan) -> None:
    words = plan_record(plan)
    assert words.dtype == np.int64 and not words.flags.writeable
    assert constants_layout(plan)["floats"] == max(constants_layout(plan).values())
