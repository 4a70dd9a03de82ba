"""``jax-mono bench --contexts``: decoding behind conversations of several lengths, and a picture of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_mono.cli.bench_runs import against_limit, measure_limit, speed, timed_run
from jax_mono.extras import require
from jax_mono.limit import bytes_per_token, kv_bytes_per_token

if TYPE_CHECKING:
    from jax_mono.decoder import Decoder


def check_contexts(contexts: Sequence[int], longest: int) -> None:
    """Refuses contexts that cannot be measured.

    Raises:
        ValueError: One is too short to have a start and two tokens after it, or beyond what there is room for.
    """
    for context in contexts:
        if not 8 <= context <= longest:
            raise ValueError(
                f"--contexts {context} must be between 8 and {longest}, the longest that there is room for"
            )


def sweep(decoder: Decoder, contexts: Sequence[int], new_tokens: int, runs: int) -> list[dict[str, Any]]:
    """Measures decoding up to each context.

    A run ends where the context is full: it begins ``new_tokens`` before that, or half-way for short contexts, behind
    random keys and values. All runs share one compiled program.

    Args:
        decoder: The decoder.
        contexts: Checked ones.
        new_tokens: Tokens per run.
        runs: Runs per context.

    Returns:
        A record for each context.
    """
    from jax_mono.random_cache import random_cache

    per_token, records = bytes_per_token(decoder.plan, decoder.tapes), []
    for context in contexts:
        count = min(new_tokens, context // 2)
        start = context - count - 1  # the last token generated is not fed, the one of the prompt is
        timings, limits = [], []
        for run in range(runs + 1):
            timing = timed_run(decoder, [1], count, cache=random_cache(decoder, start, run), padded=True)
            if run:  # the first one compiles
                timings.append(timing)
            limits.append(measure_limit(decoder))
        measured = speed(timings, 1)
        compared = against_limit(per_token, limits, timings)
        records.append(
            {"context": context, "first_position": start, "new_tokens": count, "runs": runs}
            | {name: measured[name] for name in measured if name.startswith(("tokens_", "inter_token_"))}
            | {"kv_bytes_per_token": kv_bytes_per_token(decoder.plan, decoder.tapes, context)}
            | {name: compared[name] for name in ("limit_tokens_per_s", f"fraction_of_{limits[0].name}")}
        )
    return records


def plot(record: dict[str, Any], file: Path) -> None:
    """Draws the speed by context, with the limit that was measured beside it.

    Args:
        record: What bench measured; ``contexts`` has the records of :func:`sweep`.
        file: SVG, PNG or PDF, by its name.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require("matplotlib", "plot")
    from matplotlib.figure import Figure

    rows = sorted(record["contexts"], key=lambda row: row["context"])
    contexts = [row["context"] for row in rows]
    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    axes = figure.add_subplot()
    speeds = [row["tokens_per_s"] for row in rows]
    below = [row["tokens_per_s"] - row["tokens_per_s_min"] for row in rows]
    above = [row["tokens_per_s_max"] - row["tokens_per_s"] for row in rows]
    axes.errorbar(contexts, speeds, (below, above), marker="o", capsize=3, label="resident program")
    limits = [row["limit_tokens_per_s"] for row in rows]
    axes.plot(contexts, limits, linestyle="--", color="0.4", label=f"{record['limit'].replace('_', ' ')}, weights only")
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [str(context) for context in contexts])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("context at the end of a run, tokens")
    axes.set_ylabel("tokens per second")
    axes.grid(alpha=0.3)
    axes.legend()
    axes.set_title(f"{record['model']}, {record['dtype']}, batch 1, {record['device']}", fontsize=10)
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
