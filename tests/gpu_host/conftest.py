"""The stand-in for ROCm, built once, and the custom call on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from gpu_host import stand_in
from jax._src.dispatch import runtime_tokens

from jax_mono import native


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stand_in.build(tmp_path_factory.mktemp("stand_in"))


@pytest.fixture(scope="session")
def settings(library: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment variables for the stand-in."""
    return stand_in.environment(library, tmp_path_factory.mktemp("settings"))


@pytest.fixture
def device(library: Path, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[stand_in.Device]:
    """The stand-in; every custom call goes to it, until the test ends."""
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    native.register()
    device = stand_in.Device(library)
    jax.clear_caches()  # of calls that were traced for the CPU
    monkeypatch.setattr(native, "_gpu", "rocm")
    monkeypatch.setattr(jax.ffi, "ffi_call", stand_in.fake_ffi_call(device))
    yield device
    jax.clear_caches()
    runtime_tokens.clear()  # calls that failed would fail once more at exit


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stand_in.fiber_kernels(tmp_path_factory.mktemp("fibers"))


@pytest.fixture
def fibers(device: stand_in.Device, kernels: Path, monkeypatch: pytest.MonkeyPatch) -> stand_in.Device:
    """The stand-in, whose devices run programs for fibers."""
    monkeypatch.setenv("STAND_IN_ARCHITECTURE", "fibers")
    monkeypatch.setenv("JAX_MONO_KERNELS", str(kernels))
    return device
