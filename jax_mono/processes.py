"""Processes that must not outlive their time."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from typing import Any

_GRACE_S = 10.0
"""A killed process that is still there after this is left behind: it waits for a driver that does not answer."""


def end_session(process: subprocess.Popen[Any]) -> None:
    """Kills a process and all that it has started, and waits for it, but not for ever.

    Args:
        process: Started with ``start_new_session=True``.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE_S)
