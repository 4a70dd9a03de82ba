"""Every word of exchange memory has one writer: the first half of the proof in ffi/kernel/handoff.h."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from plans import plans
from tiny import tiny

from jax_mono import handoffs
from jax_mono.models.presets import preset
from jax_mono.plan import CPU, GPU, Plan, StageName, Target, make_plan
from jax_mono.record import constants_layout, plan_record
from jax_mono.topology import MI300X


def count_writers(plan: Plan, device: int, channel: handoffs.Channel) -> np.ndarray:
    """Per word of a channel, how many blocks write it; every one of them writes all its copies."""
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
            if channel.source == "peers":  # a part for every device; nobody sends to itself
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
            for first in places(plan, layout, channel):
                used[first : first + channel.words] += 1
        dies = len(plan.placement.roles)  # counters of arriving blocks come last
        assert not used[layout.arrivals :].any() and layout.words - layout.arrivals == (dies if dies > 1 else 0)
        assert used.max() == 1 and (dies > 1 or (used[: layout.arrivals] == 1).all())


@settings(max_examples=60, deadline=None)
@given(plans())
def test_dies_share_no_line_of_what_has_copies(plan: Plan) -> None:
    dies, per_line = len(plan.placement.roles), handoffs.LINE_BYTES // plan.target.word_bytes
    for device in range(plan.num_devices):
        layout = handoffs.exchange(plan, device)
        assert {channel.copies for channel in layout.channels.values()} == {1, dies}
        holder: dict[int, int] = {}
        for channel in layout.channels.values():
            for first in places(plan, layout, channel):
                copied = channel.copies > 1
                die = (first - channel.offset) % layout.layer_stride // layout.copy_words if copied else -1
                for line in range(first // per_line, (first + channel.words - 1) // per_line + 1):
                    assert dies == 1 or channel.words == 0 or holder.setdefault(line, die) == die


def places(plan: Plan, layout: handoffs.Exchange, channel: handoffs.Channel) -> list[int]:
    """First words of a channel: of every layer, copy and turn."""
    return [
        channel.offset + layer * layout.layer_stride + copy * layout.copy_words + turn * channel.words
        for layer in range(plan.config.num_layers if channel.per_layer else 1)
        for copy in range(channel.copies)
        for turn in range(channel.turns)
    ]


@settings(max_examples=100, deadline=None)
@given(plans())
def test_runs_have_room_for_the_largest_share_and_no_more(plan: Plan) -> None:
    runs, target, rows = handoffs.Runs.of(plan), plan.target, plan.tile.rows

    def largest(stage: StageName) -> int:
        return max(span.count for share in plan.devices for span in share.stages[stage].shares)

    for words, values, per_word in (
        (runs.tile, rows, target.floats_per_word),
        (runs.hidden, rows * largest("o"), target.floats_per_word),
        (runs.activation, rows // 2 * largest("up"), target.weights_per_word),
        (runs.logits, rows * largest("head"), target.floats_per_word),
    ):
        assert 0 <= words * per_word - values < per_word


@pytest.mark.parametrize("target", [CPU, GPU], ids=lambda target: target.name)
def test_a_word_holds_its_values_and_a_tag(target: Target) -> None:
    floats, weights = 4 * target.floats_per_word, 2 * target.weights_per_word
    assert max(floats, weights) + 4 <= target.word_bytes
    assert target.word_bytes in (8, 16)  # what the processor stores and loads at once


def test_words_of_laneformer_2b_on_eight_gpus() -> None:
    """One lane on each device: 132 blocks with 2 or 3 tiles of hidden rows, and 2 KV heads in 66 parts."""
    channels = handoffs.exchange(make_plan(preset("laneformer-2b"), devices=8, blocks=132, target=GPU), 0).channels
    assert channels["qkv"].words == 96 * 3  # tiles; 8 values of at most 9
    assert channels["attention"].words == 4 * 66 * (1 + 32)  # query heads, parts, maximum and sum, output
    assert channels["residual_mlp"].words == 132 * 8
    assert channels["inbox_mlp"].words == 8 * 132 * 8
    assert channels["summary"].words == 8 * 132 * 2
    assert channels["choice"].words == 1


def test_what_successive_tokens_could_confuse_has_two_places() -> None:
    """A block publishes its summary, and what belongs to it, before it has read the others' of the same token."""
    channels = handoffs.exchange(make_plan(tiny("laneformer"), devices=2, blocks=2), 0).channels
    assert {name for name, channel in channels.items() if channel.turns == 2} == {"summary", "logits", "choice"}
    assert {channel.turns for channel in channels.values()} == {1, 2}


def test_what_many_blocks_read_has_a_copy_per_die() -> None:
    """Each block reads its own part of an inbox, and block 0 alone reads logits."""
    plan = make_plan(preset("laneformer-2b"), devices=8, blocks=304, target=GPU, topology=MI300X)
    layout = handoffs.exchange(plan, 0)
    single = {name for name, channel in layout.channels.items() if channel.copies == 1}
    assert single == {"inbox_attention", "inbox_mlp", "final_inbox", "logits"}
    assert {channel.copies for name, channel in layout.channels.items() if name not in single} == {8}
    assert {handoffs.exchange(plan, device).copy_words for device in range(8)} == {layout.copy_words}


def test_an_unknown_channel() -> None:
    with pytest.raises(KeyError):
        list(handoffs.writers(make_plan(tiny("llama")), 0, "telepathy"))


@settings(max_examples=60, deadline=None)
@given(plans())
def test_records_and_constants_are_as_long_as_they_say(plan: Plan) -> None:
    words = plan_record(plan)
    assert words.dtype == np.int64 and not words.flags.writeable
    assert constants_layout(plan)["floats"] == max(constants_layout(plan).values())
