"""The resident program under ThreadSanitizer: no data race on any path."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "sanitize.py"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_no_block_races_with_another(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    process = subprocess.run(
        [sys.executable, str(SCRIPT), "--sanitizer", "thread", "--json", str(report)],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert len(json.loads(report.read_text())["cases"]) > 50


def test_mutants_have_something_to_break(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fault that --mutants puts into the sources replaces a text that stands there once."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    script = importlib.import_module("sanitize")
    for faults in script.MUTANTS.values():
        for path, right, _ in faults.values():
            assert (script.ROOT / path).read_text().count(right) == 1, f"{path} does not say {right!r} once"
