"""``jax-mono simulate``: predictions, traces of them, and what they rest on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def test_a_prediction(run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    arguments = ("tiny-laneformer", "--device", "h200", "--devices", "2", "--program", "skeleton")
    ran = run("simulate", *arguments, "--out", tmp_path / "trace.json", "--picture", tmp_path / "token.svg")
    assert ran.code == 0 and ran.out.startswith("2 × h200, skeleton: ")
    assert "tok/s predicted" in ran.out and "2 devices × 8 blocks, 6 layers" in ran.out
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert "<svg" in (tmp_path / "token.svg").read_text()


def test_a_prediction_as_json_and_what_it_depends_on(run) -> None:
    arguments = ("simulate", "tiny-laneformer", "--device", "mi300x", "--devices", "4", "--json")
    found = [json.loads(run(*arguments, *more).out) for more in ((), ("--handoff-us", "3"), ("--delay", "0"))]
    found.append(json.loads(run(*arguments, "--code-us", "0").out))
    assert found[0]["blocks"] == 8 and found[0]["parameters"]["stream_rate"]["origin"] == "assumed"
    assert found[0]["tokens_per_second"] > max(other["tokens_per_second"] for other in found[1:3])
    assert found[3]["tokens_per_second"] > 1.1 * found[0]["tokens_per_second"]
    assert found[1]["token_us"] > found[1]["stream_us"]


def test_placement_can_be_switched_off(run) -> None:
    arguments = ("simulate", "tiny-laneformer", "--device", "mi300x", "--json")
    found = [json.loads(run(*arguments, *more).out) for more in ((), ("--placement", "off"), ("--groups", "1"))]
    assert [made["placed"] for made in found] == [True, False, True]
    assert [made["groups"] for made in found] == [4, 4, 1]
    assert found[1]["stream_us"] > found[0]["stream_us"]


def test_parameters_have_origins(run) -> None:
    ran = run("simulate", "--device", "h100", "--parameters", "--bandwidth", "3")
    assert ran.code == 0 and ran.out.startswith("h100, resident program")
    for origin in ("measured", "derived", "counted", "assumed"):
        assert f" {origin}" in run("simulate", "--device", "h100", "--parameters").out
    assert "3,000  assumed" in ran.out


def test_sensitivity(run) -> None:
    ran = run("simulate", "tiny-laneformer", "--device", "mi300x", "--devices", "2", "--sensitivity")
    assert ran.code == 0 and ran.out.count("TB/s") == 3
    rows = [line.split() for line in ran.out.splitlines() if line.strip().startswith(("0.5", "3.0"))]
    assert all(
        float(fast.replace(",", "")) > float(slow.replace(",", ""))
        for fast, slow in zip(rows[0][1:], rows[1][1:], strict=True)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny", "--delay", "1"], "--delay needs a model with lanes"),
        (["tiny", "--handoff-us", "0"], "--handoff-us is 0, must be positive"),
        (["tiny", "--code-us", "-1"], "--code-us is -1, must not be negative"),
        (["tiny", "--bandwidth", "-1"], "--bandwidth is -1, must be positive"),
        (["tiny", "--device", "h100", "--devices", "9"], "a host has 1 to 8 devices h100, and two have 16; not 9"),
        (["llama-3.1-8b", "--device", "h100", "--blocks", "200"], "h100 has 132 compute units, not 200"),
    ],
)
def test_bad_input(run, arguments: list[str], message: str) -> None:
    ran = run("simulate", *arguments)
    assert (ran.code, ran.out) == (2, "") and message in ran.err
