"""``jax-mono plan``: by preset, by checkpoint, as a picture."""

from __future__ import annotations

from pathlib import Path

import pytest

from jax_mono import make_plan
from jax_mono.draw import plan_text
from jax_mono.models.presets import preset


def test_preset(run) -> None:
    ran = run("plan", "laneformer-2b", "--devices", "4", "--blocks", "2")
    expected = plan_text(make_plan(preset("laneformer-2b"), devices=4, blocks=2))
    assert (ran.code, ran.out.rstrip("\n"), ran.err) == (0, expected.rstrip("\n"), "")


def test_picture(run, tmp_path: Path) -> None:
    ran = run("plan", "tiny-laneformer", "--blocks", "2", "--out", tmp_path / "plan.svg")
    assert (ran.code, ran.err) == (0, f"jax-mono: wrote {tmp_path / 'plan.svg'}\n")
    assert "<svg" in (tmp_path / "plan.svg").read_text()


def test_checkpoint_without_weights(run, chat_model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((chat_model / "config.json").read_bytes())
    assert run("plan", tmp_path, "--blocks", "2").out == run("plan", chat_model, "--blocks", "2").out != ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lanformer-2b"], "did you mean laneformer-2b"),
        (["/nowhere/at/all"], "neither a file or directory"),
        (["laneformer-2b", "--devices", "3"], "use one of [1, 2, 4, 8]"),
        (["tiny", "--blocks", "9"], "at most 8"),
    ],
)
def test_bad_input(run, arguments: list[str], message: str) -> None:
    ran = run("plan", *arguments)
    assert (ran.code, ran.out) == (2, "") and message in ran.err
