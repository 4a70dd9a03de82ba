"""``jax-mono bench``: numbers that hang together."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from kernel.common import make_decoder
from tiny import tiny

from jax_mono import make_plan, native, packing
from jax_mono.cli import bench
from jax_mono.cli.models import TINY

WORK = ["--prompt-tokens", "4", "--new-tokens", "8", "--runs", "2"]


def test_random_weights_with_baseline(run) -> None:
    ran = run("bench", "--model", "tiny", "--random-weights", "--blocks", "2", *WORK, "--baseline", "flax", "--json")
    record = ran.record
    assert ran.code == 0
    assert all(not isinstance(value, dict | list) for value in record.values())
    plan = make_plan(TINY["tiny"], blocks=2)
    assert record["bytes_per_token"] == 2 * sum(plan.block_words(0, block) for block in range(2))
    assert (record["dtype"], record["batch"], record["devices"], record["blocks"]) == ("bfloat16", 1, 1, 2)
    assert (record["context"], record["weights"], record["runs"]) == (12, "random", 2)
    assert record["jax_version"] == jax.__version__
    assert record["parameters"] == TINY["tiny"].num_parameters
    assert record["tokens_per_s_min"] <= record["tokens_per_s"] <= record["tokens_per_s_max"]
    assert 0 < record["inter_token_p50_s"] <= record["inter_token_p99_s"]
    assert record["decode_bytes_per_s"] == pytest.approx(record["tokens_per_s"] * record["bytes_per_token"])
    assert record["limit_tokens_per_s"] == record["read_bandwidth_bytes_per_s"] / record["bytes_per_token"]
    lowest, highest = record["read_bandwidth_min_bytes_per_s"], record["read_bandwidth_max_bytes_per_s"]
    assert 0 < lowest <= record["read_bandwidth_bytes_per_s"] <= highest
    assert max(record[f"read_bandwidth_{streams}_streams_bytes_per_s"] for streams in (1, 2, 4, 8)) == highest
    fractions = [record[f"fraction_of_read_bandwidth{which}"] for which in ("_min", "", "_max")]
    assert fractions == sorted(fractions)
    speeds = [record[f"tokens_per_s{which}"] * record["bytes_per_token"] for which in ("_min", "_max")]
    assert speeds[0] / highest <= fractions[0] and fractions[2] <= speeds[1] / lowest
    assert record["kv_cache_bytes"] == 2 * 4 * 2 * 12 * 16 * 2
    assert record["peak_rss_bytes"] >= record["rss_before_packing_bytes"] > 0
    assert record["times_baseline"] == pytest.approx(record["tokens_per_s"] / record["baseline_tokens_per_s"])
    assert record["baseline_tokens"] == 2 * 8
    speeds = [record[f"baseline_tokens_per_s{which}"] for which in ("_min", "", "_max")]
    assert speeds == sorted(speeds) and speeds[0] > 0


def test_each_run_is_compared_with_the_bandwidth_around_it() -> None:
    decoder = make_decoder(tiny("llama"), blocks=2)
    plan = decoder.plan
    per_token = 4 * sum(plan.block_words(0, block) for block in range(2))
    one, two, three = ({1: 0.0, 2: best, 4: 1.0, 8: 1.0} for best in (100.0, 400.0, 10.0))
    slow, fast = (bench._Timing((0.0, per_token / rate)) for rate in (100.0, 200.0))
    record = bench._against_bandwidth(decoder, [one, two, three], [slow, fast])
    assert record["fraction_of_read_bandwidth_min"] == pytest.approx(100 / 400)
    assert record["fraction_of_read_bandwidth_max"] == pytest.approx(200 / 400)
    record = bench._against_bandwidth(decoder, [three, one, three], [slow, fast])
    assert record["fraction_of_read_bandwidth"] == pytest.approx((100 / 100 + 200 / 100) / 2)


def test_the_baseline_ends_in_time(run) -> None:
    """However slow it is, three tokens are timed; then the limit counts."""
    arguments = ["--model", "tiny", "--random-weights", "--blocks", "1", *WORK]
    ran = run("bench", *arguments, "--baseline", "flax", "--baseline-seconds", "1e-9")
    assert "(median of 3 tokens)" in ran.out


@pytest.mark.parametrize(
    ("arrivals", "enough"),
    [
        ([], False),
        ([0.0, 100.0, 200.0], False),  # the first one only compiles
        ([0.0, 100.0, 200.0, 300.0], True),
        ([0.0, 1.0, 2.0, 3.0], False),
        ([0.0, 1.0, 2.0, 59.0], False),
        ([0.0, 1.0, 2.0, 60.0], True),
        ([0.1 * index for index in range(2 * 8)], False),
        ([0.1 * index for index in range(2 * 8 + 1)], True),
    ],
)
def test_when_the_baseline_has_been_measured(arrivals: list[float], enough: bool) -> None:
    arguments = argparse.Namespace(baseline_seconds=60.0, new_tokens=8, runs=2)
    assert bench._enough(arrivals, arguments) == enough


def test_table_of_a_checkpoint(run, chat_model: Path) -> None:
    ran = run("bench", "--model", chat_model, "--blocks", "1", "--dtype", "float32", *WORK)
    assert ran.code == 0
    assert {line.split()[0] for line in ran.out.splitlines()} >= {"model", "speed", "latency", "limit", "memory"}
    assert "checkpoint weights" in ran.out


def test_mesh(run) -> None:
    arguments = ["--model", "tiny-laneformer", "--random-weights", "--devices", "2", "--blocks", "1", "--form", "mesh"]
    record = run("bench", *arguments, *WORK, "--json").record
    assert (record["devices"], record["form"]) == (2, "mesh")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--new-tokens", "1"], "at least 2"),
        (["--context", "20"], "need a context from 96"),
        (["--context", "999"], "to the model's 512"),
    ],
)
def test_bad_input(run, options: list[str], message: str) -> None:
    ran = run("bench", "--model", "tiny", "--random-weights", *options)
    assert ran.code == 2 and message in ran.err


def test_gpus_are_refused_before_anything_is_packed(run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their memory is not the processor's to read."""
    monkeypatch.setattr(packing, "home", lambda: SimpleNamespace(platform="gpu"))
    ran = run("bench", "--model", "tiny", "--random-weights", *WORK)
    assert ran.code == 2 and "cannot measure GPUs; set JAX_PLATFORMS=cpu" in ran.err
    array = SimpleNamespace(addressable_shards=[SimpleNamespace(device=SimpleNamespace(platform="gpu"))])
    with pytest.raises(ValueError, match="reads arrays of CPUs"):
        native.read_bandwidth(array, 1, 1)
