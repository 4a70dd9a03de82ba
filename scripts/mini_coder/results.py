"""What comes out of the runs: pictures, the table of the twins, and the model as it ships."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jax_mono.config import ModelConfig
from jax_mono.models.hf import export_hf
from jax_mono.models.safetensors_file import SINGLE
from jax_mono.models.source import unflatten
from mini_coder.recipe import LARGEST

_SMOOTH = 50
"""Steps over which the plotted loss is averaged."""


def smooth(losses: Sequence[float], width: int = _SMOOTH) -> list[float]:
    """Means of the last ``width`` values; fewer where there are fewer."""
    sums = [0.0, *itertools.accumulate(losses)]
    return [(sums[end] - sums[max(0, end - width)]) / min(end, width) for end in range(1, len(sums))]


def plot_losses(logs: Mapping[str, Sequence[Mapping[str, Any]]], file: Path, title: str) -> None:
    """Draws the training losses of some runs.

    Args:
        logs: Name to rows of its log.
        file: Where to; the ending says how (``.svg``, ``.png``).
        title: Of the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, rows in logs.items():
        axes.plot([row["step"] + 1 for row in rows], smooth([row["loss"] for row in rows]), label=name, linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel(f"training loss, nats per token (mean of {_SMOOTH} steps)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    # The same data make the same file.
    with pyplot.rc_context({"svg.hashsalt": "mini-coder"}):
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    pyplot.close(figure)


def twin_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The twins as a table in Markdown; the difference is to the run without a delay."""
    base = results["delay-0"]["bits_per_byte"]
    lines = ["| lanes communicate | held-out bits per byte | difference | last training loss |", "|---|---|---|---|"]
    names = {"delay-2": "two layers later", "delay-0": "at once", "none": "never"}
    for name, record in results.items():
        bits = record["bits_per_byte"]
        lines.append(
            f"| {names[name]} | {bits:.4f} | {100 * (bits / base - 1):+.2f} % | {record['last_training_loss']:.4f} |"
        )
    return "\n".join(lines) + "\n"


def export(config: ModelConfig, params: Mapping[str, Any], tokenizer: Path, directory: Path) -> int:
    """Writes the model as a Hugging Face directory in bfloat16, with its tokenizer.

    Args:
        config: The model.
        params: Canonical path to master weights.
        tokenizer: Directory with ``tokenizer.json`` and ``tokenizer_config.json``.
        directory: Where to; replaced if it is there.

    Returns:
        Bytes of weights.

    Raises:
        ValueError: The weights are larger than what may ship.
    """
    tree = unflatten({path: np.asarray(array) for path, array in params.items()})
    export_hf(config, tree, directory, dtype=ml_dtypes.bfloat16, overwrite=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, directory / name)
    size = (directory / SINGLE).stat().st_size
    if size > LARGEST:
        raise ValueError(f"{directory / SINGLE} has {size} bytes, more than the {LARGEST} that may ship")
    return size


def write_json(file: Path, record: Any) -> None:
    """Writes a record for people and programs."""
    file.write_text(json.dumps(record, indent=2) + "\n")
