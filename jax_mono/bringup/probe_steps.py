"""Steps that measure the hardware itself: hand-offs between dies and devices, pollers of one line, pages and dies."""

from __future__ import annotations

import itertools
from typing import Any, ClassVar

import numpy as np

from jax_mono import settings
from jax_mono.bringup import probes
from jax_mono.bringup.figures import Figure, holds
from jax_mono.bringup.machine import Machine
from jax_mono.bringup.page_statistics import centred
from jax_mono.bringup.pages import PageMap, Refusal, solve, verify
from jax_mono.bringup.region_fit import fit
from jax_mono.bringup.step import Context, Findings, Step
from jax_mono.topology import Topology

_SAMPLE = 8
"""Blocks that stand for the places of a device with one die."""

MOST_POLLERS = 64
"""Pollers of one line beyond which AMD's devices are said to collapse (docs/simulator.md)."""

_SHOWN = 128
"""Pages in the picture."""

_NEEDS_GPU = "needs a GPU"


class Flags(Step):
    """How long a word takes between blocks of each two dies."""

    name: ClassVar[str] = "flags"
    title: ClassVar[str] = "flags: a word from die to die"
    seconds: ClassVar[float] = 120.0

    def applies(self, machine: Machine) -> str:
        """Needs two threads that run at once."""
        return "needs two cores" if machine.platform == "cpu" and settings.cores() < 2 else ""

    def run(self, context: Context) -> Findings:
        """Measures every pair, in both directions at once."""
        machine, blocks = context.machine, _blocks(context.machine)
        rounds = 200 if context.toy else 2000
        if machine.platform == "cpu":
            time = probes.hand_off("cpu", blocks=2, first=0, second=1, rounds=rounds).nanoseconds
            return Findings([Figure(name="word between two threads", value=time, unit="ns")])
        places, chosen = _places(machine.platform, blocks)
        times = np.full((len(places), len(places)), np.nan)
        for (i, first), (j, last) in itertools.product(enumerate(chosen), enumerate(chosen)):
            first_block, second_block = first[0], last[-1]
            if first_block == second_block:
                continue
            made = probes.hand_off(
                machine.platform, blocks=blocks, first=first_block, second=second_block, rounds=rounds
            )
            # Blocks may land elsewhere in another launch.
            if len(set(made.dies)) > 1:
                i, j = places.index(int(made.dies[first_block])), places.index(int(made.dies[second_block]))
            times[i, j] = made.nanoseconds
        same = np.eye(len(places), dtype=bool)
        figures = []
        several = machine.described.dies.whole > 1
        parts = {"word within a die": times[same], "word between dies": times[~same]} if several else {"word": times}
        for name, part in parts.items():
            if not np.isnan(part).all():
                figures += _hand_off_figures(name, part, *_assumed_hand_off(machine))
        if several:
            expected = machine.described.dies.value
            figures.append(Figure(name="dies that blocks ran on", value=len(places), unit="dies", assumed=expected,
                                  origin=f"jax_mono.topology, {machine.topology}"))  # fmt: skip
        what = "die" if several else "block"
        names = {"places": places, "matrices": {"flags": _matrix("Word from block to block", what, times)}}
        return Findings(figures, names)


class Peers(Step):
    """How long a word takes between each two GPUs."""

    name: ClassVar[str] = "peers"
    title: ClassVar[str] = "peers: a word from GPU to GPU"
    seconds: ClassVar[float] = 120.0

    def applies(self, machine: Machine) -> str:
        """Needs two GPUs."""
        return "" if len(machine.gpus) > 1 else "needs two GPUs"

    def run(self, context: Context) -> Findings:
        """Measures every pair."""
        machine, gpus = context.machine, len(context.machine.gpus)
        times = np.full((gpus, gpus), np.nan)
        for writer, reader in itertools.combinations(range(gpus), 2):
            made = probes.hand_off(machine.platform, blocks=1, first=0, second=0, writer=writer, reader=reader)
            times[writer, reader] = times[reader, writer] = made.nanoseconds
        figures = _hand_off_figures("word between GPUs", times, *_assumed_hand_off(machine, across=True))
        return Findings(figures, {"matrices": {"peers": _matrix("Word from GPU to GPU", "GPU", times)}})


