"""The native library: loads it, registers its custom call, wraps its C functions."""

from __future__ import annotations

import ctypes
import functools
import importlib.resources
import threading
from pathlib import Path

import jax
import numpy as np

from jax_mono import settings

TARGET = "jax_mono_decode"
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


class NativeError(RuntimeError):
    """The native library is missing or cannot run here."""


_SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "mono_session_open": (ctypes.c_int32, [ctypes.c_int32, ctypes.c_double]),
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
    return loaded


_register_lock = threading.Lock()
_registered = False


def register() -> None:
    """Registers the custom call with JAX.

    The CPU backend must exist first: a target that is registered earlier can take the backend down on jax 0.10.
    """
    global _registered
    with _register_lock:
        if _registered:
            return
        jax.local_devices(backend="cpu")
        handler = jax.ffi.pycapsule(library().mono_decode_cpu)
        jax.ffi.register_ffi_target(TARGET, handler, platform="cpu")
        _registered = True


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
        ValueError: The array is cut over several devices.
    """
    if len(array.addressable_shards) != 1:
        raise ValueError("read_bandwidth needs an array on one device; pass one of its shards")
    pointer = array.addressable_shards[0].data.unsafe_buffer_pointer()
    return library().mono_read_bandwidth(pointer, array.nbytes, threads, streams)


class Session:
    """The host's end of a running call: tokens as they appear, and a way to stop it.

    Args:
        capacity: Tokens that may be produced.
        seconds: After this time the call ends with what it has; None for no deadline.
    """

    def __init__(self, capacity: int, seconds: float | None = None) -> None:
        self._library = library()
        self._closed = False
        self.id: int = self._library.mono_session_open(capacity, seconds or 0.0)
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
