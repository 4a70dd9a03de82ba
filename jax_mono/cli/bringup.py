"""``jax-mono bringup``: everything worth measuring on a new node, and one report."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_mono.cli import options
from jax_mono.cli.console import note

if TYPE_CHECKING:
    from jax_mono.bringup.step import Context, Outcome

_DESCRIPTION = """\
Measures a node and compares every figure with what the project assumes of it. Each step runs in a process of its own
with a deadline, so a step that fails or hangs costs its own result only. The report is a directory: report.md,
report.json, plots, and a log of every step.

  jax-mono bringup --out report                  on a node with GPUs; an hour, most of it tests
  jax-mono bringup --out report --skip parity    without the tests: minutes
  jax-mono bringup --out report --resume         what has not come to its end yet
  jax-mono bringup --out report --only pages     once more, into the same report
  jax-mono bringup --out report --dry-run        on a CPU, quickly: is the kit itself in order?
  jax-mono bringup --list

Exit code 1 if a step failed or hung, or a figure is not as assumed; the report is complete in any case.
docs/mi300x.md says how to read it and where to send it.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Declares the command."""
    parser = options.command(subparsers, "bringup", run, "measure a new node and write a report", _DESCRIPTION)
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("bringup"), help="directory of the report")
    chosen = parser.add_argument_group("steps")
    chosen.add_argument("--only", metavar="A,B", type=_names, default=[], help="run these; others keep their results")
    chosen.add_argument("--skip", metavar="A,B", type=_names, default=[], help="leave these out")
    chosen.add_argument("--resume", action="store_true", help="leave out what has come to its end in that directory")
    chosen.add_argument("--list", action="store_true", help="print the steps and end")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, at toy size")
    parser.add_argument("--size", choices=("toy", "full"), default="full", help="how much each step does")
    parser.add_argument("--seconds", metavar="S", type=options.seconds, default=math.inf, help="for all steps together")
    return parser


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def run(arguments: argparse.Namespace) -> int:
    """Runs the steps."""
    from jax_mono.bringup import kit
    from jax_mono.bringup.report import is_clean

    if arguments.list:
        for step in kit.STEPS:
            print(f"{step.name:10} {step.title}")
        return 0
    outcomes = kit.bring_up(
        arguments.out,
        size="toy" if arguments.dry_run else arguments.size,
        dry=arguments.dry_run,
        only=arguments.only,
        skip=arguments.skip,
        resume=arguments.resume,
        seconds=arguments.seconds,
        begun=lambda context: _announce(context, arguments.quiet),
        report=lambda title: note(title, quiet=arguments.quiet),
        done=_print,
    )
    print(f"report: {arguments.out / 'report.md'}")
    return 0 if is_clean(outcomes) else 1


def _announce(context: Context, quiet: bool) -> None:
    machine = context.machine
    what = f"{len(machine.gpus)} x {machine.gpus[0]}" if machine.gpus else "no GPU: steps that need one are left out"
    note(f"{what}; compared with {machine.topology}", quiet=quiet)


def _print(outcome: Outcome) -> None:
    print(
        f"{outcome.status:14} {outcome.title} ({outcome.seconds:.0f} s){': ' if outcome.reason else ''}{outcome.reason}"
    )
    for figure in outcome.findings.figures:
        assumed = "" if figure.assumed is None else f", assumed {figure.shown(figure.assumed)}"
        print(f"{'':14}   {figure.name}: {figure.shown(figure.value)}{assumed}: {figure.verdict}")
    for remark in outcome.findings.remarks:
        print(f"{'':14}   {remark}")
