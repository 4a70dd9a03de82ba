"""The kit writes its report whatever happens to the steps, and the steps run on this machine's CPU."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from bringup import odd_steps

from jax_mono.bringup import kit
from jax_mono.bringup.machine import Machine, closest_topology, environment
from jax_mono.bringup.report import is_clean
from jax_mono.bringup.step import Outcome
from jax_mono.bringup.steps import summary
from jax_mono.cli import main


@pytest.fixture(autouse=True)
def children_find_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    tests = str(Path(__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (tests, os.environ.get("PYTHONPATH")))))


def by_step(outcomes: list[Outcome]) -> dict[str, Outcome]:
    return {outcome.step: outcome for outcome in outcomes}


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_no_step_loses_the_report(tmp_path: Path) -> None:
    started = time.monotonic()
    outcomes = by_step(kit.bring_up(tmp_path, dry=True, known=odd_steps.STEPS))
    assert time.monotonic() - started < 30
    assert {name: outcome.status for name, outcome in outcomes.items()} == {
        "hangs": "hung",
        "fine": "done",
        "wrong": "done",
        "raises": "failed",
        "dies": "failed",
        "elsewhere": "does not apply",
    }
    assert "waiting for a word that never comes" in outcomes["hangs"].reason
    assert not is_running(int((tmp_path / "child").read_text()))
    assert outcomes["raises"].reason == "RuntimeError: no | words"
    assert outcomes["dies"].reason == "exit code 42; its log ends with: illegal address"
    assert outcomes["elsewhere"].reason == "needs a GPU"
    assert not is_clean(list(outcomes.values()))

    record = json.loads((tmp_path / "report.json").read_text())
    assert [step["step"] for step in record["steps"]] == [step.name for step in odd_steps.STEPS]
    assert record["clean"] is False and record["environment"]["versions"]["jax"]
    verdicts = {f["name"]: f["verdict"] for step in record["steps"] for f in step["findings"]["figures"]}
    assert verdicts == {"latency": "as assumed", "slow": "worse", "fast": "better", "broken": "differs"}
    page = (tmp_path / "report.md").read_text()
    assert "3 steps ended badly, 2 figures are not as assumed" in page
    assert "| wrong | slow | 100 GB/s | 80 GB/s | **worse** |" in page
    assert "| fine | latency | 100 ns (a table) | 101 ns | as assumed |" in page
    assert "no \\| words" in page and "![fine-times](fine-times.svg)" in page
    assert (tmp_path / "fine-times.svg").stat().st_size > 1000 and (tmp_path / "fine-curve.svg").is_file()


def test_steps_can_be_chosen_and_resumed(tmp_path: Path) -> None:
    few = (odd_steps.Fine(), odd_steps.Dies(), odd_steps.Raises())
    first = by_step(kit.bring_up(tmp_path, dry=True, known=few, only=["fine"]))
    assert {name: outcome.status for name, outcome in first.items()} == {
        "fine": "done",
        "dies": "not run",
        "raises": "not run",
    }
    second = by_step(kit.bring_up(tmp_path, dry=True, known=few, resume=True, skip=["raises"]))
    assert (second["fine"].status, second["dies"].status, second["raises"].status) == ("done", "failed", "not run")
    assert (tmp_path / "runs").read_text() == "x"  # once
    kit.bring_up(tmp_path, dry=True, known=few, only=["fine"])
    assert (tmp_path / "runs").read_text() == "xx"
    with pytest.raises(ValueError, match="there is no step 'flags'; there are fine, dies, raises"):
        kit.bring_up(tmp_path, dry=True, known=few, only=["flags"])


def test_the_time_for_all_steps_is_kept(tmp_path: Path) -> None:
    started = time.monotonic()
    outcomes = by_step(kit.bring_up(tmp_path, dry=True, known=(odd_steps.Hangs(), odd_steps.Fine()), seconds=1.0))
    assert time.monotonic() - started < 20
    assert (outcomes["hangs"].status, outcomes["fine"].status) == ("hung", "not run")


def test_a_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything that a CPU can do, truly done; the rest says what it needs."""
    code = main(["bringup", "--dry-run", "--out", str(tmp_path), "--quiet"])
    printed = capsys.readouterr()
    record = json.loads((tmp_path / "report.json").read_text())
    steps = {step["step"]: step for step in record["steps"]}
    assert list(steps) == [step.name for step in kit.STEPS], "the report is not complete"
    assert code == 0, printed.out
    figures = {f["name"]: f for step in steps.values() for f in step["findings"]["figures"]}
    for name, step in steps.items():
        if step["status"] == "does not apply":
            assert "needs" in step["reason"], name
        else:
            assert step["status"] == "done", step
            assert step["findings"]["figures"], name
    for name in ("doctor", "stream", "parity", "bench", "faults"):
        assert steps[name]["status"] == "done"
    assert figures["tests passed"]["value"] >= 1 and figures["tests failed"]["value"] == 0
    assert figures["lost hand-offs that were named"]["value"] >= 3
    assert figures["tapes, bytes per second"]["value"] > 0.1
    assert f"report: {tmp_path}/report.md" in printed.out


def test_the_command_names_its_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bringup", "--list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == [
        "doctor",
        "flags",
        "peers",
        "pollers",
        "pages",
        "stream",
        "faults",
        "bench",
        "placement",
        "parity",
    ]
    assert main(["bringup", "--dry-run", "--out", str(tmp_path), "--only", "doctor,flag"]) == 2
    assert "there is no step 'flag'; there are doctor, flags" in capsys.readouterr().err


def test_machines_find_their_topology() -> None:
    assert closest_topology("gfx942", "AMD Instinct MI300X") == "mi300x"
    assert closest_topology("gfx942", "AMD Instinct MI325X OAM") == "mi325x"
    assert closest_topology("gfx942", "AMD Radeon Graphics") == "mi300x"
    assert closest_topology("sm_90a", "NVIDIA H200") == "h200"
    assert closest_topology("sm_90a", "NVIDIA H100 80GB HBM3") == "h100"
    assert closest_topology("sm_80", "NVIDIA A100") == "host"
    assert Machine("cpu").described.units == 2


def test_secrets_stay_out_of_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_MONO_API_KEY", "hunter2")
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "0")
    found = environment()
    assert found["variables"]["HIP_VISIBLE_DEVICES"] == "0" and "hunter2" not in json.dumps(found)


def test_summaries_of_pytest() -> None:
    assert summary("FAILED x\n1 failed, 170 passed, 17 skipped in 12.3s\n") == {
        "failed": 1,
        "passed": 170,
        "skipped": 17,
    }
    assert summary("no tests ran in 0.01s") == {}
    assert summary("2 passed, 1 error in 3.0s (0:00:03)") == {"passed": 2, "error": 1}
