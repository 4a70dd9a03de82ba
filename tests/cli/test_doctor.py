"""``jax-mono doctor``: says that all is well here, and what is not when something is broken."""

from __future__ import annotations

import re
from dataclasses import replace

import jax
import pytest

from jax_mono import gpus, native, settings
from jax_mono.cli import doctor, machine, verdict
from jax_mono.native import NativeError


def test_all_is_well(run) -> None:
    ran = run("doctor")
    assert (ran.code, ran.err) == (0, "")
    assert f"+ CPU: decoding works, and is what JAX uses here: {native.cpu_variant()}" in ran.out
    for words in (jax.__version__, native.cpu_variant(), "+ cpu: kernel and Flax differ by"):
        assert words in ran.out
    for name in re.findall(r"JAX_MONO_\w+", settings.__doc__ or ""):
        assert name in ran.out


def test_json(run) -> None:
    ran = run("doctor", "--json")
    assert ran.code == 0 and ran.record["works"] is True
    sections = {finding["section"] for finding in ran.record["findings"]}
    looked_at = {"software", "machine", "environment", "native library", "jax", "extras", "self-test"}
    assert sections == looked_at | {"NVIDIA GPUs", "AMD GPUs"}
    platforms = {found["platform"]: found for found in ran.record["platforms"]}
    assert list(platforms) == ["cpu", "cuda", "rocm"]
    assert platforms["cpu"]["works"] and platforms["cpu"]["used"] and not platforms["cpu"]["remedy"]


HOPPER = native.Gpu("NVIDIA H100 80GB HBM3", "sm_90a", 132, 232448)
AMPERE = native.Gpu("NVIDIA A100-SXM4-40GB", "sm_80", 108, 166912)
REPORT = native.GpuReport([HOPPER, AMPERE], "", "NVRTC 13.0", "", "/nowhere/cache")
NO_DRIVER = "no CUDA driver (libcuda.so.1: cannot open shared object file: No such file or directory); install it"


@pytest.mark.parametrize(
    ("report", "platforms", "words", "remedy"),
    [
        ({"gpus": [], "driver_error": NO_DRIVER}, "", "no CUDA driver (libcuda.so.1)", "install it"),
        ({"gpus": []}, "", "the driver shows no GPU", "look at CUDA_VISIBLE_DEVICES"),
        ({"gpus": [AMPERE]}, "", "is sm_80, and this library has programs for", "set JAX_PLATFORMS=cpu to"),
        ({"compiler_error": "no NVRTC (a.so: x; b.so: y); pip install it"}, "", "no NVRTC (a.so: x", "pip install it"),
        ({}, "cpu", "JAX_PLATFORMS=cpu leaves it out", "unset JAX_PLATFORMS"),
        ({}, "cuda,cpu", "JAX has no devices there", "pip install -U 'jax[cuda13]'"),
    ],
    ids=["driver", "none", "old", "compiler", "left-out", "plugin"],
)
def test_why_a_gpu_is_not_used(run, monkeypatch, report: dict, platforms: str, words: str, remedy: str) -> None:
    others = native.GpuReport([], "no HIP runtime (x.so: y); install ROCm", "", "no hipRTC (z.so); install ROCm's", "")
    reports = {"cuda": replace(REPORT, **report), "rocm": others}
    monkeypatch.setattr(native, "gpu_report", reports.get)
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    ran = run("doctor", "--json")
    assert ran.code == 0  # JAX uses the CPU
    found = ran.record["platforms"][1]
    assert not found["works"] and not found["used"]
    assert words in found["text"] and found["remedy"].startswith(remedy)


def test_gpus_are_described(run, monkeypatch) -> None:
    monkeypatch.setattr(native, "gpu_report", lambda platform: REPORT)
    ran = run("doctor")
    hopper = (
        "GPU 0: NVIDIA H100 80GB HBM3, sm_90a, 132 multiprocessors, 227 KiB of shared memory per block: has a program"
    )
    assert f"+ {hopper}" in ran.out
    assert "- GPU 1: NVIDIA A100-SXM4-40GB, sm_80, 108 multiprocessors" in ran.out
    assert "+ compiler: NVRTC 13.0" in ran.out and "/nowhere/cache" in ran.out


def test_a_gpu_that_jax_uses_and_that_has_no_program(run, monkeypatch) -> None:
    """Decoding would not work here, though nothing is broken."""
    cpu = jax.devices("cpu")[0]
    monkeypatch.setattr(native, "gpu_report", lambda platform: replace(REPORT, gpus=[AMPERE]))
    monkeypatch.setattr(gpus, "gpu_of", lambda device: AMPERE)
    for module in (doctor, verdict):
        monkeypatch.setattr(module, "jax_devices", lambda platform: [cpu] if platform == "cuda" else [])
    ran = run("doctor")
    assert ran.code == 1
    assert "! NVIDIA GPUs: decoding does not work, and is what JAX uses here: NVIDIA A100-SXM4-40GB is sm_80" in ran.out


def test_a_self_test_that_fails(run, monkeypatch) -> None:
    monkeypatch.setattr(doctor, "_CPU_TOLERANCE", -1.0)
    ran = run("doctor")
    assert ran.code == 1
    assert "! cpu: logits differ by" in ran.out and "! CPU: decoding does not work" in ran.out


def test_a_library_that_does_not_load(run, monkeypatch) -> None:
    def fail() -> None:
        raise NativeError("libjax_mono.so does not exist; install the package")

    monkeypatch.setattr(native, "library", fail)
    ran = run("doctor")
    assert ran.code == 1 and "! library: libjax_mono.so does not exist" in ran.out


def test_settings_that_make_no_sense(run, monkeypatch) -> None:
    monkeypatch.setenv("JAX_MONO_WAIT_LIMIT_MS", "soon")
    ran = run("doctor")
    assert ran.code == 1 and "JAX_MONO_WAIT_LIMIT_MS is 'soon'" in ran.out


def test_what_is_missing_comes_with_a_remedy(run, monkeypatch) -> None:
    monkeypatch.setitem(doctor._EXTRAS, "plot", ("no_such_module",))
    monkeypatch.setattr(machine, "huge_pages", lambda: "never")
    monkeypatch.setattr(doctor, "_requirements", lambda: {"jax": [(">=", "99.0")], "python": [(">=", "3.11")]})
    ran = run("doctor")
    assert ran.code == 1
    assert "pip install 'jax-mono[plot]'" in ran.out
    assert "tee /sys/kernel/mm/transparent_hugepage/enabled" in ran.out
    assert f"! jax: {jax.__version__} (needs >=99.0)" in ran.out


def test_comparing_versions() -> None:
    assert doctor._bounds(">=3.11,<3.14") == [(">=", "3.11"), ("<", "3.14")]
    assert doctor._holds("3.13.2", "<", "3.14") and not doctor._holds("3.14.0rc1", "<", "3.14")
    assert doctor._holds("0.10.2", ">=", "0.10.2") and not doctor._holds("0.9.2", ">=", "0.10.2")
