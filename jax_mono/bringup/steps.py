"""Steps that run what the project has anyway: doctor, stream limit, tests, bench, faults."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from jax_mono.bringup.figures import Figure, holds
from jax_mono.bringup.machine import Machine
from jax_mono.bringup.step import Context, Findings, Step, command

if TYPE_CHECKING:
    from jax_mono.decoder import Decoder

_GB = 1e9
_WAIT_LIMIT_MS = 300
"""Of waits for words that never come."""

_SLOW_S = 5.0
"""That an error may come later than its bound: tracing the call, the call itself, and the way to Python."""

_AWAITED = {
    "qkv rows": (1, 1, 2),
    "attention parts": (0, 0, 1),
    "attention inbox": (0, 1, 2),
    "residual after attention": (1, 0, 3),
    "activations": (0, 1, 0),
    "mlp inbox": (1, 0, 1),
    "residual after mlp": (1, 1, 4),
    "final inbox": (1, 1, 0),
    "final sum": (0, 0, 0),
    "summary": (1, 1, 0),
    "logits": (0, 1, 0),
    "choice": (1, 0, 0),
}
"""Device, block and layer of a hand-off that somebody waits for, in tiny-laneformer on two devices of two blocks."""

_PREDICTED = 0.10
"""By how much predictions of the simulator were off where they were compared (docs/simulator.md)."""


class Doctor(Step):
    """What the machine can run, and a self-test of every platform."""

    name: ClassVar[str] = "doctor"
    title: ClassVar[str] = "doctor: what this machine can run"
    seconds: ClassVar[float] = 300.0

    def run(self, context: Context) -> Findings:
        """Runs ``jax-mono doctor``."""
        record = command("doctor", "--json")
        figures = [holds("decoding works where JAX decodes", record["works"], "jax-mono doctor")]
        found = context.machine
        if found.platform != "cpu":
            from jax_mono import native

            topology = found.described
            gpus = native.gpu_report(found.platform).gpus
            figures.append(Figure(name="GPUs", value=len(gpus), unit="GPUs"))
            for name, value, assumed in (
                ("compute units of a GPU", gpus[0].multiprocessors, topology.units),
                ("shared memory of a block", gpus[0].shared_memory, topology.near_bytes.value),
            ):
                origin = f"jax_mono.topology, {topology.name}"
                figures.append(Figure(name=name, value=value, unit="", assumed=assumed, origin=origin))
        problems = [entry for entry in record["findings"] if entry["status"] == "fail"]
        remarks = [f"{entry['section']}, {entry['name']}: {entry['text']}" for entry in problems]
        return Findings(figures, record, remarks)


class Stream(Step):
    """With what rate the tapes of a model pass through the resident program's blocks, without arithmetic."""

    name: ClassVar[str] = "stream"
    title: ClassVar[str] = "stream: bandwidth of the tapes"
    seconds: ClassVar[float] = 300.0

    def run(self, context: Context) -> Findings:
        """Measures :func:`jax_mono.limit.stream_seconds`, or plain reads on a CPU."""
        from jax_mono import limit

        decoder = _decoder(_model(context))
        plan, tapes = decoder.plan, decoder.tapes
        details: dict[str, Any] = {"model": _model(context), "blocks": plan.num_blocks, "bytes": tapes.nbytes}
        if context.machine.platform == "cpu":
            rates = limit.read_bandwidth(plan, tapes)
            details["bytes_per_s_by_streams"] = rates
            remarks = ["tapes of a toy model lie in the caches"] if context.toy else []
            figure = Figure(name="tapes, bytes per second", value=max(rates.values()) / _GB, unit="GB/s")
            return Findings([figure], details, remarks)
        passes = [limit.stream_seconds(plan, tapes) for _ in range(1 if context.toy else 3)]
        details["seconds_per_pass"] = passes
        rate = limit.bytes_per_token(plan, tapes) / min(passes) / _GB
        assumed, origin = _assumed_stream(context.machine)
        figure = Figure(
            name="tapes, bytes per second", value=rate, unit="GB/s", assumed=assumed, origin=origin, tolerance=0.05,
            better="higher",
        )  # fmt: skip
        peak = context.machine.described.memory_rate.value / _GB
        share = Figure(name="tapes, part of the memory's peak", value=rate / peak, unit="of 1")
        return Findings([figure, share], details)


