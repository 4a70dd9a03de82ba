"""The package as a user has it: installed, complete, and loadable without a compiler or a GPU."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import pytest

import jax_mono
from jax_mono import native

CHECKOUT = Path(__file__).parents[1]
PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
LIBRARY = importlib.resources.files("jax_mono") / "lib" / "libjax_mono.so"


def run_python(code: str, cwd: Path) -> str:
    process = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=60)
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


def test_version_has_a_single_source() -> None:
    assert jax_mono.__version__ == importlib.metadata.version("jax-mono") == PROJECT["version"]


def test_core_dependencies_are_the_promised_five() -> None:
    names = {requirement.partition(">")[0] for requirement in PROJECT["dependencies"]}
    assert names == {"jax", "jaxlib", "flax", "numpy", "orbax-checkpoint"}


def test_one_wheel_serves_all_pythons() -> None:
    wheel = importlib.metadata.distribution("jax-mono").read_text("WHEEL")
    assert wheel is not None
    tags = [line.removeprefix("Tag: ") for line in wheel.splitlines() if line.startswith("Tag: ")]
    assert tags
    assert all(tag.startswith("py3-none-linux_") for tag in tags), tags


def test_library_loads_and_brings_nothing_but_the_system_along(tmp_path: Path) -> None:
    # CUDA, ROCm and Python come by dlopen or not at all; the C++ library is linked in.
    code = f"""
import ctypes, re
def loaded():
    with open("/proc/self/maps") as maps:
        return set(re.findall(r"/([^/]*)[.]so", maps.read()))
before = loaded()
ctypes.CDLL({str(LIBRARY)!r})
print(*(loaded() - before))
"""
    brought = set(run_python(code, tmp_path).split())
    assert "libjax_mono" in brought
    assert brought <= {"libjax_mono", "libgcc_s", "libm", "libpthread", "libdl", "librt"}


def test_native_code_is_loaded_from_the_installed_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAX_MONO_LIBRARY", raising=False)
    assert native.library_path() == LIBRARY


def test_models_are_part_of_the_package(tmp_path: Path) -> None:
    assert run_python("import jax_mono.models as m; print(m.__name__)", tmp_path) == "jax_mono.models"


def test_the_library_carries_the_kernel_sources() -> None:
    ffi = CHECKOUT / "ffi"
    sources = {path.relative_to(ffi).as_posix(): path.read_text() for path in (ffi / "kernel").rglob("*.h")}
    assert sources
    assert native.kernel_sources() == sources


def test_type_hints_are_announced() -> None:
    assert (importlib.resources.files("jax_mono") / "py.typed").is_file()


def test_console_script_is_declared() -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="jax-mono")
    assert callable(script.load())


@pytest.mark.parametrize("name", ["jax_mono.config", "jax_mono.models"])
def test_a_checkout_does_not_hide_the_installed_package(name: str, tmp_path: Path) -> None:
    # Python started in the checkout finds the incomplete jax_mono/ there before the installed one.
    code = f"import {name} as module; print(module.__file__)"
    assert run_python(code, CHECKOUT) == run_python(code, tmp_path)


def test_tests_run_on_eight_cpu_devices() -> None:
    assert jax.local_device_count("cpu") == 8