class Pollers(Step):
    """How a word slows down while more and more blocks poll it."""

    name: ClassVar[str] = "pollers"
    title: ClassVar[str] = "pollers: blocks that poll one word"
    seconds: ClassVar[float] = 120.0

    def applies(self, machine: Machine) -> str:
        """Needs a processor for each poller."""
        return _NEEDS_GPU if machine.platform == "cpu" else ""

    def run(self, context: Context) -> Findings:
        """Doubles the pollers until all blocks poll."""
        machine, blocks = context.machine, _blocks(context.machine)
        counts = [0, *(1 << i for i in range(blocks.bit_length()) if 1 << i < blocks - 2), blocks - 2]
        rounds = 200 if context.toy else 1000
        times = [
            probes.hand_off(
                machine.platform, blocks=blocks, first=blocks - 1, second=blocks - 2, rounds=rounds, pollers=count,
                limit_ms=10_000,
            ).nanoseconds
            for count in counts
        ]  # fmt: skip
        cliff = next((count for count, time in zip(counts, times, strict=True) if time > 2 * times[0]), None)
        figures = [
            Figure(name="word nobody else polls", value=times[0], unit="ns"),
            Figure(name=f"word that {counts[-1]} others poll", value=times[-1], unit="ns"),
        ]
        if cliff is None:
            remarks = [f"{counts[-1]} pollers do not make a word take twice as long"]
        else:
            reported = MOST_POLLERS if machine.platform == "rocm" else None
            remarks = [f"with {cliff} pollers a word takes more than twice as long"]
            figures.append(
                Figure(
                    name="pollers that double a word's time", value=cliff, unit="blocks", assumed=reported,
                    origin="reported by others, docs/simulator.md", tolerance=0.5, better="higher",
                )
            )  # fmt: skip
        curve = {
            "title": "Word by number of pollers", "x": "further blocks that poll it", "y": "ns", "xs": counts,
            "ys": times, "scale": "symlog",
        }  # fmt: skip
        return Findings(figures, {"curves": {"pollers": curve}}, remarks)


class Pages(Step):
    """Which page of memory lies near which die."""

    name: ClassVar[str] = "pages"
    title: ClassVar[str] = "pages: which memory lies on which die"
    seconds: ClassVar[float] = 300.0

    def applies(self, machine: Machine) -> str:
        """Needs device memory."""
        return _NEEDS_GPU if machine.platform == "cpu" else ""

    def run(self, context: Context) -> Findings:
        """Times mapped pages on the first GPU, solves, and holds the map against ordinary memory of every GPU."""
        machine, blocks = context.machine, _blocks(context.machine)
        topology = machine.described
        pages = 1024 if context.toy else 16384
        remarks = []
        try:
            times, xcds = probes.page_times(machine.platform, blocks=blocks, pages=pages, mapped=True)
        except probes.ProbeError as error:
            remarks.append(f"no mapped memory, ordinary memory instead: {error}")
            times, xcds = probes.page_times(machine.platform, blocks=blocks, pages=pages)
        np.savez_compressed(context.out / "pages.npz", times=times, xcds=xcds)
        figures = [Figure(name="read of a page, median", value=float(np.median(times)), unit="ns")]
        spread = float(np.median(times.max(axis=0) - times.min(axis=0)))
        figures.append(Figure(name="nearest to farthest XCD, median", value=spread, unit="ns"))
        drawn = {"matrices": {"pages": _first_pages(times)}}
        found = solve(times, topology)
        if isinstance(found, Refusal):
            if topology.dies.whole > 1:
                figures.append(holds("a map of pages was found", False, "tapes are laid without it"))
            return Findings(figures, drawn, [*remarks, f"no map of pages: {found.reason}"])
        details: dict[str, Any] = drawn | {
            "period": found.period, "pattern": found.pattern, "die_of_xcd": found.die_of_xcd,
            "confidence": found.confidence, "agreement": found.agreement, "order": _order(found, topology),
        }  # fmt: skip
        held = [self._holds(found, machine, gpu, blocks, pages) for gpu in range(len(machine.gpus))]
        origin = f"jax_mono.topology, {topology.name}"
        figures += [
            holds("a map of pages was found", True, "its own cross-check"),
            Figure(name="own pages are nearer by", value=found.nearer_ns, unit="ns"),
            Figure(
                name="dies with memory", value=found.dies, unit="dies", assumed=topology.io_dies.value, origin=origin
            ),
            Figure(name="consecutive bytes on a die", value=_granule(found), unit="bytes",
                   assumed=topology.granule_bytes.value or None, origin=origin),
            Figure(name="GPUs whose ordinary memory is the same", value=sum(held), unit="GPUs", assumed=len(held),
                   origin="the first GPU's map"),
        ]  # fmt: skip
        if found.period:
            figures.append(Figure(name="period of the map", value=found.period * probes.PAGE_BYTES, unit="bytes"))
        return Findings(figures, details, [*remarks, *found.as_expected(topology)])

    def _holds(self, found: PageMap, machine: Machine, gpu: int, blocks: int, pages: int) -> bool:
        times, _ = probes.page_times(machine.platform, blocks=blocks, device=gpu, pages=pages, sweeps=2)
        return isinstance(verify(found, times), PageMap)


