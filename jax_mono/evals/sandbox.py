"""Runs a program that nobody has read: limited, confined, in a process and a directory of its own."""

from __future__ import annotations

import json
import os
import secrets
import select
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jax_mono.processes import end_session

_CHILD = Path(__file__).with_name("sandbox_child.py")
_MiB = 1 << 20

_REFERENCE_SECONDS = 60.0
"""What a reference may take; it is trusted, and its time is not the sample's."""
_PATIENCE = 4
"""A sample may take this many times as long as its reference, as in EvalPlus."""

Status = Literal["passed", "failed", "timeout", "died"]


class SandboxError(RuntimeError):
    """A sample could not be run as asked; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a sample may use.

    Attributes:
        seconds: Wall time, start of the interpreter included. If there is a reference, the clock starts when it is
            done, and runs for four times as long as it took if that is more.
        memory: Address space in bytes.
        file_size: Largest file in bytes.
        open_files: Open files.
        confined: Whether the process also gives up network, other processes and files outside its own directory, for
            which Linux needs Landlock and seccomp. Without, only run what you trust, or all of it in a container.
    """

    seconds: float = 10.0
    memory: int = 1024 * _MiB
    file_size: int = 4 * _MiB
    open_files: int = 64
    confined: bool = True


@dataclass(frozen=True)
class Verdict:
    """How a sample ended.

    Attributes:
        status: ``passed``; ``failed`` with an exception; ``timeout``; ``died`` without a word, as after ``exit()``, a
            crash or too much memory.
        detail: The exception.
        seconds: Wall time.
    """

    status: Status
    detail: str
    seconds: float


def run(request: dict[str, Any], limits: Limits) -> Verdict:
    """Runs one sample.

    The verdict comes through a pipe together with a random number that only the request has, so that what a sample
    prints, or how it exits, is never taken for a verdict.

    Args:
        request: ``program``, Python source that raises unless it is right. Or ``program`` and ``reference``, the
            function ``entry_point`` in both, the ``inputs`` on which they must agree, and ``atol``.
        limits: What it may use.

    Returns:
        The verdict.

    Raises:
        SandboxError: This machine cannot confine a process.
    """
    first = _REFERENCE_SECONDS if "reference" in request else limits.seconds
    numbers = {
        "RLIMIT_AS": limits.memory,
        "RLIMIT_CPU": int(first * (1 + _PATIENCE) + limits.seconds),
        "RLIMIT_FSIZE": limits.file_size,
        "RLIMIT_NOFILE": limits.open_files,
        "RLIMIT_CORE": 0,
    }
    nonce, started = secrets.token_hex(16), time.perf_counter()
    reader, writer = os.pipe()
    with tempfile.TemporaryDirectory(prefix="jax-mono-sample-") as directory, os.fdopen(reader, "rb") as answer:
        environment = {"PATH": "/nonexistent", "HOME": directory, "TMPDIR": directory, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(_CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=directory,
            env=environment,
            pass_fds=(writer,),
            start_new_session=True,
        )
        os.close(writer)
        about = {"limits": numbers, "confined": limits.confined, "pipe": writer, "nonce": nonce}
        try:
            message = json.dumps(request | about).encode()
            text, in_time = _converse(process, message, answer, first, limits.seconds)
        finally:
            end_session(process)  # also what an unconfined sample has started
    return _verdict(text, nonce, in_time, time.perf_counter() - started)


def _converse(
    process: subprocess.Popen[bytes], request: bytes, answer: Any, first: float, seconds: float
) -> tuple[bytes, bool]:
    """Hands over the request and reads until the child closes its pipe, or time is up.

    An empty line says that the reference is done.
    """
    assert process.stdin is not None
    try:
        with process.stdin:
            process.stdin.write(request)
    except BrokenPipeError:
        return b"", True
    text, started = b"", time.perf_counter()
    ends = started + first
    while select.select([answer], [], [], max(0.0, ends - time.perf_counter()))[0]:
        part = os.read(answer.fileno(), 4096)
        if not part:
            return text, True
        if not text and part.startswith(b"\n"):
            now = time.perf_counter()
            ends = now + max(seconds, _PATIENCE * (now - started))
        text += part
    return text, False


def _verdict(text: bytes, nonce: str, in_time: bool, seconds: float) -> Verdict:
    try:
        given, status, detail = json.loads(text)
    except ValueError:
        given, status, detail = None, "died", "ended without a verdict"
    if given == nonce and status == "unconfined":
        raise SandboxError(
            f"samples cannot be confined here: {detail}. Run this inside a container or virtual machine and pass "
            "--unconfined"
        )
    if given == nonce:
        return Verdict(status, detail, seconds)
    return Verdict("died" if in_time else "timeout", "ended without a verdict" if in_time else "out of time", seconds)
