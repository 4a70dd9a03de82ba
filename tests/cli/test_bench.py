"""``jax-mono bench``: numbers that hang together."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from kernel.common import make_decoder
from tiny import tiny

from jax_mono import limit, make_plan, native, packing
from jax_mono.cli import bench, bench_runs
from jax_mono.cli.bench_runs import Limit, Timing, against_limit
from jax_mono.cli.models import TINY
from jax_mono.config import ConfigError
from jax_mono.random_cache import random_cache

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
    assert record["prefill_tokens_per_s"] == pytest.approx(4 / record["first_token_s"])
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


def test_each_run_is_compared_with_the_limit_around_it() -> None:
    one, two, three = (Limit("read_bandwidth", {"1": 0.0, "2": best}) for best in (100.0, 400.0, 10.0))
    slow, fast = (Timing((0.0, 7 / rate)) for rate in (100.0, 200.0))
    record = against_limit(7, [one, two, three], [slow, fast])
    assert record["fraction_of_read_bandwidth_min"] == pytest.approx(100 / 400)
    assert record["fraction_of_read_bandwidth_max"] == pytest.approx(200 / 400)
    record = against_limit(7, [three, one, three], [slow, fast])
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
        (["--contexts", "4"], "--contexts 4 must be between 8 and 96"),
        (["--contexts", "513"], "to the model's 512"),
        (["--plot", "x.svg"], "name some with --contexts"),
    ],
)
def test_bad_input(run, options: list[str], message: str) -> None:
    ran = run("bench", "--model", "tiny", "--random-weights", *options)
    assert ran.code == 2 and message in ran.err


def test_contexts(run, tmp_path: Path) -> None:
    picture = tmp_path / "contexts.svg"
    arguments = ["--model", "tiny-laneformer", "--random-weights", "--blocks", "1", *WORK, "--plot", picture]
    ran = run("bench", *arguments, "--contexts", "8,40", "--json")
    short, long = ran.record["contexts"]
    assert ran.record["context"] == 40
    assert (short["context"], short["first_position"], short["new_tokens"]) == (8, 3, 4)
    assert (long["context"], long["first_position"], long["new_tokens"]) == (40, 31, 8)
    assert 0 < long["tokens_per_s_min"] <= long["tokens_per_s"] and long["fraction_of_read_bandwidth"] > 0
    # 4 of 6 layers see a window of 16 positions; keys and values of 8 heads of 8 channels, 2 bytes each
    assert (short["kv_bytes_per_token"], long["kv_bytes_per_token"]) == (2 * 6 * 8 * 128, 2 * (4 * 16 + 2 * 40) * 128)
    assert "<svg" in picture.read_text() and "context at the end" in picture.read_text()


def test_a_made_up_conversation_goes_on() -> None:
    """The kernel takes it for a real one: its tokens depend on the keys and values, and the position moves on."""
    decoder = make_decoder(tiny("llama"), blocks=2, context=64)
    outputs = [decoder.generate([1], cache=random_cache(decoder, 40, seed), max_new_tokens=8) for seed in (0, 1, 0)]
    assert outputs[0].tokens == outputs[2].tokens != outputs[1].tokens
    assert int(outputs[0].cache.end) == 49 and np.isfinite(outputs[0].logprobs).all()
    with pytest.raises(ValueError, match="must be shorter than the context of 64"):
        random_cache(decoder, 64)


def test_gpus_are_compared_with_the_stream_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = make_decoder(tiny("llama"), blocks=2)
    per_token = limit.bytes_per_token(decoder.plan, decoder.tapes)
    layers = SimpleNamespace(devices=lambda: [SimpleNamespace(platform="gpu")])
    tapes = SimpleNamespace(layers=layers, dtype=decoder.tapes.dtype)
    fake = SimpleNamespace(plan=decoder.plan, tapes=tapes, mesh=None)
    monkeypatch.setattr(limit, "_pass_tapes", lambda plan, tapes, passes, mesh: clock.pass_(int(passes)))
    clock = Clock(per_launch=5.0, per_pass=0.25)
    monkeypatch.setattr(limit, "time", SimpleNamespace(perf_counter=clock))
    found = bench_runs.measure_limit(fake)
    assert found.name == "stream_limit" and found.bytes_per_s == pytest.approx(per_token / 0.25)
    record = against_limit(per_token, [found, found], [Timing((0.0, 0.5))])
    assert record["limit"] == "stream_limit" and record["limit_tokens_per_s"] == pytest.approx(4.0)
    assert record["fraction_of_stream_limit"] == pytest.approx(0.5)


class Clock:
    """Time goes on with passes over the tapes and nothing else."""

    def __init__(self, per_launch: float, per_pass: float) -> None:
        self.now, self.per_launch, self.per_pass = 0.0, per_launch, per_pass

    def __call__(self) -> float:
        return self.now

    def pass_(self, passes: int) -> np.ndarray:
        self.now += self.per_launch + passes * self.per_pass
        return np.zeros(2, np.int32)


def test_on_a_gpu_random_weights_are_made_there(monkeypatch: pytest.MonkeyPatch) -> None:
    made = {}
    monkeypatch.setattr(packing, "home", lambda: SimpleNamespace(platform="gpu"))
    monkeypatch.setattr(
        "jax_mono.decoder.Decoder.random", lambda config, **options: made.update(options, config=config)
    )
    source = SimpleNamespace(config=TINY["tiny"])
    shape = {"devices": None, "blocks": 128, "form": "threads", "compress": False}
    asked = argparse.Namespace(random_weights=True, dtype="bfloat16", **shape, seed=4, quiet=True)
    bench._decoder(source, asked, 512)
    assert (made["config"], made["blocks"], made["context"], made["seed"]) == (TINY["tiny"], 128, 512, 4)
    assert made["compress"] is False


def test_each_processor_has_its_own_limit() -> None:
    decoder = make_decoder(tiny("llama"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="this mode runs on GPUs only"):  # that there is one, it knows
        limit._pass_tapes(decoder.plan, decoder.tapes, np.int32(3), mesh=None).block_until_ready()
    with pytest.raises(ConfigError, match="measured on GPUs; on a CPU the read bandwidth"):
        limit.stream_seconds(decoder.plan, decoder.tapes)
    array = SimpleNamespace(addressable_shards=[SimpleNamespace(device=SimpleNamespace(platform="gpu"))])
    with pytest.raises(ValueError, match="reads arrays of CPUs"):
        native.read_bandwidth(array, 1, 1)