def _blocks(machine: Machine) -> int:
    """One for every compute unit of a GPU."""
    if machine.platform == "cpu":
        return settings.cores()
    from jax_mono import native

    return native.gpu_report(machine.platform).gpus[0].multiprocessors


def _places(platform: probes.Platform, blocks: int) -> tuple[list[int], list[list[int]]]:
    """Numbers of the dies with the blocks on each; on a device with one die, some blocks instead."""
    dies = probes.hand_off(platform, blocks=blocks, first=0, second=1, rounds=1).dies
    numbers = sorted({int(die) for die in dies})
    if len(numbers) > 1:
        return numbers, [np.flatnonzero(dies == die).tolist() for die in numbers]
    some = [int(block) for block in np.linspace(0, blocks - 1, _SAMPLE)]
    return some, [[block] for block in some]


def _assumed_hand_off(machine: Machine, *, across: bool = False) -> tuple[float | None, str]:
    """Nanoseconds from the store of a word to its sight that the simulator reckons with, nothing else going on."""
    from jax_mono.simulate import timing

    try:
        known = timing(machine.topology)
    except ValueError:
        return None, ""
    stored = known.peer_ns if across else known.store_ns
    # A look begins half a trip too late on average.
    return stored.value + 1.5 * known.trip_ns.value, f"jax_mono.simulate.timing, {stored.origin}: {stored.note}"


def _hand_off_figures(name: str, times: np.ndarray, assumed: float | None, origin: str) -> list[Figure]:
    """Of times in nanoseconds; nan where none was measured."""
    return [
        Figure(
            name=f"{name}, median", value=float(np.nanmedian(times)), unit="ns", assumed=assumed, origin=origin,
            tolerance=0.25, better="lower",
        ),
        Figure(name=f"{name}, longest", value=float(np.nanmax(times)), unit="ns"),
    ]  # fmt: skip


def _granule(found: PageMap) -> float:
    """Bytes that lie on one die before the next, the shortest run of the map."""
    known = found.die[found.die >= 0]
    changes = np.flatnonzero(np.diff(known))
    return float(np.diff(changes).min() if len(changes) > 1 else len(known)) * probes.PAGE_BYTES


def _order(found: PageMap, topology: Topology) -> tuple[int, ...] | None:
    """The dies of a period where regions of the topology's hash exchange nothing else; None if the map has no such."""
    known = topology.address_hash
    if known is None or known.granule_bytes != probes.PAGE_BYTES:
        return None
    order = tuple(int(die) for die in found.die[: known.parts])
    if set(order) != set(range(found.dies)) or fit(found.die, order, known.region_bytes // probes.PAGE_BYTES).refusal:
        return None
    return order


def _first_pages(times: np.ndarray) -> dict[str, Any]:
    """What XCDs see of the first pages, to look at."""
    return {
        "title": "The first pages, without what all XCDs have in common", "x": "page", "y": "XCD", "unit": "ns",
        "rows": centred(times)[:, :_SHOWN].tolist(),
    }  # fmt: skip


def _matrix(title: str, what: str, times: np.ndarray) -> dict[str, Any]:
    return {"title": title, "x": f"to {what}", "y": f"from {what}", "unit": "ns", "rows": times.tolist()}


STEPS = (Flags(), Peers(), Pollers(), Pages())
