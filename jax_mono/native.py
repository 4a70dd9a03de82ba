"""The native library: loads it, registers its custom call, wraps its C functions."""

from __future__ import annotations

import ctypes
import functools
import importlib.resources
import importlib.util
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from jax_mono import settings

TARGET = "jax_mono_decode"

EXPAND_TARGET = "jax_mono_expand"
"""Compressed tapes back to weights, on the CPU only."""
"""Name of the custom call."""

CHANNELS = (
    "qkv rows",
    "attention parts",
    "attention inbox",
    "residual after attention",
    "activations",
    "mlp inbox",
    "residual after mlp",
    "final inbox",
    "final sum",
    "summary",
    "logits",
    "choice",
)
"""The hand-offs by number, as errors name them; mirrors ``Channel`` in ffi/kernel/call.h."""


GpuPlatform = Literal["cuda", "rocm"]
"""JAX's names of the GPU platforms."""

GPU_PLATFORMS: tuple[GpuPlatform, ...] = ("cuda", "rocm")
"""All of them."""

_GPUS: dict[GpuPlatform, tuple[int, str]] = {"cuda": (1, "CUDA"), "rocm": (2, "ROCM")}
"""Number in ffi/host/driver.h, and the name under which XLA knows handlers."""

_COMPILER_PACKAGES = ("nvidia", "_rocm_sdk_core", "_rocm_sdk_libraries")
"""Packages of wheels that may hold a run-time compiler."""


class NativeError(RuntimeError):
    """The native library is missing or cannot run here."""


_SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "mono_session_open": (
        ctypes.c_int32,
        [ctypes.c_int32, ctypes.c_double, ctypes.c_int32, ctypes.c_char_p, ctypes.c_int32],
    ),
    "mono_session_read": (
        ctypes.c_int32,
        [ctypes.c_int32, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p],
    ),
    "mono_session_cancel": (None, [ctypes.c_int32]),
    "mono_session_close": (None, [ctypes.c_int32]),
    "mono_sessions_open": (ctypes.c_int32, []),
    "mono_record_field": (ctypes.c_char_p, [ctypes.c_int32, ctypes.POINTER(ctypes.c_int64)]),
    "mono_cpu_variant": (ctypes.c_int32, [ctypes.c_char_p, ctypes.c_int32]),
    "mono_read_bandwidth": (
        ctypes.c_double,
        [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_int32],
    ),
    "mono_gpu_report": (None, [ctypes.c_int32, ctypes.c_char_p, ctypes.c_int32]),
    "mono_compile": (
        ctypes.c_int64,
        [
            ctypes.c_int32,
            ctypes.c_char_p,
            ctypes.c_int64,
            ctypes.c_void_p,
            ctypes.c_int32,
            ctypes.c_char_p,
            ctypes.c_int64,
        ],
    ),
    "mono_gpu_shape": (
        ctypes.c_int64,
        [
            ctypes.c_char_p,
            ctypes.c_int64,
            ctypes.c_void_p,
            ctypes.c_int32,
            ctypes.POINTER(ctypes.c_int32),
            ctypes.POINTER(ctypes.c_int32),
            ctypes.c_char_p,
            ctypes.c_int32,
        ],
    ),
    "mono_set_compiler_path": (None, [ctypes.c_char_p]),
    "mono_kernel_source": (
        ctypes.c_int32,
        [ctypes.c_int32, ctypes.POINTER(ctypes.c_char_p), ctypes.POINTER(ctypes.c_char_p)],
    ),
}


def library_path() -> Path:
    """Where ``libjax_mono.so`` is expected."""
    # Through importlib, because an editable install keeps the library away from the sources.
    installed = importlib.resources.files("jax_mono") / "lib" / "libjax_mono.so"
    return settings.library_override() or Path(str(installed))


