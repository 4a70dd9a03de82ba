"""A step that measures what placement is worth: the same model with tapes on their blocks' sides, and laid anywhere.

On their sides by the order of granules alone, and, if the pages of the tapes' own memory tell how dies are exchanged,
following that, too.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from jax_mono.bringup import probes
from jax_mono.bringup.figures import Figure, holds
from jax_mono.bringup.machine import Machine
from jax_mono.bringup.pages import Refusal
from jax_mono.bringup.step import Context, Findings, Step
from jax_mono.topology import Topology

if TYPE_CHECKING:
    from jax_mono.config import ModelConfig
    from jax_mono.decoder import Decoder
    from jax_mono.plan import Plan
    from jax_mono.simulate import Timing

_GB = 1e9
_POSITION = 64
"""In the middle of the tokens that are generated."""

_LINES = 4
"""Reads of each page of the tapes, per sweep: there are a million pages."""

_OFF = (0,)
"""The pattern of tapes in one piece."""


@dataclass(frozen=True)
class Pattern:
    """Which pattern of sides tapes are laid by.

    Attributes:
        sides: Of consecutive granules, over one period; None for the topology's own.
        origin: For the report.
    """

    sides: tuple[int, ...] | None
    origin: str


class Placement(Step):
    """Stream rate and speed of decoding with tapes on their blocks' sides of a GPU, and with tapes laid anywhere."""

    name: ClassVar[str] = "placement"
    title: ClassVar[str] = "placement: tapes on their own sides, and anywhere"
    seconds: ClassVar[float] = 900.0

    def applies(self, machine: Machine) -> str:
        """Needs memory that is not equally near to all blocks."""
        if machine.platform == "cpu":
            return "needs a GPU of several dies"
        if machine.described.granule_sides == _OFF:
            return f"needs a GPU of several dies: all memory of {machine.topology} is equally near"
        return ""

    def run(self, context: Context) -> Findings:
        """Measures all in turn, several times over, on one GPU."""
        from jax_mono.cli.models import find_config
        from jax_mono.config import ConfigError

        # Arrays must start where a period does; JAX's own pool of memory does not promise that.
        os.environ.setdefault("XLA_PYTHON_CLIENT_ALLOCATOR", "platform")
        machine, model = context.machine, "tiny-laneformer" if context.toy else "laneformer-2b"
        pattern = measured_pattern(context)
        remarks = [f"tapes on their own sides lie by {pattern.origin}"]
        shape = find_config(model), machine.described, _units(machine)
        try:
            plans = plans_of(*shape, pattern.sides)
        except ConfigError as error:
            remarks.append(f"plans cannot use it, and take the usual pattern: {error}")
            plans = plans_of(*shape, None)
        if not plans["on"].placement.interleaved:
            remarks.append("the usual pattern needs too much memory: all tapes are in one piece")
        decoders = {name: _decoder(plan) for name, plan in plans.items()}
        following = _following(plans["on"], machine)
        if isinstance(following, Refusal):
            remarks.append(f"no tapes follow exchanged dies: {following.reason}")
        else:
            decoders["following"], more = following
            plans["following"] = plans["on"]
            remarks += more
        rounds = 1 if context.toy else 3
        rates = _in_turn(decoders, rounds, _stream_rate)
        figures = _compared("stream", "GB/s", rates, _assumed_rates(machine, plans))
        details: dict[str, Any] = {
            "pattern": plans["on"].placement.pattern,
            "groups": plans["on"].num_devices,
            "blocks": plans["on"].num_blocks,
            "stream_gb_per_s": rates,
        }
        try:
            speeds = _in_turn(decoders, rounds, lambda decoder: _speed(decoder, 8 if context.toy else 128))
        except RuntimeError as error:  # JAX's own; how fast tapes come is worth a report all the same
            figures.append(holds("both decode", False, "the step itself"))
            return Findings(figures, details, [*remarks, f"decoding failed: {error}"])
        details["tokens_per_s"] = speeds
        figures += _compared(model, "tokens/s", speeds, _assumed_speeds(machine, plans))
        return Findings(figures, details, remarks)


def measured_pattern(context: Context) -> Pattern:
    """What the step ``pages`` has found on this machine, if it is a pattern that plans can use; else the usual one."""
    usual = Pattern(None, "the usual pattern: no map of pages was measured")
    try:
        record = json.loads((context.out / "steps" / "pages.json").read_text())
    except FileNotFoundError:
        return usual
    details = record["findings"]["details"]
    sides = details.get("order") or details.get("pattern")
    if not sides:
        return usual
    topology = context.machine.described
    dies = range(topology.dies.whole)
    if details["die_of_xcd"] != [topology.io_die_of(die) for die in dies]:
        return Pattern(None, "the usual pattern: the measured map has dies in another order than plans have")
    return Pattern(tuple(sides), "the measured map of pages")