class Parity(Step):
    """The GPU test suite, in its own process; on CPUs its rehearsal."""

    name: ClassVar[str] = "parity"
    title: ClassVar[str] = "parity: tests/gpu"
    seconds: ClassVar[float] = 7200.0

    def applies(self, machine: Machine) -> str:
        """Needs a checkout."""
        if _checkout() is None:
            return "needs tests/gpu, which is not installed with the package; run the kit from a checkout"
        return "" if importlib.util.find_spec("pytest") else "needs pytest; pip install pytest"

    def run(self, context: Context) -> Findings:
        """Runs pytest and reads its summary."""
        tests = ["tests/gpu"]
        if context.toy:
            tests = ["tests/gpu/test_parity.py::test_a_laneformer_s_logits_hardly_depend_on_how_it_is_cut[1]"]
        elif context.machine.platform == "cpu":
            tests = ["tests/gpu/test_parity.py"]
        started = time.monotonic()
        log = context.out / "steps" / "pytest.log"
        print(f"pytest writes to {log}", flush=True)
        with log.open("wb") as output:
            ran = subprocess.run(
                [sys.executable, "-m", "pytest", *tests, "-v", "-rfE", "-p", "no:cacheprovider"],
                cwd=_checkout(),
                env={**os.environ, "JAX_MONO_TEST_GPU": "1"},
                stdout=output,
                stderr=output,
            )
        written = log.read_text(errors="replace")
        counts = summary(written)
        if not counts.get("passed") and not counts.get("failed"):
            raise RuntimeError(f"pytest ran no test (exit code {ran.returncode}); see {log}")
        failed = counts.get("failed", 0) + counts.get("error", 0) + counts.get("errors", 0)
        figures = [
            Figure(name="tests passed", value=counts.get("passed", 0), unit="tests"),
            Figure(name="tests failed", value=failed, unit="tests", assumed=0, origin="tests/gpu"),
            Figure(name="tests skipped", value=counts.get("skipped", 0), unit="tests"),
        ]
        broken = [line for line in written.splitlines() if line.startswith(("FAILED", "ERROR"))]
        return Findings(figures, {"tests": tests, "seconds": time.monotonic() - started}, broken[:20])


class Bench(Step):
    """Speed of decoding beside the limit of the same tapes, on one device and on all of them."""

    name: ClassVar[str] = "bench"
    title: ClassVar[str] = "bench: decoding, on one device and on all"
    seconds: ClassVar[float] = 900.0

    def run(self, context: Context) -> Findings:
        """Runs ``jax-mono bench`` and asks the simulator for the same numbers."""
        model = _model(context)
        work = ("--prompt-tokens", 4, "--new-tokens", 8, "--runs", 1) if context.toy else ("--new-tokens", 128)
        figures, details = [], {}
        for devices in _device_counts(context):
            form = ("--devices", devices, "--form", "mesh") if devices > 1 else ()  # one is divided as is best
            record = command("bench", "-q", "--model", model, "--random-weights", "--json", *form, *work)
            if record["exit_code"]:
                raise RuntimeError(f"bench on {devices} devices failed with exit code {record['exit_code']}")
            details[f"{devices} devices"] = record
            assumed, origin = _predicted(context, record)
            figures.append(
                Figure(
                    name=f"{model}, {devices} device{'s' if devices > 1 else ''}",
                    value=record["tokens_per_s"],
                    unit="tokens/s",
                    assumed=assumed,
                    origin=origin,
                    tolerance=_PREDICTED,
                    better="higher",
                )
            )
            reached = record[f"fraction_of_{record['limit']}"]
            figures.append(Figure(name=f"part of the limit, {devices}", value=reached, unit="of 1"))
        return Findings(figures, details)


