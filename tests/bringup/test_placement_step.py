"""The step that compares tapes on their blocks' sides with tapes laid anywhere, on GPUs as told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jax_mono.bringup import placement_step
from jax_mono.bringup.machine import Machine
from jax_mono.bringup.pages import Refusal
from jax_mono.bringup.placement_step import Pattern, Placement, measured_pattern, plans_of
from jax_mono.bringup.step import Context, Findings
from jax_mono.models.presets import preset
from jax_mono.topology import MI300X

NODE = Machine("rocm", ("AMD Instinct MI300X",), "gfx942", "mi300x")


def pages_found(out: Path, **details: object) -> Context:
    """A report in which the step ``pages`` has come to its end."""
    (out / "steps").mkdir(exist_ok=True)
    (out / "steps" / "pages.json").write_text(json.dumps({"findings": {"details": details}}))
    return Context(out, NODE, "toy")


class Stub:
    """A decoder of a certain speed."""

    def __init__(self, rate: float) -> None:
        self.rate = rate


def run(
    context: Context,
    monkeypatch: pytest.MonkeyPatch,
    rates: dict[bool, float],
    decodes: bool = True,
    following: float | None = None,
) -> Findings:
    """The step, where tapes come at such rates and tokens ten times as fast, by whether tapes take turns."""

    def speed(stub: Stub, tokens: int) -> float:
        if not decodes:
            raise RuntimeError("a hand-off was lost")
        return 10 * stub.rate

    monkeypatch.setattr(placement_step, "_units", lambda _: 304)
    refusal = Refusal("pages tell nothing")
    found = refusal if following is None else (Stub(following), ["the head's do not"])
    monkeypatch.setattr(placement_step, "_following", lambda plan, machine: found)
    monkeypatch.setattr(placement_step, "_decoder", lambda plan: Stub(rates[plan.placement.interleaved]))
    monkeypatch.setattr(placement_step, "_stream_rate", lambda stub: stub.rate)
    monkeypatch.setattr(placement_step, "_speed", speed)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_ALLOCATOR", "platform")
    return Placement().run(context)


def test_it_needs_memory_that_lies_somewhere() -> None:
    assert "needs a GPU of several dies" in Placement().applies(Machine("cpu"))
    why = Placement().applies(Machine("cuda", ("NVIDIA H200",), "sm_90a", "h200"))
    assert why == "needs a GPU of several dies: all memory of h200 is equally near"
    assert Placement().applies(NODE) == ""


def test_tapes_are_laid_by_the_measured_map(tmp_path: Path) -> None:
    sides = [0, 0, 1, 1, 2, 2, 3, 3]
    assert measured_pattern(Context(tmp_path, NODE, "toy")).sides is None
    found = measured_pattern(pages_found(tmp_path, pattern=[3, 2, 1, 0], die_of_xcd=sides))
    assert found == Pattern((3, 2, 1, 0), "the measured map of pages")
    assert measured_pattern(pages_found(tmp_path)).sides is None  # a refusal
    turned = measured_pattern(pages_found(tmp_path, pattern=[0, 1, 2, 3], die_of_xcd=[0, 1, 2, 3, 0, 1, 2, 3]))
    assert turned.sides is None and "another order" in turned.origin


def test_both_plans_have_the_same_shape() -> None:
    config = preset("laneformer-2b")
    plans = plans_of(config, MI300X, 304, (0, 1, 2, 3))
    assert plans["on"].placement.pattern == (0, 1, 2, 3) and not plans["off"].placement.interleaved
    assert {(plan.num_devices, plan.num_blocks) for plan in plans.values()} == {(4, 76)}
    assert plans["on"].placement.roles == plans["off"].placement.roles
    assert plans_of(config, MI300X, 304, None)["on"].placement.pattern == MI300X.granule_sides


def test_rates_and_speeds_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(Context(tmp_path, NODE, "toy"), monkeypatch, {True: 4.8e3, False: 4.2e3})
    figures = {figure.name: figure for figure in found.figures}
    assert figures["stream, tapes on their own sides"].verdict == "as assumed"
    assert figures["stream, tapes anywhere"].verdict == "as assumed"
    gain = figures["stream, gain of placement"]
    assert gain.value == pytest.approx(48 / 42) and gain.verdict == "as assumed"
    assert figures["tiny-laneformer, tapes anywhere"].value == pytest.approx(42e3)
    assert figures["tiny-laneformer, gain of placement"].value == pytest.approx(48 / 42)
    assert found.details["stream_gb_per_s"] == {"on": [4.8e3], "off": [4.2e3]}
    assert found.remarks == [
        "tapes on their own sides lie by the usual pattern: no map of pages was measured",
        "no tapes follow exchanged dies: pages tell nothing",
    ]
    assert not any("follow" in name for name in figures)

    found = run(Context(tmp_path, NODE, "toy"), monkeypatch, {True: 4.2e3, False: 4.2e3})
    figures = {figure.name: figure for figure in found.figures}
    assert figures["stream, gain of placement"].verdict == "worse"


def test_tapes_that_follow_exchanged_dies_are_compared_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(Context(tmp_path, NODE, "toy"), monkeypatch, {True: 4.2e3, False: 4.2e3}, following=4.8e3)
    figures = {figure.name: figure for figure in found.figures}
    assert figures["stream, tapes that follow exchanged dies"].verdict == "as assumed"
    gain = figures["stream, gain of following exchanged dies"]
    assert gain.value == pytest.approx(48 / 42) and gain.verdict == "as assumed"
    assert figures["tiny-laneformer, gain of following exchanged dies"].value == pytest.approx(48 / 42)
    assert figures["stream, gain of placement"].verdict == "worse"
    assert found.details["stream_gb_per_s"] == {"on": [4.2e3], "off": [4.2e3], "following": [4.8e3]}
    assert found.remarks[-1] == "the head's do not"


def test_the_order_of_dies_comes_before_a_long_pattern(tmp_path: Path) -> None:
    sides = [0, 0, 1, 1, 2, 2, 3, 3]
    found = measured_pattern(pages_found(tmp_path, pattern=[3, 2, 1, 0] * 256, order=[2, 3, 0, 1], die_of_xcd=sides))
    assert found == Pattern((2, 3, 0, 1), "the measured map of pages")


def test_a_map_that_plans_cannot_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = pages_found(tmp_path, pattern=[0] * 99 + [1, 2, 3], die_of_xcd=[0, 0, 1, 1, 2, 2, 3, 3])
    found = run(context, monkeypatch, {True: 4.8e3, False: 4.2e3})
    assert found.remarks[1].startswith(
        "plans cannot use it, and take the usual pattern: with a pattern of 102 granules"
    )
    assert found.details["pattern"] == MI300X.granule_sides


def test_rates_are_kept_where_decoding_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(Context(tmp_path, NODE, "toy"), monkeypatch, {True: 4.8e3, False: 4.2e3}, decodes=False)
    names = {figure.name: figure.verdict for figure in found.figures}
    assert names["both decode"] == "differs" and "stream, gain of placement" in names
    assert found.remarks[-1] == "decoding failed: a hand-off was lost"
