"""Sends the custom call through the ROCm handler, to a library that stands in for ROCm.

The library is ``ffi/test/stand_in_hip_null.cc``, which needs no GPU and runs the CPU's program; its devices call
themselves ``host``. ``JAX_MONO_TEST_STAND_IN`` names another one: built from ``ffi/test/stand_in_hip_cuda.cc``, it
runs the library's own program on an NVIDIA GPU.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from ctypes import byref, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from gpu_host.call_frame import Buffer, Place, call

from jax_mono import native

ROOT = Path(__file__).parents[2]
ARCHITECTURE = "host"
"""What the devices of the stand-in call themselves; it runs the CPU's program and takes the CPU's plans."""


def build(directory: Path) -> Path:
    """Compiles the stand-in that needs no GPU."""
    named = os.environ.get("JAX_MONO_TEST_STAND_IN")
    if named:
        return Path(named)
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    library = directory / "stand_in.so"
    sources = [str(ROOT / "ffi" / name) for name in ("test/stand_in_hip_null.cc", "host/program_portable.cc")]
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", f"-I{ROOT / 'ffi'}", "-pthread"]
    subprocess.run(["g++", *flags, *sources, "-o", str(library)], check=True)
    return library


def environment(library: Path, directory: Path) -> dict[str, str]:
    """Settings under which the native library takes the stand-in for ROCm."""
    settings = {
        "JAX_MONO_DRIVER": str(library),
        "JAX_MONO_COMPILER": str(library),
        "JAX_MONO_CACHE": str(directory / "cache"),
    }
    if not os.environ.get("JAX_MONO_TEST_STAND_IN"):
        entry = directory / "kernels" / "kernel" / "entry" / f"{ARCHITECTURE}.h"
        entry.parent.mkdir(parents=True)
        entry.write_text("// The stand-in runs the CPU's program.\n")
        settings["JAX_MONO_KERNELS"] = str(directory / "kernels")
    return settings


def fiber_kernels(directory: Path) -> Path:
    """The kernel's sources with a fiber for a thread; for JAX_MONO_KERNELS."""
    shutil.copytree(ROOT / "ffi" / "kernel", directory / "kernel")
    for part, name in (("arch", "arch.h"), ("entry", "entry.h")):
        shutil.copy(ROOT / "ffi" / "test" / "fibers" / name, directory / "kernel" / part / "fibers.h")
    return directory


class Device:
    """Memory of the stand-in, through HIP's functions."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.script = ""  # what fails within the handler

    def _run(self, name: str, *arguments: object) -> None:
        error = getattr(self.library, name)(*arguments)
        assert error == 0, f"{name} failed with {error}"

    def count(self, function: str) -> int:
        """How often a function of the stand-in was called."""
        return self.library.stand_in_count(function.encode())

    def fail(self, script: str) -> None:
        """Lets functions fail that this thread calls: ``function:error[:device],...``."""
        if hasattr(self.library, "stand_in_fail"):
            self.library.stand_in_fail(script.encode())

    def select(self, ordinal: int) -> None:
        """Makes a device current for this thread."""
        self._run("hipSetDevice", ordinal)

    def put(self, array: np.ndarray) -> Buffer:
        """Copies an array to the current device."""
        array = np.ascontiguousarray(array)
        address = c_void_p()
        self._run("hipMalloc", byref(address), c_size_t(max(1, array.nbytes)))
        self._run("hipMemcpyHtoDAsync", address, c_void_p(array.ctypes.data), c_size_t(array.nbytes), None)
        self._run("hipStreamSynchronize", None)
        return Buffer(address.value or 0, array.shape, array.dtype)

    def get(self, buffer: Buffer) -> np.ndarray:
        """Copies a buffer of the current device to the host."""
        array = np.empty(buffer.shape, buffer.dtype)
        self._run(
            "hipMemcpyDtoHAsync", c_void_p(array.ctypes.data), c_void_p(buffer.address), c_size_t(array.nbytes), None
        )
        self._run("hipStreamSynchronize", None)
        return array

    def free(self, buffer: Buffer) -> None:
        """Frees a buffer of the current device."""
        self._run("hipFree", c_void_p(buffer.address))


def fake_ffi_call(device: Device) -> Callable[..., Any]:
    """A replacement for ``jax.ffi.ffi_call`` that calls the ROCm handler from the host."""
    handler = native.library().mono_decode_rocm

    def ffi_call(target: str, results: Any, *, input_output_aliases: dict[int, int], **options: Any) -> Any:
        assert target == native.TARGET and options == {"has_side_effect": True}

        def bind(*operands: jax.Array, **attributes: Any) -> Any:
            def run(*arrays: jax.Array) -> list[np.ndarray]:
                values = [np.asarray(array) for array in arrays]
                ordinal = int(values[-1][0])  # the device's place in the mesh
                device.select(ordinal)
                arguments = [device.put(value) for value in values]
                outputs = [device.put(np.zeros(result.shape, result.dtype)) for result in results]
                made = [*arguments, *outputs]
                for argument, output in input_output_aliases.items():
                    outputs[output] = arguments[argument]
                try:
                    device.fail(device.script)
                    call(handler, arguments, outputs, attributes, Place(stream=0, ordinal=ordinal, run_id=1))
                    device.fail("")
                    return [device.get(output) for output in outputs]
                finally:
                    device.fail("")
                    device.select(ordinal)
                    for buffer in made:
                        device.free(buffer)

            return jax.pure_callback(run, results, *operands)

        return bind

    return ffi_call
