"""A training run: from its settings to its last checkpoint, with a log, a picture and resumption."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jax_mono.checkpoint import config_to_dict
from jax_mono.config import ModelConfig
from mini_coder.recipe import Settings, flops_per_token
from mini_coder.token_file import Batches
from mini_coder.training import State, data_mesh, held_out_nats, initial_state, learning_rate, make_step, place, whole

Report = Callable[[dict[str, Any]], None]


class RunError(ValueError):
    """A run that cannot begin or go on; the message says what to do."""


def train(
    config: ModelConfig,
    settings: Settings,
    data: Path,
    directory: Path,
    *,
    devices: int | None = None,
    save_every: int = 500,
    stop_after: int | None = None,
    report: Report = lambda row: None,
) -> State:
    """Trains, or goes on with training, to the last step.

    Args:
        config: The model.
        settings: The run.
        data: Directory with ``train.bin``.
        directory: Of the run: ``settings.json``, ``log.jsonl`` (one line per step) and ``checkpoints/``.
        devices: How many to use; None takes all.
        save_every: Steps between checkpoints.
        stop_after: End (with a checkpoint) after this step, as if interrupted.
        report: Called after each step with its line of the log.

    Returns:
        The last state.

    Raises:
        RunError: The directory has a run with other settings.
    """
    directory.mkdir(parents=True, exist_ok=True)
    keep_settings(directory, config, settings)
    mesh = data_mesh(devices)
    batches = Batches(data / "train.bin", length=settings.length, size=settings.batch, seed=settings.seed)
    step_function = make_step(config, settings, mesh)
    # Not in the background: the next step takes over the memory of the state.
    keep_last = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    with ocp.CheckpointManager((directory / "checkpoints").absolute(), options=keep_last) as manager:
        state = initial_state(config, settings, mesh)
        first = manager.latest_step() or 0
        if first:
            target = jax.tree.map(
                lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=whole(mesh)), state
            )
            state = State(*manager.restore(first, args=ocp.args.StandardRestore(tuple(target))))
        last = min(settings.steps, stop_after or settings.steps)
        with _log(directory / "log.jsonl", first) as lines:
            flying: deque[tuple[int, Any, float]] = deque()
            for step in range(first, last):
                batch = place(batches.batch(step), settings, mesh)
                state, numbers = step_function(state, batch, np.float32(learning_rate(settings, step)))
                flying.append((step, numbers, time.time()))
                done = step + 1
                saving = done % save_every == 0 or done == last
                while len(flying) > (0 if saving else 1):  # one step runs while the next batch is made
                    row = _row(settings, *flying.popleft())
                    lines.write(json.dumps(row) + "\n")
                    report(row)
                if saving:
                    lines.flush()
                    manager.save(done, args=ocp.args.StandardSave(tuple(state)))
    return state


def evaluate(
    config: ModelConfig, settings: Settings, state: State, data: Path, directory: Path, *, devices: int | None = None
) -> dict[str, Any]:
    """Scores the held-out text and writes ``result.json``.

    Returns:
        ``bits_per_byte`` and what it is computed from, ``steps``, ``tokens`` seen, and the speed.
    """
    about = json.loads((data / "manifest.json").read_text())["held_out"]
    nats, tokens = held_out_nats(config, state.params, data / "held_out.bin", settings, data_mesh(devices))
    rows = read_log(directory)
    record = {
        "bits_per_byte": nats / math.log(2) / about["bytes"],
        "held_out_bytes": about["bytes"],
        "held_out_tokens": tokens,
        "steps": settings.steps,
        "tokens": settings.tokens,
        "last_training_loss": sum(row["loss"] for row in rows[-20:]) / max(1, len(rows[-20:])),
        **speed(config, settings, rows),
        "device": jax.devices()[0].device_kind,
    }
    (directory / "result.json").write_text(json.dumps(record, indent=2) + "\n")
    return record


def speed(config: ModelConfig, settings: Settings, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Tokens and floating-point operations per second, by the median time of a step; nothing below three steps."""
    times = sorted(b["time"] - a["time"] for a, b in itertools.pairwise(rows[1:]))
    if not times:
        return {}
    tokens = settings.batch * settings.length / times[len(times) // 2]
    return {"tokens_per_s": tokens, "tflops": tokens * flops_per_token(config, settings.length) / 1e12}


def keep_settings(directory: Path, config: ModelConfig, settings: Settings) -> None:
    """Writes ``settings.json``, or refuses a directory that has another."""
    file = directory / "settings.json"
    # Through JSON, where tuples are lists.
    now = json.loads(json.dumps({"model": config_to_dict(config), "run": dataclasses.asdict(settings)}))
    if file.exists() and json.loads(file.read_text()) != now:
        raise RunError(f"{directory} holds a run with other settings; choose another directory or remove it")
    file.write_text(json.dumps(now, indent=2) + "\n")


def read_log(directory: Path) -> list[dict[str, Any]]:
    """The log, one row per step: ``step``, ``loss``, ``norm``, ``rate`` and ``time``."""
    file = directory / "log.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _row(settings: Settings, step: int, numbers: dict[str, jax.Array], now: float) -> dict[str, Any]:
    row = {"step": step, "loss": float(numbers["loss"]), "norm": float(numbers["norm"])}
    row |= {"rate": learning_rate(settings, step), "time": now}
    if not math.isfinite(row["loss"]):
        raise RunError(f"the loss of step {step} is {row['loss']}; lower the learning rate (--peak)")
    return row


def _log(file: Path, first: int) -> Any:
    """Opens the log behind the step from which the run goes on; later lines belong to work that was lost."""
    rows = [line for line in file.read_text().splitlines()[:first]] if file.exists() else []
    file.write_text("".join(f"{line}\n" for line in rows))
    return file.open("a", encoding="utf-8")
