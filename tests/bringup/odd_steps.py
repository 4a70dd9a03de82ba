"""Steps that go wrong in every way there is. Processes of the kit import this module by its name."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import ClassVar

from jax_mono.bringup.figures import Figure
from jax_mono.bringup.machine import Machine
from jax_mono.bringup.step import Context, Findings, Step


class Fine(Step):
    name: ClassVar[str] = "fine"
    title: ClassVar[str] = "a step that works"

    def run(self, context: Context) -> Findings:
        runs = context.out / "runs"
        runs.write_text((runs.read_text() if runs.is_file() else "") + "x")
        matrix = {"title": "times", "x": "to", "y": "from", "unit": "ns", "rows": [[1, 2], [3, 4]]}
        curve = {"title": "a curve", "x": "n", "y": "ns", "xs": [1, 2, 4], "ys": [5.0, 6.0, 9.0]}
        figure = Figure(name="latency", value=101.0, unit="ns", assumed=100, origin="a table", tolerance=0.05)
        details = {"matrices": {"times": matrix}, "curves": {"curve": curve}, "nothing": float("nan")}
        return Findings([figure], details, ["all is well"])


class Wrong(Step):
    name: ClassVar[str] = "wrong"
    title: ClassVar[str] = "a figure that nobody expected"

    def run(self, context: Context) -> Findings:
        def figure(name: str, value: float) -> Figure:
            return Figure(name=name, value=value, unit="GB/s", assumed=100, tolerance=0.1, better="higher")

        return Findings([figure("slow", 80.0), figure("fast", 120.0), figure("broken", float("nan"))])


class Hangs(Step):
    name: ClassVar[str] = "hangs"
    title: ClassVar[str] = "a step that hangs, with a child that hangs"
    seconds: ClassVar[float] = 3.0

    def run(self, context: Context) -> Findings:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
        (context.out / "child").write_text(str(child.pid))
        print("waiting for a word that never comes", flush=True)
        time.sleep(300)
        return Findings()


class Raises(Step):
    name: ClassVar[str] = "raises"
    title: ClassVar[str] = "a step that raises"

    def run(self, context: Context) -> Findings:
        raise RuntimeError("no | words")


class Dies(Step):
    name: ClassVar[str] = "dies"
    title: ClassVar[str] = "a step whose process dies"

    def run(self, context: Context) -> Findings:
        print("illegal address", flush=True)
        os._exit(42)


class Elsewhere(Step):
    name: ClassVar[str] = "elsewhere"
    title: ClassVar[str] = "a step for other machines"

    def applies(self, machine: Machine) -> str:
        return "needs a GPU" if machine.platform == "cpu" else ""

    def run(self, context: Context) -> Findings:
        raise AssertionError("must not run here")


STEPS = (Hangs(), Fine(), Wrong(), Raises(), Dies(), Elsewhere())