@functools.cache
def library() -> ctypes.CDLL:
    """Loads the native library once.

    Raises:
        NativeError: It is not there or does not load.
    """
    path = library_path()
    if not path.is_file():
        raise NativeError(f"{path} does not exist; install the package with `pip install .` to build it")
    try:
        loaded = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(loaded, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise NativeError(f"{path} does not load ({error}); rebuild it with `pip install .`") from error
    loaded.mono_set_compiler_path(":".join(_compiler_directories()).encode())
    return loaded


def _compiler_directories() -> list[str]:
    """Where wheels keep the libraries of run-time compilers."""
    found: list[str] = []
    for package in _COMPILER_PACKAGES:
        spec = importlib.util.find_spec(package)
        for root in (spec.submodule_search_locations or ()) if spec else ():
            for pattern in ("*/lib/libnvrtc.so.*", "lib/libhiprtc.so.*"):
                found += sorted({str(path.parent) for path in Path(root).glob(pattern)})
    return found


_register_lock = threading.Lock()
_registered = False
_gpu: GpuPlatform | None = None


def register() -> None:
    """Registers the custom calls with JAX, for the CPU and for the GPU platforms that it has.

    The backends must exist first: a target that is registered earlier can take the CPU backend down on jax 0.10.
    """
    global _registered, _gpu
    with _register_lock:
        if _registered:
            return
        jax.local_devices()  # makes all backends; JAX_PLATFORMS may leave out the CPU's
        handler = jax.ffi.pycapsule(library().mono_decode_cpu)
        jax.ffi.register_ffi_target(TARGET, handler, platform="cpu")
        jax.ffi.register_ffi_target(EXPAND_TARGET, jax.ffi.pycapsule(library().mono_expand_cpu), platform="cpu")
        for name, (_, platform) in _GPUS.items():
            try:
                jax.local_devices(backend=name)
            except RuntimeError:  # JAX has no such backend
                continue
            handler = jax.ffi.pycapsule(getattr(library(), f"mono_decode_{name}"))
            jax.ffi.register_ffi_target(TARGET, handler, platform=platform)
            _gpu = name
        _registered = True


def gpu_platform() -> GpuPlatform | None:
    """The GPU platform that the custom call is registered for, or None."""
    register()
    return _gpu


@dataclass(frozen=True)
class Gpu:
    """A GPU as its driver describes it.

    Attributes:
        name: What it is.
        architecture: As the run-time compiler calls it, such as ``sm_90a`` or ``gfx942``.
        multiprocessors: Each holds one block of a plan, or more.
        shared_memory: Bytes that a block may have.
    """

    name: str
    architecture: str
    multiprocessors: int
    shared_memory: int


@dataclass(frozen=True)
class GpuReport:
    """What this machine has of a GPU platform.

    Attributes:
        gpus: Those that the driver shows to this process.
        driver_error: Why there is no driver, or empty.
        compiler: Name and version of the run-time compiler, or empty.
        compiler_error: Why there is no compiler, or empty.
        cache: Directory of compiled programs, or empty for none.
    """

    gpus: list[Gpu]
    driver_error: str
    compiler: str
    compiler_error: str
    cache: str


def gpu_report(platform: GpuPlatform) -> GpuReport:
    """Looks for driver, devices and compiler of a GPU platform. Needs no JAX backend."""
    text = ctypes.create_string_buffer(1 << 16)
    library().mono_gpu_report(_GPUS[platform][0], text, len(text))
    gpus: list[Gpu] = []
    rest = {"driver_error": "", "compiler": "", "compiler_error": "", "cache": ""}
    for line in text.value.decode(errors="replace").splitlines():
        key, _, value = line.partition("\t")
        if key == "device":
            name, architecture, multiprocessors, shared = value.split("\t")
            gpus.append(Gpu(name, architecture, int(multiprocessors), int(shared)))
        elif key in rest:
            rest[key] = value
    return GpuReport(gpus, **rest)


def kernel_sources() -> dict[str, str]:
    """The resident program's sources that the library carries, by the name under which they include each other."""
    sources: dict[str, str] = {}
    name, text = ctypes.c_char_p(), ctypes.c_char_p()
    while library().mono_kernel_source(len(sources), ctypes.byref(name), ctypes.byref(text)):
        assert name.value is not None and text.value is not None
        sources[name.value.decode()] = text.value.decode()
    return sources


def cpu_variant() -> str:
    """Name of the instruction set that the resident program uses on this processor.

    Raises:
        NativeError: ``JAX_MONO_CPU`` names one that does not run here.
    """
    text = ctypes.create_string_buffer(256)
    if not library().mono_cpu_variant(text, len(text)):
        raise NativeError(text.value.decode())
    return text.value.decode()


def record_fields() -> dict[str, int]:
    """Sizes ("Header") and byte offsets ("Header.magic") of the records in ffi/kernel/plan.h."""
    fields: dict[str, int] = {}
    value = ctypes.c_int64()
    while (name := library().mono_record_field(len(fields), ctypes.byref(value))) is not None:
        fields[name.decode()] = value.value
    return fields


def read_bandwidth(array: jax.Array, threads: int, streams: int) -> float:
    """Bytes per second with which ``threads`` threads read a single-device CPU array once.

    Raises:
        ValueError: The array is cut over several devices, or not on a CPU.
    """
    if len(array.addressable_shards) != 1:
        raise ValueError("read_bandwidth needs an array on one device; pass one of its shards")
    shard = array.addressable_shards[0]
    if shard.device.platform != "cpu":
        raise ValueError(f"read_bandwidth reads arrays of CPUs, this one is on {shard.device}")
    pointer = shard.data.unsafe_buffer_pointer()
    return library().mono_read_bandwidth(pointer, array.nbytes, threads, streams)


def compile_program(
    platform: GpuPlatform, record: np.ndarray, weights: int, *, architecture: str, shared_memory: int
) -> bytes:
    """Compiles the resident program of a plan for a GPU; needs the platform's compiler, but no GPU.

    Calls find the result in the cache of programs, so that many can be compiled at once and ahead of time.

    Args:
        platform: Whose compiler.
        record: The plan, from :func:`jax_mono.record.plan_record`.
        weights: Index of the weight dtype in :data:`jax_mono.tape.STORAGE`.
        architecture: Such as ``sm_90a``.
        shared_memory: Bytes that a block may have there.

    Raises:
        NativeError: There is no compiler, or it refuses; with its log.
    """
    text = ctypes.create_string_buffer(1 << 24)
    record = np.ascontiguousarray(record)
    size = library().mono_compile(
        _GPUS[platform][0], architecture.encode(), shared_memory, record.ctypes.data, weights, text, len(text)
    )
    if size == 0:
        raise NativeError(text.value.decode(errors="replace"))
    if size > len(text):
        raise NativeError(f"the program of {size} bytes is too large; plan a smaller model")
    return text.raw[:size]


@dataclass(frozen=True)
class GpuShape:
    """What the program of a plan needs on a GPU.

    Attributes:
        header: Text of ``shape.h``, which the sources include.
        threads: Of a block.
        shared_memory: Bytes of dynamic shared memory that a launch gives each block.
    """

    header: str
    threads: int
    shared_memory: int


def gpu_shape(record: np.ndarray, weights: int, *, architecture: str, shared_memory: int) -> GpuShape:
    """What compiling :func:`kernel_sources` without :func:`compile_program` takes; needs neither GPU nor compiler.

    Arguments as for :func:`compile_program`.

    Raises:
        NativeError: The plan cannot run on that architecture.
    """
    text = ctypes.create_string_buffer(1 << 14)
    record = np.ascontiguousarray(record)
    threads, shared = ctypes.c_int32(), ctypes.c_int32()
    size = library().mono_gpu_shape(
        architecture.encode(), shared_memory, record.ctypes.data, weights, threads, shared, text, len(text)
    )
    if size == 0:
        raise NativeError(text.value.decode(errors="replace"))
    assert size < len(text)
    return GpuShape(text.value.decode(), threads.value, shared.value)


class Session:
    """The host's end of a running call: tokens as they appear, and a way to stop it.

    Args:
        capacity: Tokens that may be produced.
        seconds: After this time the call ends with what it has; None for no deadline.

    Raises:
        NativeError: JAX has GPUs, but their driver gives no memory for the session.
    """

    def __init__(self, capacity: int, seconds: float | None = None) -> None:
        self._closed = True
        self._library = library()
        # GPUs write into the session while they run; a call on the CPU can use such memory as well.
        platform, error = gpu_platform(), ctypes.create_string_buffer(1024)
        number = _GPUS[platform][0] if platform else 0
        self.id: int = self._library.mono_session_open(capacity, seconds or 0.0, number, error, len(error))
        if self.id == 0:
            raise NativeError(error.value.decode(errors="replace"))
        self._closed = False
        self._tokens = np.empty(capacity, np.int32)
        self._logprobs = np.empty(capacity, np.float32)
        self._read = 0

    def read(self, milliseconds: int) -> list[tuple[int, float]]:
        """Waits at most ``milliseconds`` for new tokens; returns (token, log-probability) pairs, maybe none."""
        if self._closed:
            return []
        room = len(self._tokens) - self._read
        end = self._library.mono_session_read(
            self.id, self._read, room, milliseconds, self._tokens.ctypes.data, self._logprobs.ctypes.data
        )
        new = max(0, end - self._read)
        self._read += new
        return list(zip(self._tokens[:new].tolist(), self._logprobs[:new].tolist(), strict=True))

    def cancel(self) -> None:
        """Ends the call after the token it is working on. Does nothing once the session is closed."""
        if not self._closed:
            self._library.mono_session_cancel(self.id)

    def close(self) -> None:
        """Frees the session; a call that still runs keeps its memory until it ends."""
        if not self._closed:
            self._closed = True
            self._library.mono_session_close(self.id)
