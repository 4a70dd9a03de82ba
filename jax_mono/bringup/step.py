"""A step of the kit: something to measure or to prove, in a process of its own."""

from __future__ import annotations

import contextlib
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from jax_mono.bringup import figures, machine
from jax_mono.bringup.figures import Figure
from jax_mono.bringup.machine import Machine

Size = Literal["toy", "full"]
"""``toy``: seconds on two CPU cores, to see that the kit works. ``full``: what a report should have."""

Status = Literal["done", "failed", "hung", "does not apply", "not run"]


@dataclass(frozen=True)
class Context:
    """What steps are told.

    Attributes:
        out: Directory of the report.
        machine: Where they run.
        size: How much they do.
    """

    out: Path
    machine: Machine
    size: Size

    @property
    def toy(self) -> bool:
        """Whether to be quick."""
        return self.size == "toy"

    def write(self) -> None:
        """Leaves itself in the directory, for the processes of the steps."""
        record = {"machine": self.machine.record(), "size": self.size}
        (self.out / "context.json").write_text(json.dumps(record, indent=1))


def read_context(out: Path) -> Context:
    """What :meth:`Context.write` left."""
    record = json.loads((out / "context.json").read_text())
    return Context(out, machine.from_record(record["machine"]), record["size"])


@dataclass(frozen=True)
class Findings:
    """What a step returns.

    Attributes:
        figures: For the table.
        details: Whatever else is worth keeping, for JSON: matrices, records of commands.
        remarks: Sentences for the report.
    """

    figures: Sequence[Figure] = ()
    details: dict[str, Any] = field(default_factory=dict)
    remarks: Sequence[str] = ()


class Step(ABC):
    """One step. Classes without state: a process that is told the name of the class makes its own.

    Attributes:
        name: On the command line.
        title: In the report.
        seconds: Deadline at full size; at toy size :data:`TOY_SECONDS`.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    seconds: ClassVar[float] = 600.0

    def applies(self, machine: Machine) -> str:
        """Why the step makes no sense on a machine; empty if it does."""
        return ""

    @abstractmethod
    def run(self, context: Context) -> Findings:
        """Does it. Whatever it raises is its failure; it is killed at its deadline, with all its children."""


TOY_SECONDS = 60.0
"""Deadline of every step at toy size."""


@dataclass(frozen=True)
class Outcome:
    """How a step went.

    Attributes:
        step: Its name.
        title: Its title.
        status: How it ended.
        seconds: How long it took.
        reason: Why it did not end well.
        findings: What it found.
    """

    step: str
    title: str
    status: Status
    seconds: float = 0.0
    reason: str = ""
    findings: Findings = field(default_factory=Findings)

    def record(self) -> dict[str, Any]:
        """For JSON."""
        record = asdict(self)
        record["findings"]["figures"] = [figure.record() for figure in self.findings.figures]
        return record


def outcome_from(record: dict[str, Any]) -> Outcome:
    """The outcome of a record."""
    found = record["findings"]
    made = [figures.from_record(figure) for figure in found["figures"]]
    return Outcome(**(record | {"findings": Findings(made, found["details"], tuple(found["remarks"]))}))


def command(*arguments: object) -> dict[str, Any]:
    """Runs a ``jax-mono`` command that prints JSON, in this process.

    Returns:
        The record, with its exit code as ``exit_code``.

    Raises:
        RuntimeError: It printed none.
    """
    from jax_mono.cli import main

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = main([str(argument) for argument in arguments])
    try:
        record = json.loads(printed.getvalue())
    except json.JSONDecodeError as error:
        words = " ".join(map(str, arguments))
        raise RuntimeError(f"jax-mono {words} printed no record (exit code {code}); see this step's log") from error
    return record | {"exit_code": code}
