"""Runs steps, each in a process of its own with a deadline; whatever becomes of one, the others go on."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from jax_mono.bringup.step import TOY_SECONDS, Context, Outcome, Step, outcome_from
from jax_mono.cli.console import plain
from jax_mono.processes import end_session

_TAIL = 5
"""Lines of a log that a report quotes."""


def write_outcome(out: Path, outcome: Outcome) -> None:
    """Writes ``steps/NAME.json``, whole or not at all."""
    path = out / "steps" / f"{outcome.step}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(plain(outcome.record()), indent=1, allow_nan=False))
    fresh.replace(path)


def read_outcomes(out: Path, steps: Sequence[Step]) -> list[Outcome]:
    """What is known of each step, in their order; those without a result were not run."""
    found = []
    for step in steps:
        path = out / "steps" / f"{step.name}.json"
        if path.is_file():
            found.append(outcome_from(json.loads(path.read_text())))
        else:
            found.append(Outcome(step.name, step.title, "not run"))
    return found


def run_steps(
    steps: Sequence[Step], context: Context, *, seconds: float = math.inf, report: Callable[[str], None]
) -> Iterator[Outcome]:
    """Runs steps one after the other.

    Args:
        steps: Which.
        context: What they are told; is written to the directory.
        seconds: For all of them; none is started afterwards, and one that is running then is ended.
        report: Told what comes next.

    Yields:
        How each went, after it was written.
    """
    context.write()
    end = time.monotonic() + seconds
    for step in steps:
        left = end - time.monotonic()
        why = step.applies(context.machine)
        if why:
            outcome = Outcome(step.name, step.title, "does not apply", reason=why)
        elif left <= 0:
            outcome = Outcome(step.name, step.title, "not run", reason="the time for all steps was over")
        else:
            report(step.title)
            usual = TOY_SECONDS if context.toy else step.seconds
            outcome = _run(step, context, min(usual, left))
        write_outcome(context.out, outcome)
        yield outcome


def _run(step: Step, context: Context, seconds: float) -> Outcome:
    kind = type(step)
    result = context.out / "steps" / f"{step.name}.json"
    result.parent.mkdir(parents=True, exist_ok=True)
    result.unlink(missing_ok=True)
    log = result.with_suffix(".log")
    command = [sys.executable, "-m", "jax_mono.bringup", f"{kind.__module__}:{kind.__qualname__}", str(context.out)]
    started = time.monotonic()
    with log.open("wb") as output:
        # A session of its own: its children are ended with it.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            env=_environment(context),
        )  # fmt: skip
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end_session(process)
    took = time.monotonic() - started
    if result.is_file():
        return replace(outcome_from(json.loads(result.read_text())), seconds=took)
    if code is None:
        return Outcome(step.name, step.title, "hung", took, f"ended after {took:.0f} s; {_last_lines(log)}")
    return Outcome(step.name, step.title, "failed", took, f"exit code {code}; {_last_lines(log)}")


def _environment(context: Context) -> dict[str, str]:
    """For a step: other programs may want the GPU's memory, and a dry run must not touch a GPU."""
    changed = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONUNBUFFERED": "1"}
    if context.machine.platform == "cpu":
        changed["JAX_PLATFORMS"] = "cpu"
    return {**os.environ, **changed}


def _last_lines(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return "its log ends with: " + " | ".join(lines[-_TAIL:]) if lines else "it wrote nothing"
