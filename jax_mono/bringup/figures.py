"""Measured figures beside what the project assumed of them, and whether they agree."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["as assumed", "better", "worse", "differs", "measured"]
"""``measured``: nothing was assumed."""


_YES_OR_NO = "yes or no"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One number of a report.

    Attributes:
        name: What it is.
        value: As measured.
        unit: Of both numbers.
        assumed: What the project takes it for, or None.
        origin: Where that comes from.
        tolerance: Relative difference that still counts as agreement; 0 for numbers that must be the same.
        better: Which way is good news, for the verdict.
    """

    name: str
    value: float
    unit: str
    assumed: float | None = None
    origin: str = ""
    tolerance: float = 0.0
    better: Literal["higher", "lower", "neither"] = "neither"

    @property
    def verdict(self) -> Verdict:
        """How the measurement compares; what is not a number is never as assumed."""
        if self.assumed is None:
            return "measured"
        if abs(self.value - self.assumed) <= self.tolerance * abs(self.assumed):
            return "as assumed"
        if self.better == "neither" or math.isnan(self.value):
            return "differs"
        return "better" if (self.value > self.assumed) == (self.better == "higher") else "worse"

    @property
    def wrong(self) -> bool:
        """Whether somebody should look at it."""
        return self.verdict in ("worse", "differs")

    def shown(self, value: float) -> str:
        """One of its two numbers in words."""
        if self.unit == _YES_OR_NO:
            return "yes" if value else "no"
        return f"{value:,.4g} {self.unit}".rstrip()

    def record(self) -> dict[str, Any]:
        """For JSON, verdict included."""
        return asdict(self) | {"verdict": self.verdict}


def holds(name: str, value: bool, origin: str) -> Figure:
    """A claim that must be true, as a figure of 1 or 0."""
    return Figure(name=name, value=float(value), unit=_YES_OR_NO, assumed=1.0, origin=origin)


def from_record(record: dict[str, Any]) -> Figure:
    """The figure of a record; its verdict is made anew."""
    fields = {name: value for name, value in record.items() if name != "verdict"}
    value = fields["value"]  # JSON knows no nan
    return Figure(**(fields | {"value": math.nan if value is None else value}))
