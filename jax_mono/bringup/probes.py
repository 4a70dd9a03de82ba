"""Measurements of the hardware apart from any model: ``ffi/kernel/probe`` and ``ffi/host/probe.cc``.

They need the GPU's driver and run-time compiler, but no JAX. On the CPU a thread stands for every block.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from jax_mono import native

Platform = Literal["cpu", "cuda", "rocm"]

PAGE_BYTES = 4096
"""Of a page that :func:`page_times` times."""

LINES = (1, 2, 4, 8, 16, 32)
"""Reads of one page that are possible: at most one of each cache line."""

MOST_ROUNDS = 1 << 24
"""Of ping and pong: their tags are counted in 32 bits."""

_NUMBERS: dict[Platform, int] = {"cpu": 0, "cuda": 1, "rocm": 2}
_DIES = 16  # kDies in ffi/kernel/probe/probe.h


class _HandOff(ctypes.Structure):
    """Mirrors ``HandOff`` in ffi/host/probe.cc."""

    _fields_: Sequence = [
        (name, ctypes.c_int32)
        for name in ("platform", "writer", "reader", "first", "second", "rounds", "pollers", "blocks", "limit_ms")
    ]


class _Reads(ctypes.Structure):
    """Mirrors ``Reads`` in ffi/host/probe.cc."""

    _fields_: Sequence = [
        (name, ctypes.c_int32)
        for name in ("platform", "device", "mapped", "pages", "lines", "sweeps", "blocks", "limit_ms")
    ] + [("address", ctypes.c_int64)]


class ProbeError(RuntimeError):
    """A probe could not run, or ran into its bound."""


@dataclass(frozen=True)
class HandOff:
    """A word on its way between two blocks.

    Attributes:
        nanoseconds: From the store until the other block has seen it, mean of a ping-pong's two directions.
        dies: Die of each block of the writer's device, in this launch.
    """

    nanoseconds: float
    dies: np.ndarray


def hand_off(
    platform: Platform,
    *,
    blocks: int,
    first: int,
    second: int,
    writer: int = 0,
    reader: int = 0,
    rounds: int = 2000,
    pollers: int = 0,
    limit_ms: int = 2000,
) -> HandOff:
    """Lets two blocks answer each other, while nothing else goes on but the polls of others.

    Args:
        platform: Where.
        blocks: That are launched on each device; those without a part end at once.
        first: The block that begins.
        second: The block that answers.
        writer: Device of the first.
        reader: Device of the second.
        rounds: Of ping and pong that are timed; an eighth more before them is not.
        pollers: Further blocks that poll the first one's word; the two must be on one device.
        limit_ms: Bound of the whole.

    Raises:
        ProbeError: There is no driver, compiler or program, or the bound was reached.
        ValueError: The blocks are not those of a device, or there are not so many pollers or rounds.
    """
    if not (0 <= first < blocks and 0 <= second < blocks) or (writer == reader and first == second):
        raise ValueError(f"blocks {first} and {second} must be two of {blocks}")
    if not 0 < rounds <= MOST_ROUNDS:
        raise ValueError(f"there can be 1 to {MOST_ROUNDS} rounds, not {rounds}")
    if pollers and (writer != reader or pollers > blocks - 2):
        raise ValueError(f"{pollers} pollers need as many more blocks on the one device of the two; there are {blocks}")
    request = _HandOff(_NUMBERS[platform], writer, reader, first, second, rounds, pollers, blocks, limit_ms)
    dies, time = np.zeros(blocks, np.int32), ctypes.c_float()
    _call("mono_probe_hand_off", ctypes.byref(request), dies.ctypes.data_as(ctypes.c_void_p), ctypes.byref(time))
    if time.value < 0:
        raise ProbeError(f"blocks {first} and {second} of devices {writer} and {reader} did not meet in {limit_ms} ms")
    return HandOff(time.value, dies)


def page_times(
    platform: Platform,
    *,
    blocks: int,
    device: int = 0,
    pages: int = 16384,
    lines: int = 8,
    sweeps: int = 5,
    mapped: bool = False,
    address: int = 0,
    limit_ms: int = 20_000,
) -> tuple[np.ndarray, np.ndarray]:
    """Times reads of each page of a piece of device memory, by one block of each die at a time each.

    The memory is a fresh piece of the kind that tapes lie in, or mapped, or memory that is there. Of the `lines` reads
    of a page the shortest counts, of the sweeps the median: what is left is how far the page is, and noise.

    Args:
        platform: Where.
        blocks: That are launched: enough that every die gets one.
        device: Which device.
        pages: Of :data:`PAGE_BYTES`, consecutive.
        lines: Reads of a page per sweep, of lines that lie evenly in it.
        sweeps: Over all pages.
        mapped: Whether the memory comes from the driver's virtual memory functions: physically in one piece, as far as
            there is one. Without effect on a CPU.
        address: Where the first page of memory is that is there already, on that device; nothing may write it
            meanwhile. 0 takes fresh memory.
        limit_ms: Bound of each sweep.

    Returns:
        float32 [xcds, pages] nanoseconds, and int [xcds], the number of each XCD, as blocks read it.

    Raises:
        ProbeError: There is no driver, compiler or program, or the bound was reached.
        ValueError: `lines` is none of :data:`LINES`.
    """
    if lines not in LINES:
        raise ValueError(f"{lines} lines of a page cannot be read; use one of {', '.join(map(str, LINES))}")
    request = _Reads(_NUMBERS[platform], device, mapped, pages, lines, sweeps, blocks, limit_ms, address)
    dies, times = np.zeros(blocks, np.int32), np.zeros((sweeps, _DIES, pages), np.float32)
    addresses = [array.ctypes.data_as(ctypes.c_void_p) for array in (dies, times)]
    _call("mono_probe_pages", ctypes.byref(request), *addresses)
    if (times < 0).any():
        raise ProbeError(f"{pages} pages were not read in {limit_ms} ms")
    xcds = np.unique(dies)
    return np.median(times, axis=0)[xcds].astype(np.float32), xcds


def compile_probes(platform: native.GpuPlatform, architecture: str) -> None:
    """Compiles them for a GPU that need not be here.

    Args:
        platform: Whose compiler.
        architecture: Such as ``sm_90a``.

    Raises:
        ProbeError: There is no compiler, or it refuses, or there are no probes for that architecture.
    """
    _call("mono_probe_compile", ctypes.c_int32(_NUMBERS[platform]), architecture.encode())


def _call(name: str, *arguments: object) -> None:
    function = getattr(native.library(), name)
    function.restype = ctypes.c_int32
    error = ctypes.create_string_buffer(1 << 14)
    if not function(*arguments, error, ctypes.c_int32(len(error))):
        raise ProbeError(error.value.decode(errors="replace"))
