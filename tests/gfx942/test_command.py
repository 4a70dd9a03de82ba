"""``python -m jax_mono.gfx942`` and its errors."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

from jax_mono import native
from jax_mono.gfx942.__main__ import main
from jax_mono.gfx942.listing import kernels
from jax_mono.gfx942.toolchain import CompilerError, assembly, ziglang
from jax_mono.models import preset
from jax_mono.plan import GPU, make_plan

needs_ziglang = pytest.mark.skipif(
    importlib.util.find_spec("ziglang") is None, reason="no compiler for gfx942: pip install ziglang"
)
MODEL = ["--model", "smollm2-135m", "--devices", "1"]


@needs_ziglang
def test_a_code_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "program.hsaco"
    assert main([*MODEL, "--blocks", "9", "--out", str(out)]) == 0
    code = out.read_bytes()
    machine, flags = int.from_bytes(code[18:20], "little"), int.from_bytes(code[48:52], "little")
    assert (code[:4], machine, flags & 0xFF) == (b"\x7fELF", 0xE0, 0x4C), "an ELF file for AMDGPU, of which gfx942"
    assert b"mono_decode.kd" in code and b"mono_stream.kd" in code
    said = capsys.readouterr().err
    assert "mono_decode: " in said and " 0 of scratch" in said


@needs_ziglang
def test_a_listing(tmp_path: Path) -> None:
    out = tmp_path / "program.s"
    assert main([*MODEL, "--dtype", "float16", "--listing", "--out", str(out)]) == 0
    assert kernels(out.read_text()).keys() == {"mono_decode", "mono_stream"}


@needs_ziglang
def test_what_the_compiler_says_is_passed_on() -> None:
    plan = make_plan(preset("smollm2-135m"), blocks=9, target=GPU)
    sources = native.kernel_sources() | {"kernel/entry/gfx942.h": "nonsense\n"}
    with pytest.raises(CompilerError, match=r"gfx942\.h:1:1: error: unknown type name 'nonsense'"):
        assembly(plan, "bfloat16", ziglang(), sources=sources)


@needs_ziglang
def test_sources_that_a_setting_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = tmp_path / "kernel/entry/gfx942.h"
    entry.parent.mkdir(parents=True)
    entry.write_text("#error these\n")
    monkeypatch.setenv("JAX_MONO_KERNELS", str(tmp_path))
    assert main([*MODEL, "--blocks", "9", "--out", str(tmp_path / "x")]) == 1
    assert "error: these" in capsys.readouterr().err


def test_no_ziglang(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "ziglang", None)
    assert main([*MODEL, "--out", str(tmp_path / "x")]) == 2
    assert "'ziglang' is not installed; run: pip install 'jax-mono[test]'" in capsys.readouterr().err


def test_no_such_clang(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert main([*MODEL, "--compiler", "clang-19", "--out", str(tmp_path / "x")]) == 1
    assert "no clang-19 on the PATH; run apt-get install clang-19" in capsys.readouterr().err


@needs_ziglang
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--model", "laneformer-2b", "--devices", "3"], 2, "8 lanes do not divide over 3 devices"),
        (["--model", "llama"], 2, "there is no preset 'llama'"),
        (["--model", "qwen2.5-coder-7b", "--devices", "1", "--blocks", "16"], 1, "spread it over more devices"),
    ],
)
def test_plans_that_do_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    assert main([*arguments, "--out", str(tmp_path / "x")]) == code
    assert message in capsys.readouterr().err