def plans_of(config: ModelConfig, topology: Topology, units: int, sides: tuple[int, ...] | None) -> dict[str, Plan]:
    """Two plans of the same shape for one GPU of so many compute units: with placement ``on`` and ``off``.

    Raises:
        ConfigError: Plans cannot have that pattern of sides.
    """
    from jax_mono.cut import default_blocks, default_devices
    from jax_mono.plan import GPU, make_plan

    groups = default_devices(config, on_cpu=False)
    blocks = default_blocks(config, groups, units)
    return {
        name: make_plan(config, devices=groups, blocks=blocks, target=GPU, topology=topology, pattern=pattern)
        for name, pattern in (("on", sides), ("off", _OFF))
    }


def _units(machine: Machine) -> int:
    from jax_mono import native

    return native.gpu_report(machine.platform).gpus[0].multiprocessors


def _decoder(plan: Plan) -> Decoder:
    from jax_mono.decoder import Decoder
    from jax_mono.random_tapes import random_tapes

    return Decoder(plan, random_tapes(plan), context=256)


def _following(plan: Plan, machine: Machine) -> tuple[Decoder, list[str]] | Refusal:
    """A decoder whose tapes follow the exchanges of dies in their own memory, with remarks; or why there is none."""
    if not plan.placement.region_periods:
        return Refusal("the plan knows no regions of memory that exchange granules")
    from jax_mono.bringup.tape_swizzle import follow

    decoder, units = _decoder(plan), _units(machine)

    def times(address: int, pages: int) -> np.ndarray:
        return probes.page_times(
            machine.platform, blocks=units, pages=pages, lines=_LINES, sweeps=3, address=address, limit_ms=60_000
        )[0]

    try:
        found = follow(plan, decoder.tapes, machine.described, times)
    except probes.ProbeError as error:
        return Refusal(str(error))
    if isinstance(found, Refusal):
        return found
    decoder.tapes, remarks = found
    return decoder, remarks


def _in_turn(decoders: dict[str, Decoder], rounds: int, measure: Callable[[Decoder], float]) -> dict[str, list[float]]:
    """Measurements of each, one after the other in every round: clocks and neighbours change."""
    found: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(rounds):
        for name, decoder in decoders.items():
            found[name].append(measure(decoder))
    return found


def _stream_rate(decoder: Decoder) -> float:
    from jax_mono import limit

    size = limit.bytes_per_token(decoder.plan, decoder.tapes)
    return size / limit.stream_seconds(decoder.plan, decoder.tapes) / _GB


def _speed(decoder: Decoder, tokens: int) -> float:
    from jax_mono.cli.bench_runs import timed_run

    return timed_run(decoder, [1, 2, 3, 4], tokens).tokens_per_s


def _timing(machine: Machine) -> Timing | None:
    from jax_mono.simulate import timing

    try:
        return timing(machine.topology)
    except ValueError:
        return None


def _assumed_rates(machine: Machine, plans: dict[str, Plan]) -> dict[str, float]:
    known = _timing(machine)
    return {} if known is None else {name: known.tape_rate(plan.placement) for name, plan in plans.items()}


def _assumed_speeds(machine: Machine, plans: dict[str, Plan]) -> dict[str, float]:
    from jax_mono.simulate import simulate

    known = _timing(machine)
    if known is None:
        return {}
    return {
        name: simulate(plan, known, groups=plan.num_devices, position=_POSITION).tokens_per_second
        for name, plan in plans.items()
    }


def _compared(what: str, unit: str, found: dict[str, list[float]], assumed: dict[str, float]) -> list[Figure]:
    """A figure of each, and one of what placement gains."""
    words = {"on": "on their own sides", "off": "anywhere", "following": "that follow exchanged dies"}
    values = {name: statistics.median(times) for name, times in found.items()}
    origin = "jax-mono simulate" if assumed else ""
    figures = [
        Figure(
            name=f"{what}, tapes {words[name]}", value=value, unit=unit, assumed=assumed.get(name), origin=origin,
            tolerance=0.1, better="higher",
        )
        for name, value in values.items()
    ]  # fmt: skip
    gain = assumed["on"] / assumed["off"] if assumed else None
    gains = {"on": "gain of placement", "following": "gain of following exchanged dies"}
    figures += [
        Figure(
            name=f"{what}, {gain_name}", value=values[name] / values["off"], unit="times", assumed=gain,
            origin=origin, tolerance=0.05, better="higher",
        )
        for name, gain_name in gains.items()
        if name in values
    ]  # fmt: skip
    return figures
