"""The ROCm side of the host code runs the program of an NVIDIA GPU, and gives what the CUDA side gives.

A library that has HIP's functions stands in for ROCm and forwards them to CUDA's driver and NVRTC
(``ffi/test/stand_in_hip_cuda.cc``). So the ROCm side of driver, allocation, compiling, loading, launching, peers and
sessions runs for real; what an AMD GPU itself would do differently does not show. ``JAX_MONO_TEST_STAND_IN`` names such
a library; without it, it is built, which takes g++.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from gpu import rehearsal, rocm_process
from gpu.rocm_process import CASES, outcomes
from gpu_host import stand_in

from jax_mono import gpus, native
from jax_mono.packing import home

SECONDS = 240


def nvrtc() -> str:
    """Where NVRTC is, if Python packages brought it."""
    for directory in native._compiler_directories():
        for path in sorted(Path(directory).glob("libnvrtc.so.*")):
            return str(path)
    return ""


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of the process that takes the stand-in for ROCm."""
    directory = tmp_path_factory.mktemp("rocm")
    if rehearsal.KIND:  # with the stand-in that needs no GPU
        library = stand_in.build(directory)
        changes = stand_in.environment(library, directory)
        if rehearsal.KIND == "cpu":
            changes["STAND_IN_WEIGHTS"] = "bfloat16"
        else:
            changes["JAX_MONO_KERNELS"] = os.environ["JAX_MONO_KERNELS"]
    else:
        if native.gpu_platform() != "cuda":
            pytest.skip("needs an NVIDIA GPU")
        named = os.environ.get("JAX_MONO_TEST_STAND_IN")
        library = Path(named) if named else build(directory)
        changes = {
            "JAX_MONO_DRIVER": str(library),
            "JAX_MONO_COMPILER": str(library),
            "JAX_MONO_CACHE": str(directory / "cache"),
            "STAND_IN_NVRTC": nvrtc(),
            "STAND_IN_ARCHITECTURE": gpus.gpu_of(home()).architecture,
        }
    return {"LIBRARY": str(library), "FILE": str(directory / "outcomes.npz"), **changes}


def build(directory: Path) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("needs g++, or JAX_MONO_TEST_STAND_IN")
    library = directory / "stand_in.so"
    source = str(stand_in.ROOT / "ffi/test/stand_in_hip_cuda.cc")
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", source, "-ldl", "-o", str(library)]
    subprocess.run(command, check=True, timeout=120)
    return library


@pytest.fixture(scope="module")
def cases() -> list[str]:
    """Those that can run here."""
    names = list(CASES)
    if rehearsal.KIND == "cpu":
        names.remove("qwen3-float16")
    if len(jax.devices()) < 2:
        names.remove("laneformer-mesh")
    return names


@pytest.fixture(scope="module")
def by_rocm(settings: dict[str, str], cases: list[str]) -> dict[str, np.ndarray]:
    process = subprocess.run(
        [
            sys.executable,
            rocm_process.__file__,
            settings["LIBRARY"],
            settings["FILE"],
            rehearsal.target().name,
        ],
        env={**os.environ, **settings, "JAX_PLATFORMS": "cpu", "CASES": ",".join(cases)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    print(process.stdout)
    assert process.returncode == 0 and process.stdout.endswith("done\n"), process.stdout + process.stderr
    with np.load(settings["FILE"]) as file:
        return dict(file)


@pytest.mark.parametrize("name", CASES)
def test_everything_is_the_same_to_the_last_bit(by_rocm: dict[str, np.ndarray], cases: list[str], name: str) -> None:
    if name not in cases:
        pytest.skip("float16 weights run on GPUs only" if "float16" in name else "needs 2 GPUs")
    if rehearsal.KIND == "cpu" and native.cpu_variant() != "portable":
        pytest.skip("the stand-in runs the portable program; set JAX_MONO_CPU=portable to compare with it")
    expected = outcomes(rocm_process.decoder_of(name, rehearsal.target()))
    for what, value in expected.items():
        np.testing.assert_array_equal(by_rocm[f"{name}/{what}"], value, err_msg=what)


def test_a_lost_hand_off_is_named(by_rocm: dict[str, np.ndarray]) -> None:
    message = f"waited longer than {rocm_process.LIMIT_MS} ms for 'activations' in layer 1, epoch 1"
    assert message in str(by_rocm["fault"])
