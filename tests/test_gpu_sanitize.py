"""The script that runs compute-sanitizer judges rightly; the tool is made up."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from sm_90a_listing import disassemble, find_disassembler, instructions

from jax_mono import native

SCRIPT = Path(__file__).parents[1] / "scripts" / "gpu_sanitize.py"
CLEAN = "tokens [1]\n========= ERROR SUMMARY: 0 errors\n"

RING = (
    "========= Error: Race reported between Write access at mono_decode+0x10\n"
    "=========     and Read access at $mono_decode$_ZN4mono14multiply_tiles+0x20 [32 hazards]\n"
)
LISTING = """\
.text.mono_stream:
        /*0030*/                   @UP0 UBLKCP.S.G [UR12], [UR10], UR6, desc[UR14] ;
\t.section\t.text.mono_decode,"ax",@progbits
.text.mono_decode:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   @UP0 UBLKCP.S.G [UR12], [UR10], UR6, desc[UR14] ;
        /*1cca0*/                   UBLKCP.S.G [UR12], [UR10], UR6 ;
        /*1ccb0*/                   STS [R2], R3 ;
.text.other:
        /*0040*/                   UBLKCP.S.G [UR12], [UR10], UR6 ;
"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_sanitize", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_sanitize"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("tool", "status", "log", "ok", "words"),
    [
        ("memcheck", 0, CLEAN, True, "0 errors"),
        (
            "memcheck",
            86,
            "tokens [1]\n========= Invalid __global__ read\n========= ERROR SUMMARY: 2 errors",
            False,
            "Inv",
        ),
        ("memcheck", 0, "Error: no such option", False, "no summary (exit status 0): Error: no such option"),
        ("memcheck", 0, "tokens [2]\n========= ERROR SUMMARY: 0 errors", False, "tokens [2], not [1]"),
        ("memcheck", 1, "boom\n========= ERROR SUMMARY: 0 errors", False, "did not come to its end (exit status 1)"),
        ("memcheck", 9, CLEAN, False, "exit status 9"),
        (
            "racecheck",
            0,
            "tokens [1]\n========= RACECHECK SUMMARY: 2 hazards displayed (0 errors, 2 warnings)",
            True,
            "0 errors, 2 warnings",
        ),
        (
            "racecheck",
            86,
            "tokens [1]\n========= Error: Race reported between Write access\n"
            "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)",
            False,
            "Race reported",
        ),
        (
            "racecheck",
            86,
            f"tokens [1]\n{RING}========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)",
            True,
            "1 on",
        ),
        (
            "racecheck",
            86,
            f"tokens [1]\n{RING}========= \n{RING}=========     and Read access at mono_decode+0x30 [1 hazards]\n"
            "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)",
            True,
            "0 errors, 0 warnings (2 on the ring of weights)",
        ),
        (
            "racecheck",
            86,
            f"tokens [1]\n{RING}========= \n========= Error: Race reported between Write access at mono_decode+0x50\n"
            "=========     and Read access at mono_decode+0x30 [1 hazards]\n"
            "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)",
            False,
            "1 errors, 0 warnings (1 on the ring of weights); first: Race reported between Write access at mono_decode",
        ),
        (
            "racecheck",
            86,
            f"tokens [1]\n{RING}========= \n========= Error: Race reported between Read access at mix_rows+0x10\n"
            "=========     and Write access at mix_rows+0x20 [8 hazards]\n"
            "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)",
            False,
            "first: Race reported between Read access at mix_rows+0x10 and Write access at mix_rows+0x20",
        ),
    ],
)
def test_verdicts(script: ModuleType, tool: str, status: int, log: str, ok: bool, words: str) -> None:
    copies = script.bulk_copies(instructions(LISTING))
    assert copies == {"mono_decode+0x10", "mono_decode+0x1cca0"}
    found, why = script.judge(tool, status, log, script.tokens_in(log), "[1]", copies)
    assert found == ok and words in why


def test_the_listing_of_a_program(script: ModuleType, tmp_path: Path) -> None:
    """The real program's, as it lies in a cache: it copies for the layers and for the head."""
    if native.gpu_report("cuda").compiler_error:
        pytest.skip("needs NVRTC")
    if not (tool := find_disassembler()):
        pytest.skip("needs nvdisasm")
    code = (
        "from tiny import tiny; from jax_mono import native; from jax_mono.plan import GPU, make_plan\n"
        "from jax_mono.record import plan_record\n"
        "record = plan_record(make_plan(tiny('llama'), blocks=2, target=GPU))\n"
        "native.compile_program('cuda', record, 1, architecture='sm_90a', shared_memory=227 << 10)\n"
    )
    environment = {**os.environ, "JAX_MONO_CACHE": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert len(script.bulk_copies(disassemble(tool, script.program_in(tmp_path)))) == 2


def run(*arguments: str, path: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], env={**os.environ, "PATH": path}, capture_output=True, text=True
    )


def test_help_teaches(tmp_path: Path) -> None:
    process = run("--help", path=str(tmp_path))
    assert process.returncode == 0
    for words in ("memcheck", "racecheck", "PYTHONPATH=. python scripts/gpu_sanitize.py", "Exit status"):
        assert words in process.stdout


def test_without_the_tool(script: ModuleType, tmp_path: Path) -> None:
    process = run("--sanitizer", str(tmp_path / "nothing"), path=str(tmp_path))
    assert process.returncode == 2 and "is no program; give --sanitizer" in process.stderr
    if not list(Path("/usr/local").glob("cuda*/*/compute-sanitizer")):
        process = run(path=str(tmp_path))
        assert process.returncode == 2
        assert "compute-sanitizer is neither in PATH nor in /usr/local/cuda*/bin; install" in process.stderr


def test_options_of_the_tool(script: ModuleType) -> None:
    command = script.sanitizer_command(Path("/x/compute-sanitizer"), "racecheck", ["python", "child"])
    assert command[0] == "/x/compute-sanitizer" and command[-2:] == ["python", "child"]
    assert command[command.index("--tool") + 1] == "racecheck"
    assert "kns=mono_decode" in command
