"""The plan's record is what ffi/kernel/plan.h says it is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from plans import plans
from tiny import tiny

from jax_mono import native, record
from jax_mono.config import Lanes, ModelConfig
from jax_mono.handoffs import Runs, exchange
from jax_mono.plan import STAGES, Plan, make_plan


def test_every_field_lies_where_the_native_library_expects_it() -> None:
    mirrored = {name: dtype.itemsize for name, dtype in record.RECORDS.items()}
    for name, dtype in record.RECORDS.items():
        mirrored |= {f"{name}.{field}": offset for field, (_, offset, *_) in dtype.fields.items()}
    # The library does not name the parts of a Span and padding that nobody reads.
    unnamed = {"Span.first", "Span.count", "Layer.reserved"}
    assert {name: value for name, value in mirrored.items() if name not in unnamed} == native.record_fields()
    assert record.SPAN.fields["first"][1] == 0 and record.SPAN.fields["count"][1] == 4


def test_fields_have_the_width_of_their_c_types() -> None:
    for name, dtype in record.RECORDS.items():
        ends = sorted((offset, dtype[field].itemsize) for field, (_, offset, *_) in dtype.fields.items())
        position = 0
        for offset, size in ends:
            assert offset == position, f"a gap in {name}"
            position += size
        assert position == dtype.itemsize and (name == "Span" or position % 8 == 0)


def columns_of_words(plan: Plan, device: int) -> bool:
    """Whether the values of a device's activation words, one after the other, are the columns of its down stage."""
    up, down = plan.devices[device].stages["up"], plan.devices[device].stages["down"]
    half, width = plan.tile.rows // 2, plan.tile.padded_cols(down.cols)
    per_lane = up.tiles // max(1, up.lanes) * half
    columns: list[int | None] = []
    for share in up.shares:
        for value in range(Runs.of(plan).activation * plan.target.weights_per_word):
            lane, neuron = divmod(share.first * half + value, per_lane)
            there = value < share.count * half and neuron < down.cols
            columns.append(lane * width + neuron if there else None)
    return columns == list(range(down.lanes * width))


@settings(max_examples=60, deadline=None)
@given(plans())
def test_the_record_says_what_the_plan_says(plan: Plan) -> None:
    data = record.plan_record(plan).tobytes()
    header = np.frombuffer(data, record.HEADER, 1)[0]
    assert header["magic"] == record.MAGIC and header["size"] == len(data)
    for name in ("num_devices", "num_blocks", "layer_words", "head_words", "kv_splits", "max_kv_heads", "max_vocab"):
        assert header[name] == getattr(plan, name)
    for name in ("kv_chunk", "floats_per_word", "weights_per_word"):
        assert header[name] == getattr(plan.target, name)
    for name in ("hidden", "activation", "logits"):
        assert header[f"{name}_run"] == getattr(Runs.of(plan), name)
    for name in ("num_layers", "num_lanes", "hidden_size", "vocab_size", "head_dim", "qkv_bias", "qk_norm"):
        assert header[name] == getattr(plan.config, name)
    assert header["copy_words"] == exchange(plan, 0).copy_words
    assert header["flat_activations"] == all(columns_of_words(plan, device) for device in range(plan.num_devices))
    roles = plan.placement.roles
    assert header["num_dies"] == len(roles) and header["tape_rows"] == plan.placement.tape_rows
    assert (header["granule_words"], header["period"]) == (plan.placement.granule_words, len(plan.placement.pattern))
    assert header["roles"].tolist() == [(span.first, span.count) for span in roles] + [(0, 0)] * (16 - len(roles))
    at = record.HEADER.itemsize + plan.config.num_layers * record.LAYER.itemsize
    devices = np.frombuffer(data, record.DEVICE, plan.num_devices, at)
    blocks = np.frombuffer(data, record.BLOCK, offset=at + devices.nbytes).reshape(plan.num_devices, plan.num_blocks)
    for device, share in enumerate(plan.devices):
        layout = exchange(plan, device)
        channels = devices[device]["channels"]
        assert (channels["words"], channels["layer_stride"]) == (layout.words, layout.layer_stride)
        assert channels["arrivals"] == layout.arrivals
        for name in ("qkv", "attention", "activation", "final_inbox", "final_sum", "summary", "logits", "choice"):
            assert channels[name] == layout.channels[name].offset
        for name in ("lanes", "kv_heads", "neurons", "vocab"):
            assert tuple(devices[device][name]) == (getattr(share, name).first, getattr(share, name).count)
        for position, name in enumerate(STAGES):
            stage, words = share.stages[name], devices[device]["stages"][position]
            assert (words["tile_words"], words["rows"], words["lanes"]) == (stage.tile_words, stage.rows, stage.lanes)
            for block in range(plan.num_blocks):
                own = blocks[device, block]
                for name, length in zip(("layers", "head"), plan.tape_granules, strict=True):
                    assert own[name] == plan.placement.first_granule(block, length) * plan.placement.granule_words
                assert own["offsets"][position] == stage.offsets[block]
                assert tuple(own["shares"][position]) == (stage.shares[block].first, stage.shares[block].count)
                assert tuple(own["hidden"]) == (plan.hidden[block].first, plan.hidden[block].count)


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        (tiny("llama"), 1),
        (tiny("laneformer"), 2),
        (tiny("laneformer", lanes=Lanes(count=8, delay=0)), 1),
        (tiny("laneformer", lanes=Lanes(count=8, delay=4)), 4),
        (tiny("laneformer", num_layers=2), 1),  # too few for a delay of 2: only sums that are added at once
        (tiny("laneformer", lanes=Lanes(count=8, attention_comm=False, mlp_comm=False)), 1),
    ],
)
def test_histories_reach_back_as_far_as_sums_are_added_late(config: ModelConfig, layers: int) -> None:
    header = np.frombuffer(record.plan_record(make_plan(config)).tobytes(), record.HEADER, 1)[0]
    assert header["history_layers"] == layers


def test_peers_are_told_only_what_they_read() -> None:
    """A layer's sums are pushed where a later layer (or the same one) of another device adds them."""

    def pushed(devices: int, **switches: object) -> list[list[int]]:
        config = tiny("laneformer")
        config = config.replace(lanes=config.lanes.__class__(count=8, **switches))
        data = record.plan_record(make_plan(config, devices=devices)).tobytes()
        layers = np.frombuffer(data, record.LAYER, config.num_layers, record.HEADER.itemsize)
        return layers["pushed"].tolist()

    assert pushed(1, delay=0) == [[0, 0]] * 5
    assert pushed(2, delay=0) == [[1, 1]] * 5
    # Five layers with delay 2: the outputs of the last two arrive nowhere.
    assert pushed(2, delay=2) == [[1, 1]] * 3 + [[0, 0]] * 2
    assert pushed(2, delay=2, early_comm=False, early_layers_broadcast=False) == [[0, 0]] * 2 + [[1, 1]] + [[0, 0]] * 2
    assert pushed(2, delay=2, attention_comm=False) == [[0, 1]] * 3 + [[0, 0]] * 2
