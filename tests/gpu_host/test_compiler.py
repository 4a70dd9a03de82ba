"""Programs compile for NVIDIA GPUs with the real compiler, where it is installed; it needs no GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import tiny

from jax_mono import native
from jax_mono.models import preset
from jax_mono.plan import GPU, make_plan
from jax_mono.record import plan_record

PROGRAM = """\
#include "kernel/call.h"
#include "shape.h"
extern "C" __global__ void mono_decode(const mono::Call* calls) { calls->outputs.status[0] = helper(); }
"""


@pytest.fixture(scope="module", autouse=True)
def nvrtc() -> None:
    report = native.gpu_report("cuda")
    if report.compiler_error:
        pytest.skip(report.compiler_error)


def compile_entry(monkeypatch: pytest.MonkeyPatch, directory: Path, text: str) -> bytes:
    """Compiles the library's sources with another entry."""
    for name, source in native.kernel_sources().items() | {("kernel/entry/sm_90a.h", text)}:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(source)
    (directory / "kernel/entry/sm_90a.h").write_text(text)
    monkeypatch.setenv("JAX_MONO_KERNELS", str(directory))
    record = plan_record(make_plan(tiny("llama"), target=GPU))
    return native.compile_program("cuda", record, 1, architecture="sm_90a", shared_memory=227 << 10)


def test_headers_find_each_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    helper = "namespace { int helper() { return 7; } }\n"  # code is for the device unless it says otherwise
    code = compile_entry(monkeypatch, tmp_path, helper + PROGRAM)
    assert code.startswith(b"\x7fELF")
    assert b"mono_decode" in code


def test_the_log_says_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(
        native.NativeError, match=r"NVRTC .* could not compile mono_sm_90a with --gpu-architecture=sm_90a"
    ):
        compile_entry(monkeypatch, tmp_path, PROGRAM)
    with pytest.raises(
        native.NativeError, match=r'kernel/entry/sm_90a.h\(3\): error: identifier "helper" is undefined'
    ):
        compile_entry(monkeypatch, tmp_path, PROGRAM)


@pytest.mark.parametrize(
    ("name", "devices", "weights"),
    [("laneformer-2b", 1, 1), ("laneformer-2b", 8, 2), ("qwen3-1.7b", 1, 1), ("qwen2.5-coder-1.5b", 2, 1)],
)
def test_the_program_of_a_real_model(name: str, devices: int, weights: int) -> None:
    """On as many GPUs, with 132 multiprocessors each; weights are bfloat16 (1) or float16 (2)."""
    plan = make_plan(preset(name), devices=devices, blocks=132, target=GPU)
    code = native.compile_program("cuda", plan_record(plan), weights, architecture="sm_90a", shared_memory=227 << 10)
    assert b"mono_decode" in code and b"mono_stream" in code
