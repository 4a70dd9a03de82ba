"""The process of one step: ``python -m jax_mono.bringup MODULE:CLASS DIRECTORY``."""

from __future__ import annotations

import importlib
import sys
import time
import traceback
from pathlib import Path

from jax_mono.bringup.runner import write_outcome
from jax_mono.bringup.step import Findings, Outcome, Step, read_context


def main(named: str, out: Path) -> int:
    """Runs a step and leaves its outcome in the directory."""
    module, _, name = named.partition(":")
    step: Step = getattr(importlib.import_module(module), name)()
    started = time.monotonic()
    try:
        findings, status, reason = step.run(read_context(out)), "done", ""
    except Exception as error:
        traceback.print_exc()
        findings, status, reason = Findings(), "failed", f"{type(error).__name__}: {error}"
    write_outcome(out, Outcome(step.name, step.title, status, time.monotonic() - started, reason, findings))
    return 0 if status == "done" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
