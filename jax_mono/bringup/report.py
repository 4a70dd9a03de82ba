"""The report: one JSON file, one page with the table of figures, and plots."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax_mono.bringup.figures import Figure
from jax_mono.bringup.step import Context, Outcome
from jax_mono.extras import MissingExtraError, require

_MARKS = {"worse": "**worse**", "differs": "**differs**"}
_ENDED_BADLY = ("failed", "hung")


def wrong_figures(outcomes: Sequence[Outcome]) -> list[Figure]:
    """Those that somebody should look at."""
    return [figure for outcome in outcomes for figure in outcome.findings.figures if figure.wrong]


def is_clean(outcomes: Sequence[Outcome]) -> bool:
    """Whether every step that ran came to its end, with figures as assumed or better."""
    return not wrong_figures(outcomes) and all(outcome.status not in _ENDED_BADLY for outcome in outcomes)


def write_report(context: Context, environment: dict[str, Any], outcomes: Sequence[Outcome]) -> list[Path]:
    """Writes ``report.json``, ``report.md`` and the plots; over those of an earlier run.

    Args:
        context: Where, and of what.
        environment: From :func:`jax_mono.bringup.machine.environment`.
        outcomes: Of all steps, those that were not run included.

    Returns:
        The files; without matplotlib there are no plots.
    """
    out = context.out
    record = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "size": context.size,
        "machine": context.machine.record(),
        "environment": environment,
        "clean": is_clean(outcomes),
        "steps": [json.loads(path.read_text()) for path in _step_files(out, outcomes)],
    }
    plots = [plot for outcome in outcomes for plot in _plots(out, outcome)]
    (out / "report.json").write_text(json.dumps(record, indent=1))
    (out / "report.md").write_text(_page(context, outcomes, plots))
    return [out / "report.json", out / "report.md", *plots]


def _step_files(out: Path, outcomes: Sequence[Outcome]) -> list[Path]:
    files = [out / "steps" / f"{outcome.step}.json" for outcome in outcomes]
    return [path for path in files if path.is_file()]


def _page(context: Context, outcomes: Sequence[Outcome], plots: Sequence[Path]) -> str:
    gpus = context.machine.gpus
    where = f"{len(gpus)} × {gpus[0]} ({context.machine.architecture})" if gpus else "CPU"
    wrong = len(wrong_figures(outcomes))
    bad = sum(outcome.status in _ENDED_BADLY for outcome in outcomes)
    verdict = f"{bad} steps ended badly, {wrong} figures are not as assumed" if bad or wrong else "nothing to look at"
    lines = [f"# Bring-up of {where}", "", f"{context.size} size; {verdict}.", ""]
    lines += ["| step | figure | assumed | measured | verdict |", "|---|---|---|---|---|"]
    for outcome in outcomes:
        for figure in outcome.findings.figures:
            origin = f" ({figure.origin})" if figure.origin else ""
            assumed = "" if figure.assumed is None else f"{figure.shown(figure.assumed)}{origin}"
            mark = _MARKS.get(figure.verdict, figure.verdict)
            lines.append(f"| {outcome.step} | {figure.name} | {assumed} | {figure.shown(figure.value)} | {mark} |")
    lines += ["", "| step | ended | seconds | |", "|---|---|---|---|"]
    for outcome in outcomes:
        notes = "; ".join(filter(None, (outcome.reason, *outcome.findings.remarks))).replace("|", "\\|")
        lines.append(f"| {outcome.title} | {outcome.status} | {outcome.seconds:.0f} | {notes.replace(chr(10), ' ')} |")
    lines += ["", *(f"![{plot.stem}]({plot.name})" for plot in plots), ""]
    return "\n".join(lines)


def _plots(out: Path, outcome: Outcome) -> list[Path]:
    """Draws what a step left under ``matrices`` and ``curves`` in its details."""
    details = outcome.findings.details
    drawn = []
    try:
        for kind, draw in (("matrices", _draw_matrix), ("curves", _draw_curve)):
            for name, data in details.get(kind, {}).items():
                figure = require("matplotlib.figure", "plot").Figure(figsize=(6, 4.2), layout="constrained")
                draw(figure, data)
                figure.axes[0].set_title(data["title"])
                drawn.append(out / f"{outcome.step}-{name}.svg")
                figure.savefig(drawn[-1])
    except MissingExtraError:
        return []
    return drawn


def _draw_matrix(figure: Any, data: dict[str, Any]) -> None:
    axes = figure.subplots()
    rows = [[math.nan if value is None else value for value in row] for row in data["rows"]]
    image = axes.imshow(rows, aspect="auto", interpolation="nearest")
    axes.set(xlabel=data["x"], ylabel=data["y"])
    figure.colorbar(image, label=data["unit"])


def _draw_curve(figure: Any, data: dict[str, Any]) -> None:
    axes = figure.subplots()
    axes.plot(data["xs"], data["ys"], marker="o")
    axes.set(xlabel=data["x"], ylabel=data["y"], xscale=data.get("scale", "linear"))
    axes.grid(alpha=0.3)
