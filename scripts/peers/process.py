"""Peers in processes of their own, which measure when it is their turn and are ended when their time is over."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from jax_mono.processes import end_session

READY = "ready"
"""The line by which a peer says that it waits for its turn."""


def await_turn() -> None:
    """Called by the peer before each run: says that it is ready, and returns when it is told to go on."""
    print(READY, flush=True)
    if not sys.stdin.readline():
        raise SystemExit("nobody waits for this peer any more")


class PeerProcess:
    """Runs a command that prints :data:`READY` before each of its runs, and an object of JSON at its end.

    Attributes:
        row: What it has found, or why it has found nothing; None until then.
    """

    def __init__(self, name: str, command: Sequence[str], deadline: float) -> None:
        """Starts the command.

        Args:
            name: Of the peer.
            command: Program and arguments.
            deadline: Seconds that it may be at work; while others have their turn they do not count.
        """
        self.row: dict[str, Any] | None = None
        self._name, self._deadline, self._left = name, deadline, deadline
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 closed on leaving
        pipe = subprocess.PIPE
        self._child = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self._errors, text=True, start_new_session=True
        )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end_session(self._child)
        self._errors.close()

    def _read(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            self._lines.put(line)
        self._lines.put("")

    def go(self) -> None:
        """Lets it measure once."""
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: the next line says how
            self._child.stdin.write("\n")
            self._child.stdin.flush()

    def settle(self) -> None:
        """Waits until it is ready for its next run, or has a row. What else it prints is passed over."""
        started = time.monotonic()
        line = " "
        while line and line.strip() != READY and not line.startswith("{"):
            try:
                line = self._lines.get(timeout=max(0.0, self._left - (time.monotonic() - started)))
            except queue.Empty:
                end_session(self._child)
                self.row = self._failed(f"no result within {self._deadline:g} s; raise --deadline")
                return
        self._left -= time.monotonic() - started
        if line.strip() != READY:
            self.row = json.loads(line) if line else self._failed(self._last_words())

    def _failed(self, why: str) -> dict[str, Any]:
        return {"peer": self._name, "failed": why}

    def _last_words(self) -> str:
        code = self._child.wait()
        self._errors.seek(0)
        lines = [line for line in self._errors.read().splitlines() if line.strip()]
        return " | ".join(lines[-6:]) or f"ended with {code} and said nothing"


def measure_in_turns(commands: Mapping[str, Sequence[str]], deadline: float) -> Iterator[dict[str, Any]]:
    """Starts some peers one after the other, then lets each measure once, then each again, until all have their rows.

    Args:
        commands: By the peers' names.
        deadline: Seconds for each.

    Yields:
        Their rows, in their order.
    """
    with contextlib.ExitStack() as stack:
        peers: list[PeerProcess] = []
        for name, command in commands.items():
            peers.append(stack.enter_context(PeerProcess(name, command, deadline)))
            peers[-1].settle()
        while waiting := [peer for peer in peers if peer.row is None]:
            for peer in waiting:
                peer.go()
                peer.settle()
        for peer in peers:
            assert peer.row is not None
            yield peer.row
