"""Environment variables, all in one place.

==============================  ==========================================================================
``JAX_MONO_LIBRARY``            Path of ``libjax_mono.so`` to load instead of the installed one.
``JAX_MONO_CPU``                CPU variant to use: ``avx512bf16``, ``avx512``, ``avx2`` or ``portable``.
                                Default: the best one that this processor runs.
``JAX_MONO_BLOCKS``             Blocks (threads) per device on CPU. Default: the cores of this process,
                                shared among the devices.
``JAX_MONO_API_KEY``            What clients of ``jax-mono serve`` must send, unless ``--api-key`` says it.
``JAX_MONO_WAIT_LIMIT_MS``      How long one wait inside a running call may last. Default: 20000.
``JAX_MONO_MEETING_LIMIT_MS``   How long the devices of a call wait for each other to start. Default: 8000,
                                below the 10 s after which XLA gives up on its own.
``JAX_MONO_DRIVER``             Path of the GPU driver's library, ``libcuda.so.1`` or ``libamdhip64.so.7``, instead
                                of the system's. Read by the native library.
``JAX_MONO_COMPILER``           Path of the run-time compiler, ``libnvrtc.so.13`` or ``libhiprtc.so.7``, instead of
                                those in wheels and in the system. Read by the native library.
``JAX_MONO_CACHE``              Directory of compiled GPU programs. Default: ``jax_mono`` in ``$XDG_CACHE_HOME`` or
                                ``~/.cache``. Read by the native library.
``JAX_MONO_KERNELS``            Directory that holds ``kernel/``: GPU programs are compiled from there instead of from
                                the sources in the library. For work on them.
``JAX_MONO_TRACE``              File that every call writes (over) with the times at which its blocks came to the
                                moments of a few tokens; ``jax-mono trace`` reads it. Calls of ``shard_map`` append
                                ``.0``, ``.1`` and so on. Read by the native library.
``JAX_MONO_TRACE_TOKENS``       Which tokens: ``FIRST,COUNT``, counted from the first one that the call feeds; at most
                                1024. Default: ``8,8``. Read by the native library.
==============================  ==========================================================================
"""

from __future__ import annotations

import os
from pathlib import Path


def library_override() -> Path | None:
    """``JAX_MONO_LIBRARY``, or None."""
    value = os.environ.get("JAX_MONO_LIBRARY")
    return Path(value) if value else None


def api_key() -> str | None:
    """``JAX_MONO_API_KEY``, or None."""
    return os.environ.get("JAX_MONO_API_KEY") or None


def wait_limit_ms() -> int:
    """``JAX_MONO_WAIT_LIMIT_MS`` in milliseconds."""
    return _positive("JAX_MONO_WAIT_LIMIT_MS") or 20_000


def meeting_limit_ms() -> int:
    """``JAX_MONO_MEETING_LIMIT_MS`` in milliseconds."""
    return _positive("JAX_MONO_MEETING_LIMIT_MS") or 8_000


def blocks() -> int | None:
    """``JAX_MONO_BLOCKS``, or None."""
    return _positive("JAX_MONO_BLOCKS")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _positive(name: str) -> int | None:
    text = os.environ.get(name)
    if not text:
        return None
    if not text.isdecimal() or not 0 < int(text) < 2**31:
        raise ValueError(f"{name} is {text!r}, must be a positive whole number")
    return int(text)
