"""The whole kit: looks at the machine, runs the steps that were asked for, writes the report."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jax_mono.bringup import machine, placement_step, probe_steps, steps
from jax_mono.bringup.machine import Machine
from jax_mono.bringup.report import write_report
from jax_mono.bringup.runner import read_outcomes, run_steps
from jax_mono.bringup.step import Context, Outcome, Size, Step

STEPS: tuple[Step, ...] = (
    steps.Doctor(),
    *probe_steps.STEPS,
    steps.Stream(),
    steps.Faults(),
    steps.Bench(),
    placement_step.Placement(),
    steps.Parity(),
)
"""All of them, in the order in which they run: what explains the others first."""

_LOOK_SECONDS = 60


def bring_up(
    out: Path,
    *,
    size: Size = "full",
    dry: bool = False,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    resume: bool = False,
    seconds: float = math.inf,
    known: Sequence[Step] = STEPS,
    begun: Callable[[Context], None] = lambda _: None,
    report: Callable[[str], None] = lambda _: None,
    done: Callable[[Outcome], None] = lambda _: None,
) -> list[Outcome]:
    """Runs steps and writes the report, anew after every step.

    Args:
        out: Directory of the report; is made.
        size: How much each step does.
        dry: Whether to leave GPUs alone.
        only: Names of the steps to run; all if empty. Others keep the results that they have there.
        skip: Names of those to leave out.
        resume: Whether to leave out those that came to their end there.
        seconds: For all steps together.
        known: The steps.
        begun: Told once what machine this is.
        report: Told what comes next.
        done: Told how each step went.

    Returns:
        How each known step went, now or earlier.

    Raises:
        ValueError: There is no step of such a name.
    """
    names = [step.name for step in known]
    for name in (*only, *skip):
        if name not in names:
            raise ValueError(f"there is no step {name!r}; there are {', '.join(names)}")
    out.mkdir(parents=True, exist_ok=True)
    context = Context(out, Machine("cpu") if dry else _look(), size)
    begun(context)
    ended = {outcome.step for outcome in read_outcomes(out, known) if outcome.status in ("done", "does not apply")}
    chosen = [
        step
        for step in known
        if (not only or step.name in only) and step.name not in skip and not (resume and step.name in ended)
    ]
    environment = machine.environment()
    for outcome in run_steps(chosen, context, seconds=seconds, report=report):
        done(outcome)
        write_report(context, environment, read_outcomes(out, known))
    outcomes = read_outcomes(out, known)
    write_report(context, environment, outcomes)
    return outcomes


def _look() -> Machine:
    """The machine, found by a process of its own: a driver may hang."""
    code = "import json; from jax_mono.bringup import machine; print(json.dumps(machine.look().record()))"
    try:
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=_LOOK_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(
            f"the GPU driver did not answer within {_LOOK_SECONDS} s; see the system's log, or pass --dry-run"
        ) from error
    if ran.returncode:
        raise RuntimeError(f"cannot look at this machine: {ran.stderr.strip().splitlines()[-1]}")
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return machine.from_record(found)
