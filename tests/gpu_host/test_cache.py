"""Compiled programs are kept on disk, and nothing that happens there does harm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("one_call.py")


def start(library: Path, settings: dict[str, str], **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(library)],
        env={**os.environ, **settings, **more},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(process: subprocess.Popen[str], go: str = "") -> dict[str, object]:
    out, error = process.communicate(go, timeout=120)
    assert process.returncode == 0, error
    return json.loads(out.splitlines()[-1])


WORKED = {"status": [1, 0], "error": ""}


def test_a_program_is_compiled_once_and_damage_is_noticed(
    library: Path, settings: dict[str, str], tmp_path: Path
) -> None:
    here = settings | {"JAX_MONO_CACHE": str(tmp_path / "new" / "cache")}

    def run() -> dict[str, object]:
        return outcome(start(library, here))

    assert run() == WORKED | {"compiled": 1}
    (file,) = (tmp_path / "new" / "cache").iterdir()
    whole = file.read_bytes()
    assert run() == WORKED | {"compiled": 0}

    for damaged in (whole[:-1], whole[:100], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        file.write_bytes(damaged)
        assert run() == WORKED | {"compiled": 1}
        assert file.read_bytes() == whole
    assert list(file.parent.iterdir()) == [file]


def test_processes_that_start_together(library: Path, settings: dict[str, str], tmp_path: Path) -> None:
    here = settings | {"JAX_MONO_CACHE": str(tmp_path)}
    processes = [start(library, here, WAIT="1") for _ in range(3)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        found = outcome(process)
        assert found["status"] == [1, 0], found
    assert [file.suffix for file in tmp_path.iterdir()] == [".program"]


@pytest.mark.parametrize("where", ["file", "proc"])
def test_a_cache_that_cannot_be_written_costs_only_the_cache(
    library: Path, settings: dict[str, str], tmp_path: Path, where: str
) -> None:
    (tmp_path / "file").write_text("")
    cache = tmp_path / "file" / "cache" if where == "file" else Path("/proc/jax_mono")
    assert outcome(start(library, settings | {"JAX_MONO_CACHE": str(cache)})) == WORKED | {"compiled": 1}
