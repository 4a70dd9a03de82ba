"""The script that measures the way to the first token: two processes, whose parts add up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench_startup.py"


def test_cold_and_warm() -> None:
    command = [sys.executable, str(SCRIPT), "--model", "tiny-laneformer", "--context", "32"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["caches"] for row in rows] == ["cold", "warm"]
    for row in rows:
        parts = [row[f"{name}_s"] for name in ("import", "open", "pack", "compile", "launch")]
        assert min(parts) >= 0 and row["weights_bytes"] > 0
        assert row["total_s"] == pytest.approx(sum(parts), abs=0.01)


def test_a_process_that_is_late_is_ended() -> None:
    command = [sys.executable, str(SCRIPT), "--model", "tiny-laneformer", "--context", "32", "--deadline", "0.2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert all("raise --deadline" in json.loads(line)["failed"] for line in done.stdout.splitlines())