class Faults(Step):
    """A hand-off of every kind gets lost: one error that names it, within its bound, and the next call works."""

    name: ClassVar[str] = "faults"
    title: ClassVar[str] = "faults: hand-offs that get lost"
    seconds: ClassVar[float] = 300.0

    def run(self, context: Context) -> Findings:
        """Loses them."""
        import jax

        from jax_mono import native
        from jax_mono.call import LostHandoff

        os.environ["JAX_MONO_WAIT_LIMIT_MS"] = "20000"  # while it compiles
        decoder, text = _decoder("tiny-laneformer", devices=2, blocks=2), [1, 2, 3, 4]
        good = decoder.score(text, top_logprobs=2).logprobs.tolist()
        channels = native.CHANNELS[:: 5 if context.toy else 1]
        named, worked, late, messages = 0, 0, 0.0, {}
        for channel in channels:
            os.environ["JAX_MONO_WAIT_LIMIT_MS"] = str(_WAIT_LIMIT_MS)
            device, block, layer = _AWAITED[channel]
            lost = LostHandoff(device=device, block=block, layer=layer, channel=channel)
            started, message = time.monotonic(), "no error"
            try:
                decoder.score(text, top_logprobs=2, lost=lost)
            except jax.errors.JaxRuntimeError as error:
                message = str(error)
            late = max(late, time.monotonic() - started - _WAIT_LIMIT_MS / 1e3)
            messages[channel] = message
            named += f"'{channel}'" in message
            os.environ["JAX_MONO_WAIT_LIMIT_MS"] = "20000"
            worked += decoder.score(text, top_logprobs=2).logprobs.tolist() == good
        count = len(channels)
        origin = "every channel of jax_mono.native.CHANNELS"
        figures = [
            Figure(name="lost hand-offs that were named", value=named, unit="kinds", assumed=count, origin=origin),
            Figure(name="right calls after them", value=worked, unit="calls", assumed=count, origin="the call before"),
            Figure(
                name="latest error after its bound",
                value=late,
                unit="s",
                assumed=_SLOW_S,
                origin="the kit's own bound",
                better="lower",
            ),
        ]
        return Findings(figures, {"messages": messages})


def summary(output: str) -> dict[str, int]:
    """The counts in the last line of pytest's output, by kind."""
    for line in reversed(output.splitlines()):
        counts = re.findall(r"(\d+) (passed|failed|skipped|errors?|deselected|xfailed)", line)
        if counts and " in " in line:
            return {kind: int(count) for count, kind in counts}
    return {}


def _checkout() -> Path | None:
    """Where the tests are: around this package, or here."""
    found = (path for path in (Path(__file__).parents[2], Path.cwd()) if (path / "tests" / "gpu").is_dir())
    return next(found, None)


def _model(context: Context) -> str:
    return "tiny-laneformer" if context.toy else "laneformer-2b"


def _decoder(model: str, *, devices: int | None = None, blocks: int | None = None) -> Decoder:
    """A decoder with random weights on JAX's default device."""
    from jax_mono.cli.models import find_config
    from jax_mono.decoder import Decoder

    return Decoder.random(find_config(model), dtype="bfloat16", devices=devices, blocks=blocks, context=256)


def _device_counts(context: Context) -> list[int]:
    """One device, and as many as there are if the lanes can be shared among them."""
    most = max((count for count in (1, 2, 4, 8) if count <= len(context.machine.gpus)), default=1)
    return [1] if most == 1 else [1, most]


def _assumed_stream(machine: Machine) -> tuple[float | None, str]:
    """GB/s of tapes that the simulator takes the device for."""
    from jax_mono.simulate import timing

    try:
        known = timing(machine.topology)
    except ValueError:
        return None, ""
    rate = known.placed_rate  # plans for a GPU of several dies lay tapes on the blocks' sides
    return rate.value, f"jax_mono.simulate.timing, {rate.origin}: {rate.note}"


def _predicted(context: Context, record: dict[str, Any]) -> tuple[float | None, str]:
    """Tokens per second that the simulator predicts for a run of bench."""
    from jax_mono.cli.models import find_config
    from jax_mono.plan import GPU, make_plan
    from jax_mono.simulate import simulate, timing
    from jax_mono.tile import TileFormat

    try:
        known = timing(context.machine.topology)
    except ValueError:
        return None, ""
    config = find_config(record["model"])
    cut = {"devices": record["devices"], "blocks": record["blocks"], "target": GPU, "topology": known.topology}
    plan = make_plan(config, **cut, tile=TileFormat(compressed=record["compressed"]))
    groups = plan.num_devices // record["jax_devices"]
    made = simulate(plan, known, groups=groups, position=record["context"] // 2)
    return made.tokens_per_second, f"jax-mono simulate, {known.topology.name}, position {record['context'] // 2}"
