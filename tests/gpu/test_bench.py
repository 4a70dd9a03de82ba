"""On GPUs bench compares with what the resident program can pass; nothing decodes faster than that."""

from __future__ import annotations

import json

import numpy as np
import pytest
from gpu import rehearsal
from tiny import tiny

from jax_mono.cli import main
from jax_mono.cli.bench_runs import measure_limit, timed_run
from jax_mono.decoder import Decoder
from jax_mono.limit import bytes_per_token

CONFIG = tiny("laneformer", hidden_size=512, intermediate_size=2048, num_layers=6)

BLOCKS = 2 if rehearsal.KIND else 16

pytestmark = pytest.mark.skipif(rehearsal.KIND == "fibers", reason="fibers have no speed")


@pytest.mark.parametrize("devices", [1, 2])
def test_decoding_stays_below_the_limit(devices: int) -> None:
    decoder = Decoder.random(CONFIG, devices=devices, blocks=BLOCKS // devices, context=128)
    timed_run(decoder, [1, 2], 64)
    limit = measure_limit(decoder)
    assert limit.name == ("read_bandwidth" if rehearsal.KIND else "stream_limit")
    per_token = bytes_per_token(decoder.plan, decoder.tapes)
    speeds = [timed_run(decoder, [1, 2], 100).tokens_per_s for _ in range(3)]
    print(f"{devices} devices: {np.median(speeds):.0f} tokens/s of {limit.bytes_per_s / per_token:.0f}")
    assert 0 < np.median(speeds) * per_token < limit.bytes_per_s


def test_random_tapes_decode_to_finite_logits() -> None:
    decoder = Decoder.random(CONFIG, blocks=BLOCKS, context=128, seed=3)
    output = decoder.generate([1], max_new_tokens=100, stop=[])
    assert np.isfinite(output.logprobs).all() and len(set(output.tokens)) > 10
    assert output.tokens == decoder.generate([1], max_new_tokens=100, stop=[]).tokens


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", "tiny-laneformer", "--random-weights", "--blocks", "2"]
    work = ["--prompt-tokens", "4", "--new-tokens", "8", "--runs", "2", "--contexts", "32"]
    assert main(["bench", *model, *work, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    name = "read_bandwidth" if rehearsal.KIND else "stream_limit"
    assert record["limit"] == name and record[f"fraction_of_{name}"] > 0
    assert [row["context"] for row in record["contexts"]] == [32]
