"""The simulator on plans: limits that it must respect, and measurements that it must meet."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

from jax_mono.config import ModelConfig
from jax_mono.models.presets import preset
from jax_mono.plan import GPU, make_plan
from jax_mono.simulate import Timing, simulate, timing
from jax_mono.simulate.predict import (
    GROWTH,
    Prediction,
    grow,
    needed_handoff,
    plan_on,
    predict,
    sensitivity,
    with_rate,
)
from jax_mono.simulate.programs import RESIDENT, Work
from jax_mono.simulate.timing import Parameter
from jax_mono.trace import MARKS, RECEIVING, phases, trace_text, write_perfetto

LANEFORMER = preset("laneformer-2b")


def short(layers: int = 3, delay: int = 2) -> ModelConfig:
    """A Laneformer with fewer layers, to be quick."""
    lanes = dataclasses.replace(LANEFORMER.lanes, delay=delay)
    return LANEFORMER.replace(num_layers=layers, sliding_windows=(0,) * layers, lanes=lanes)


def run(config: ModelConfig, devices: int, known: Timing, blocks: int = 16, tokens: int = 2) -> float:
    """Microseconds per token."""
    return simulate(make_plan(config, devices=devices, blocks=blocks, target=GPU), known, tokens=tokens).token_ns / 1e3


H200 = timing("h200", "skeleton")
SLOW = H200.replace(stream_rate=H200.stream_rate.value * 16 / 132)
"""As much per block as with all blocks."""


_EARLIER_SUMS = dict.fromkeys(("inbox_attention", "inbox_mlp"), Work(1, code=195, early=60))
_EARLIER_ATTENTION = {"qkv": Work(2, code=80, early=262), "attention": Work(3, code=350, early=78)}
MEASURED = dataclasses.replace(
    RESIDENT,
    work=MappingProxyType({**RESIDENT.work, **_EARLIER_SUMS, **_EARLIER_ATTENTION}),
    code=MappingProxyType({**RESIDENT.code, "residual_attention": 95, "residual_mlp": 95, "attention": 589}),
    kv_positions=16,
    kv_code=245,
    late_sums=True,
)
"""The resident program when it was measured: it took delayed sums in after the product, and attended in more code."""

FULL = Parameter(2000, "assumed", "a fabric that polls and tapes fill")


def test_without_hand_offs_only_the_tapes_count() -> None:
    instant = SLOW.replace(trip_ns=1e-3, store_ns=1e-3, peer_ns=1e-3, fabric_rate=1e9)
    made = simulate(make_plan(short(), blocks=16, target=GPU), instant)
    assert 0.99 < made.of_stream <= 1.0 + 1e-9


def test_more_of_anything_bad_takes_longer() -> None:
    base = run(short(), 2, SLOW)
    for worse in (
        SLOW.with_handoff(6000),
        with_rate(SLOW, 0.5),
        SLOW.replace(peer_ns=50_000),
        SLOW.replace(ring_bytes=0),
        SLOW.replace(product_rate=30),
        dataclasses.replace(SLOW, program=MEASURED),
    ):
        assert run(short(), 2, worse) > 1.01 * base


def test_a_delay_hides_the_way_between_devices() -> None:
    far = SLOW.replace(peer_ns=20_000)
    assert run(short(6, delay=0), 2, far) > run(short(6), 2, far) + 6 * 2 * 5


def test_devices_with_unequal_shares_wait_for_each_other() -> None:
    """Five KV heads on two devices: both take the same time, since sums of one are needed by the other."""
    config = preset("smollm2-135m").replace(num_layers=2, sliding_windows=(0, 0), num_heads=10, num_kv_heads=5)
    made = simulate(make_plan(config, devices=2, blocks=4, target=GPU), SLOW)
    ends = made.trace.noted[:, :, :, -1].max(axis=1)
    assert np.ptp(ends, axis=0).max() < 1e-2 * made.token_ns


def test_traces_are_such_as_the_program_writes(tmp_path: Path) -> None:
    plan = make_plan(short(), devices=2, blocks=8, target=GPU)
    trace = simulate(plan, timing("h100"), tokens=2).trace
    assert trace.noted.shape == (2, 8, 2, len(trace.moments)) and trace.num_layers == 3
    assert trace_text(trace).startswith("2 devices × 8 blocks, 3 layers; tokens 1–2 of the call")
    rows = {row.name: row for row in phases(trace)}
    assert list(rows) == list(MARKS)
    assert all(row.mean >= 0 for row in rows.values()) and all(rows[name].mean > 0 for name in RECEIVING)
    write_perfetto(trace, tmp_path / "trace.json")
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_what_makes_no_sense() -> None:
    plan = make_plan(short(), blocks=140, target=GPU)
    with pytest.raises(ValueError, match="h100 has 132 compute units, not 140"):
        simulate(plan, timing("h100"))
    with pytest.raises(ValueError, match="no timing for 'mi355x'"):
        timing("mi355x")
    with pytest.raises(ValueError, match="program 'fast' is unknown"):
        timing("h100", "fast")


@pytest.mark.parametrize(
    ("lanes", "devices", "delay", "measured"),
    [(1, 1, 0, 940), (8, 1, 2, 907), (8, 2, 2, 1715), (8, 4, 2, 3101), (8, 4, 0, 2800)],
    ids=str,
)
def test_what_skeletons_reached_on_h200(lanes: int, devices: int, delay: int, measured: float) -> None:
    """Within 10 %, from micro-benchmarks alone. The measured programs read words of six values; so do these plans."""
    config = LANEFORMER.replace(lanes=dataclasses.replace(LANEFORMER.lanes, delay=delay))
    if lanes == 1:
        config = LANEFORMER.replace(family="llama", lanes=None)
    target = dataclasses.replace(GPU, floats_per_word=6)
    plan = make_plan(config, devices=devices, blocks=132, target=target)
    made = simulate(plan, H200, tokens=1)
    assert made.tokens_per_second == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    ("groups", "position", "ahead", "measured"),
    [
        (4, 144, True, 841),
        (4, 96, True, 850),
        (4, 480, True, 799),
        (4, 2016, True, 733),
        (4, 4064, True, 665),
        (4, 144, False, 820),
        (8, 144, False, 798),
    ],
    ids=str,
)
def test_what_the_resident_program_reached_on_h200(groups: int, position: int, ahead: bool, measured: float) -> None:
    """Within 10 %: laneformer-2b in bfloat16, positions in the middle of those that were measured."""
    known = dataclasses.replace(timing("h200"), program=MEASURED)
    known = known if ahead else known.replace(ahead_bytes=0)
    plan, _ = plan_on(LANEFORMER, known, gpus=1, groups=groups)
    assert plan.num_blocks == 128 // groups
    made = simulate(plan, known, groups=groups, position=position, tokens=1)
    assert made.tokens_per_second == pytest.approx(measured, rel=0.1)
    assert 1e9 / made.stream_ns == pytest.approx(1040, rel=0.01)


def test_what_its_chain_took_without_memory() -> None:
    """Products on what happened to lie in the ring, nothing copied: 634 us per token, within 10 %."""
    known = dataclasses.replace(timing("h200"), program=MEASURED)
    known = known.replace(ahead_bytes=0, stream_rate=1e5, placed_rate=1e5, block_rate=1e4, fabric_rate=1e6)
    plan, groups = plan_on(LANEFORMER, known, gpus=1)
    assert simulate(plan, known, groups=groups, position=76, tokens=1).token_ns == pytest.approx(634e3, rel=0.1)


def test_groups_of_one_gpu_share_its_memory_and_hand_over_within_it() -> None:
    plan = make_plan(short(6), devices=4, blocks=8, target=GPU)
    slow = H200.replace(stream_rate=H200.stream_rate.value / 4, peer_ns=50_000)
    one, four = (simulate(plan, slow, groups=groups, tokens=1) for groups in (4, 1))
    assert one.stream_ns == pytest.approx(4 * four.stream_ns)
    assert one.token_ns > 3 * one.stream_ns / 4
    early = 4 * 50e3  # the first two layers wait for others' sums, two modules each
    assert four.token_ns > four.stream_ns + early > one.token_ns - one.stream_ns + early
    with pytest.raises(ValueError, match="4 devices of a plan cannot be GPUs of 3 groups each"):
        simulate(plan, slow, groups=3)


def test_tapes_on_their_own_sides_come_faster() -> None:
    known = timing("mi300x")
    placed, _ = plan_on(short(2), known, gpus=1, groups=1)
    anywhere, _ = plan_on(short(2), known, gpus=1, groups=1, placed=False)
    assert placed.placement.interleaved and not anywhere.placement.interleaved
    near, far = (simulate(plan, known, tokens=1) for plan in (placed, anywhere))
    # All tapes are as long as the longest, in whole granules.
    assert far.stream_ns / near.stream_ns == pytest.approx(4800 / 4200, rel=0.01)
    assert near.token_ns < far.token_ns
    flat = timing("h200")
    assert flat.tape_rate(placed.placement) == flat.tape_rate(anywhere.placement)


def test_code_of_mi300x() -> None:
    """Every split whose part is joined costs, in every layer; load slows code only where it is fetched."""
    known, slow = timing("mi300x"), timing("mi300x").replace(code_ns=25)
    plan, _ = plan_on(short(2), known, gpus=2, blocks=128)  # enough for ten splits
    at_48, at_144 = (simulate(plan, slow, position=position, tokens=1).token_ns for position in (48, 144))
    joining = slow.program.work["attention"]
    work = {**slow.program.work, "attention": dataclasses.replace(joining, each=joining.each + 60)}
    dearer = dataclasses.replace(slow, program=dataclasses.replace(slow.program, work=MappingProxyType(work)))
    joins = 2 * 10 * 60 * 25  # of which a block may have waited for the others anyway
    assert 0.4 * joins < simulate(plan, dearer, position=144, tokens=1).token_ns - at_144 < 1.1 * joins
    assert joining.each > 0 and at_144 > at_48
    pushed = dataclasses.replace(slow.program, code=MappingProxyType({**slow.program.code, "inbox_mlp": 2000}))
    assert simulate(plan, dataclasses.replace(slow, program=pushed), tokens=1).token_ns > at_48 + 2 * 1000 * 25
    fetched = dataclasses.replace(slow, program=dataclasses.replace(slow.program, cached=False), fabric_rate=FULL)
    kept = dataclasses.replace(slow, fabric_rate=FULL)
    assert simulate(plan, fetched, tokens=1).token_ns > 1.02 * simulate(plan, kept, tokens=1).token_ns
    assert timing("h200").program.work["attention"].each == 0 and not timing("h200").program.cached


def test_load_on_the_fabric_slows_trips() -> None:
    assert H200.load_factor(0, 0, 132) == pytest.approx(1, abs=1e-3)
    stream = H200.stream_rate.value
    assert 1.5 < H200.load_factor(stream, 0, 132) < H200.load_factor(stream, 1e6, 132) < 10
    # A queue is no longer than all that is under way: 48 KiB for each block.
    full = 2 * H200.fabric_rate.value
    most = 1 + 132 * 48 * 1024 / H200.fabric_rate.value / H200.trip_ns.value
    assert H200.load_factor(full, 0, 132) == pytest.approx(most, rel=1e-3)


def test_tables() -> None:
    table = sensitivity(short(1), 1, timing("h100"), handoffs_us=(0.5, 3.0), rates=(4.0, 4.8))
    assert table[0.5, 4.8].tokens_per_second > table[3.0, 4.0].tokens_per_second
    made = {(t, 4.0): Prediction(1 / t, 0) for t in (1.0, 2.0, 3.0)}
    assert needed_handoff(made, 4.0, 1 / 2.5) == pytest.approx(2.5)
    assert needed_handoff(made, 4.0, 2) is None and needed_handoff(made, 4.0, 0.1) == 3.0
    sizes = {name: config.num_parameters / 1e9 for name, config in GROWTH.items()}
    assert 69 < sizes["70B dense"] < 72 and 2.5 < sizes["30B-A3B, active part"] < 3.6
    assert grow(timing("mi300x"), devices=(3,))["laneformer 2B", 3] is None, "eight lanes"


def test_two_hosts() -> None:
    """What crosses the network is waited for; within a host nothing does."""
    known = timing("mi300x")

    def token_ns(config: ModelConfig, gpus: int, **changes: float) -> float:
        return 1e9 / predict(config, gpus, known.replace(**changes), tokens=1).tokens_per_second

    dense = dataclasses.replace(GROWTH["8B dense"], num_layers=2, sliding_windows=(0, 0))
    assert token_ns(dense, 8, network_ns=9e3) == token_ns(dense, 8), "eight share a host"
    # The sums of two modules a layer, and the choice of the token; blocks that are late hide a part of short times.
    slower = token_ns(dense, 16, network_ns=14e3) - token_ns(dense, 16, network_ns=9e3)
    assert 4 * 5e3 <= slower <= 5 * 5e3
    assert token_ns(dense, 16, network_rate=5) > token_ns(dense, 16)
