"""``jax-mono plan``: by preset, by checkpoint, as a picture."""

from __future__ import annotations

from pathlib import Path

import pytest

from jax_mono import make_plan, native
from jax_mono.draw import plan_text
from jax_mono.models.presets import preset
from jax_mono.plan import GPU
from jax_mono.topology import MI300X


def test_preset(run) -> None:
    ran = run("plan", "laneformer-2b", "--devices", "4", "--blocks", "2")
    expected = plan_text(make_plan(preset("laneformer-2b"), devices=4, blocks=2))
    assert (ran.code, ran.out.rstrip("\n"), ran.err) == (0, expected.rstrip("\n"), "")


def test_the_model_that_ships(run) -> None:
    ran = run("plan", "mini-coder", "--blocks", "2")
    assert (ran.code, ran.err) == (0, "") and "Laneformer, 23.7 million parameters" in ran.out


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
        (["tiny", "--topology", "mi999"], "there is no topology 'mi999', only mi300x, "),
        (["tiny", "--topology", "mi300x", "--target", "cpu"], "a plan for CPUs has no dies"),
    ],
)
def test_bad_input(run, arguments: list[str], message: str) -> None:
    ran = run("plan", *arguments)
    assert (ran.code, ran.out) == (2, "") and message in ran.err


def test_for_a_gpu_that_is_not_here(run) -> None:
    ran = run("plan", "laneformer-2b", "--target", "gpu", "--blocks", "132")
    plan = make_plan(preset("laneformer-2b"), blocks=132, target=GPU)
    assert (ran.code, ran.out.rstrip("\n"), ran.err) == (0, plan_text(plan).rstrip("\n"), "")
    assert "words of 16 bytes" in ran.out
    assert "words of 8 bytes" in run("plan", "laneformer-2b", "--target", "cpu", "--blocks", "2").out


def test_for_a_gpu_of_several_dies(run) -> None:
    ran = run("plan", "laneformer-2b", "--topology", "mi300x", "--devices", "8")
    plan = make_plan(preset("laneformer-2b"), devices=8, blocks=304, target=GPU, topology=MI300X)
    assert (ran.code, ran.out.rstrip("\n"), ran.err) == (0, plan_text(plan).rstrip("\n"), "")
    assert "8 of 38 blocks on 4 sides" in ran.out


def test_blocks_of_a_gpu_by_default(run, monkeypatch) -> None:
    def report(platform: str, *gpus: native.Gpu) -> native.GpuReport:
        found = list(gpus) if platform == "rocm" else []
        return native.GpuReport(found, "", "", "", "")

    gpu = native.Gpu("a GPU", "gfx942", 304, 1 << 16)
    monkeypatch.setattr(native, "gpu_report", lambda platform: report(platform, gpu))
    assert "2 devices × 152 blocks" in run("plan", "laneformer-2b", "--target", "gpu", "--devices", "2").out
    assert "1 device × 8 blocks" in run("plan", "tiny", "--target", "gpu").out  # it has work for no more
    monkeypatch.setattr(native, "gpu_report", report)
    ran = run("plan", "laneformer-2b", "--target", "gpu")
    assert (ran.code, ran.out) == (2, "") and "there is no GPU here whose multiprocessors could be counted" in ran.err
