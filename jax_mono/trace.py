"""Where the time of a token goes: reads traces, adds them up, writes them for Perfetto, draws a token.

With ``JAX_MONO_TRACE=FILE`` a call writes when each block came to each moment of a few tokens. The time up to a
moment, a *phase*, belongs to what the moment names. Devices have clocks of their own, so times are counted from the
first moment of each device, and blocks are compared within a device only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jax_mono.extras import require

MARKS = (
    "begun",
    "qkv_input",
    "qkv_product",
    "heads_received",
    "attended",
    "o_input",
    "o_product",
    "attention_mixed",
    "up_input",
    "up_product",
    "down_input",
    "down_product",
    "mlp_mixed",
    "head_input",
    "head_product",
    "summarised",
    "chosen",
)
"""The moments of a token in their order; mirrors ``Mark`` in ffi/kernel/call.h."""

LAYER_MARKS = MARKS[MARKS.index("qkv_input") : MARKS.index("mlp_mixed") + 1]
"""Those that come once per layer."""

RECEIVING = ("qkv_input", "heads_received", "o_input", "up_input", "down_input", "head_input", "chosen")
"""Those up to which a block receives what all blocks publish at the moment before."""

_MIXED = ("attention_mixed", "mlp_mixed")
"""Those up to which a block computes, and also waits for sums where there are other devices."""

_HEAD_PRODUCT = MARKS.index("head_product") - len(MARKS)
"""Index among the moments of a token, from the end."""

_MAGIC = 0x6563617274
_HEAD = 8  # numbers before the times; TraceTimes::write in ffi/host/trace.cc


class TraceError(ValueError):
    """A file is no trace, or not a whole one, or files do not belong together."""


@dataclass(frozen=True)
class Moment:
    """One moment of a token.

    Attributes:
        name: One of :data:`MARKS`.
        layer: Its layer, or None where it comes once per token.
    """

    name: str
    layer: int | None

    @property
    def receives(self) -> bool:
        """Whether a block waits for others before it. The first layer reads an embedding and waits for nobody."""
        return self.name in RECEIVING and (self.name, self.layer) != ("qkv_input", 0)


@dataclass(frozen=True)
class Trace:
    """When every block came to every moment of some tokens.

    Attributes:
        devices: Their numbers.
        first_token: Number of the first token, counted from the first one that the call fed.
        noted: int64 [devices, blocks, tokens, moments], nanoseconds; 0 where a block skipped a moment: one without
            attention to do, or a token of the prompt, which needs no LM head.
    """

    devices: tuple[int, ...]
    first_token: int
    noted: np.ndarray

    @property
    def num_blocks(self) -> int:
        """Blocks per device."""
        return self.noted.shape[1]

    @property
    def tokens(self) -> range:
        """Numbers of the tokens."""
        return range(self.first_token, self.first_token + self.noted.shape[2])

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return (self.noted.shape[3] - len(MARKS)) // len(LAYER_MARKS) + 1

    @property
    def moments(self) -> list[Moment]:
        """What the last axis of the times counts."""
        after = MARKS.index("mlp_mixed") + 1
        layers = [Moment(name, layer) for layer in range(self.num_layers) for name in LAYER_MARKS]
        return [Moment("begun", None), *layers, *(Moment(name, None) for name in MARKS[after:])]

    def ends(self) -> np.ndarray:
        """When phases end, int64 like ``noted``, from the device's first moment; those skipped end as they begin."""
        flat = np.maximum.accumulate(self.noted.reshape(*self.noted.shape[:2], -1), axis=-1)
        return flat.reshape(self.noted.shape) - flat[..., 0].min(axis=1)[:, None, None, None]

    def starts(self) -> np.ndarray:
        """When phases start, int64 like ``noted``; the first one of each block has no length."""
        ends = self.ends()
        flat = ends.reshape(*ends.shape[:2], -1)
        return np.concatenate([flat[..., :1], flat[..., :-1]], axis=-1).reshape(ends.shape)


@dataclass(frozen=True)
class Waits:
    """What blocks waited for, at the moments that receive.

    Attributes:
        moments: Indices of these moments.
        counted: bool [devices, tokens, waits], whether any block of the device noted the moment.
        arrived: int64 [devices, tokens, waits], when the last block of the device published what the others need.
        last: int64 [devices, tokens, waits], that block.
        waited: int64 [devices, blocks, tokens, waits], how long each block waited for it, in nanoseconds.
    """

    moments: np.ndarray
    counted: np.ndarray
    arrived: np.ndarray
    last: np.ndarray
    waited: np.ndarray


def read_trace(*paths: str | Path) -> Trace:
    """Reads a trace: one file, or those that the devices of one call wrote.

    Args:
        *paths: The files, in any order.

    Returns:
        The tokens that the call finished.

    Raises:
        TraceError: A file is foreign or cut off, files are of different calls, or no token was traced.
    """
    heads: list[list[int]] = []
    times: list[np.ndarray] = []
    devices: list[int] = []
    for path in map(Path, paths):
        words = np.frombuffer(path.read_bytes()[: path.stat().st_size // 8 * 8], np.int64)
        if len(words) == 0 or words[0] != _MAGIC:
            raise TraceError(f"{path} is not a trace; set JAX_MONO_TRACE=FILE for a call that writes one")
        numbers: list[int] = [*words[1:_HEAD].tolist(), *[0] * (_HEAD - len(words))]
        first_device, count, *shape = numbers
        blocks, layers, _, tokens, moments = shape
        if len(words) < _HEAD or path.stat().st_size != 8 * (_HEAD + count * blocks * tokens * moments):
            raise TraceError(f"{path} is cut off or was changed; let the call write it again")
        if moments != len(MARKS) + (layers - 1) * len(LAYER_MARKS):
            raise TraceError(f"{path} was written by another version of jax_mono: {moments} moments per token")
        heads.append(shape)
        devices += range(first_device, first_device + count)
        times.append(words[_HEAD:].reshape(count, blocks, tokens, moments))
    if len(set(devices)) != len(devices) or any(head != heads[0] for head in heads):
        raise TraceError(f"{', '.join(map(str, paths))} are not of one call: each device must be there once")
    noted = np.concatenate(times)[np.argsort(devices)]
    first = heads[0][2]
    whole = int((noted[..., [0, -1]] > 0).all(axis=(0, 1, 3)).sum())
    if whole == 0:
        raise TraceError(
            f"{paths[0]} has no token: the call ended before its token {first}; generate more, or set "
            "JAX_MONO_TRACE_TOKENS=FIRST,COUNT"
        )
    return Trace(tuple(sorted(devices)), first, noted[:, :, :whole])


def waits(trace: Trace) -> Waits:
    """Finds out which block was last and how long the others waited for it."""
    moments = np.asarray([index for index, moment in enumerate(trace.moments) if moment.receives])
    noted, ends = trace.noted[..., moments] > 0, trace.ends()
    begun = ends[..., moments - 1]
    arrived = begun.max(axis=1)
    waited = np.clip(arrived[:, None] - begun, 0, ends[..., moments] - begun) * noted
    return Waits(moments, np.asarray(noted.any(axis=1)), arrived, begun.argmax(axis=1), waited)


@dataclass(frozen=True)
class Phase:
    """What a token spends on one kind of phase, over all layers. Times are nanoseconds per token.

    Attributes:
        name: The moment it leads to.
        mean: Mean over blocks.
        least: Of the block that spends least.
        most: Of the block that spends most.
        waited: Of the mean, the part before the last block had come; 0 unless the phase receives.
        last: Number of the device, and its block that was last most often; None unless the phase receives.
        often: Fraction of the times in which it was.
    """

    name: str
    mean: float
    least: float
    most: float
    waited: float
    last: tuple[int, int] | None
    often: float


def phases(trace: Trace) -> list[Phase]:
    """Adds up a trace by phase, in the order of :data:`MARKS`."""
    lengths, found = trace.ends() - trace.starts(), waits(trace)
    names = np.asarray([moment.name for moment in trace.moments])
    tokens = len(trace.tokens)
    result = []
    for name in MARKS:
        # Nobody knows when the first token's beginning began.
        count = max(1, tokens - 1) if name == "begun" else tokens
        per_block = lengths[..., names == name].sum(axis=(2, 3)) / count
        chosen = names[found.moments] == name
        waited = found.waited[..., chosen].sum(axis=(2, 3)).mean() / tokens
        last, often = _most_often(trace, found.last[..., chosen], found.counted[..., chosen])
        result.append(Phase(name, per_block.mean(), per_block.min(), per_block.max(), float(waited), last, often))
    return result


def _most_often(trace: Trace, last: np.ndarray, counted: np.ndarray) -> tuple[tuple[int, int] | None, float]:
    if not counted.any() or trace.num_blocks == 1:
        return None, 0.0
    counts = np.asarray(
        [
            np.bincount(of[valid], minlength=trace.num_blocks) / max(1, valid.sum())
            for of, valid in zip(last, counted, strict=True)
        ]
    )
    device, block = np.unravel_index(counts.argmax(), counts.shape)
    return (trace.devices[device], int(block)), float(counts[device, block])


def title(trace: Trace) -> str:
    """Names the machine of a trace."""
    counts = [(len(trace.devices), "device"), (trace.num_blocks, "block"), (trace.num_layers, "layer")]
    devices, blocks, layers = (f"{count} {noun}" + ("" if count == 1 else "s") for count, noun in counts)
    return f"{devices} × {blocks}, {layers}"


def trace_text(trace: Trace) -> str:
    """Describes a trace: time per phase, and for phases that receive which block the others waited for.

    Args:
        trace: The trace.

    Returns:
        Lines without a trailing newline; times are microseconds per token.
    """
    rows = phases(trace)
    total = sum(row.mean for row in rows)
    waited, received = sum(row.waited for row in rows), sum(row.mean for row in rows if row.name in RECEIVING)
    tokens = f"token {trace.tokens[0]}" if len(trace.tokens) == 1 else f"tokens {trace.tokens[0]}–{trace.tokens[-1]}"
    lines = [
        f"{title(trace)}; {tokens} of the call, {total / 1e3:,.1f} µs each",
        "",
        f"  {'µs per token':<16}{'mean':>10}{'min':>10}{'max':>10}{'share':>8}{'waited':>10}  last to come",
    ]
    for row in rows:
        times = "".join(f"{time / 1e3:>10,.1f}" for time in (row.mean, row.least, row.most))
        line = f"  {row.name:<16}{times}{row.mean / (total or 1):>8.1%}"
        if row.name in RECEIVING:
            line += f"{row.waited / 1e3:>10,.1f}  {_last(trace, row)}"
        lines.append(line.rstrip())
    lines += [
        "",
        f"  receiving {received / (total or 1):.1%}, of which {waited / (total or 1):.1%} before the last block of the "
        "device had come",
    ]
    prompt = int((trace.noted[..., _HEAD_PRODUCT] == 0).all(axis=(0, 1)).sum())
    if prompt:
        lines.append(f"  {prompt} of {len(trace.tokens)} tokens are of the prompt and need no LM head")
    if len(trace.devices) > 1:
        lines.append(f"  {' and '.join(_MIXED)} include waiting for sums of other devices")
    return "\n".join(lines)


def _last(trace: Trace, row: Phase) -> str:
    if row.last is None:
        return ""
    device = f"device {row.last[0]} " if len(trace.devices) > 1 else ""
    return f"{device}block {row.last[1]}, {row.often:.0%}"


def write_perfetto(trace: Trace, path: str | Path) -> None:
    """Writes a trace for https://ui.perfetto.dev and chrome://tracing: a process per device, a thread per block.

    Slices are named after the moment they end in; their category is ``wait`` where it receives, else ``work``, and both
    where sums of other devices are awaited and added. They lie in slices of category ``token``.

    Args:
        trace: The trace.
        path: Where to write JSON.
    """
    events = list(_events(trace))
    Path(path).write_text(json.dumps({"displayTimeUnit": "ns", "traceEvents": events}, separators=(",", ":")))


def _events(trace: Trace) -> Iterator[dict[str, Any]]:
    starts, ends, moments = trace.starts(), trace.ends(), trace.moments
    categories = ["wait" if moment.receives else _work(trace, moment.name) for moment in moments]
    for d, device in enumerate(trace.devices):
        # Number 0 is that of the idle process.
        where: dict[str, Any] = {"pid": device + 1}
        yield {"ph": "M", "name": "process_name", **where, "args": {"name": f"device {device}"}}
        yield {"ph": "M", "name": "process_sort_index", **where, "args": {"sort_index": device}}
        for block in range(trace.num_blocks):
            where["tid"] = device * trace.num_blocks + block + 1
            yield {"ph": "M", "name": "thread_name", **where, "args": {"name": f"block {block}"}}
            yield {"ph": "M", "name": "thread_sort_index", **where, "args": {"sort_index": block}}
            for t, token in enumerate(trace.tokens):
                start, end = starts[d, block, t], ends[d, block, t]
                about: dict[str, Any] = {"token": token}
                yield {"name": f"token {token}", "cat": "token", **_span(start[0], end[-1]), **where, "args": about}
                for index, moment in enumerate(moments):
                    if trace.noted[d, block, t, index] == 0 or (t, index) == (0, 0):
                        continue
                    args = about if moment.layer is None else about | {"layer": moment.layer}
                    what = {"name": moment.name, "cat": categories[index], "args": args}
                    yield {**what, **_span(start[index], end[index]), **where}


def _work(trace: Trace, name: str) -> str:
    return "wait,work" if name in _MIXED and trace.devices != (0,) else "work"


def _span(start: int, end: int) -> dict[str, Any]:
    return {"ph": "X", "ts": int(start) / 1e3, "dur": int(end - start) / 1e3}


def median_token(trace: Trace) -> int:
    """Number of a token of median length."""
    ends = trace.ends()
    lengths = (ends[..., -1] - ends[..., 0]).mean(axis=(0, 1))
    return trace.tokens[int(np.argsort(lengths)[(len(lengths) - 1) // 2])]


def draw_token(trace: Trace, path: str | Path, token: int | None = None) -> None:
    """Draws where each block waited in one token, and which block the others waited for.

    Args:
        trace: The trace.
        path: Where to write; the suffix ``.svg`` or ``.png`` decides the format.
        token: Its number; one of median length if None.

    Raises:
        ValueError: Another suffix, or a token that was not traced.
        MissingExtraError: matplotlib is not installed.
    """
    path = Path(path)
    if path.suffix not in (".svg", ".png"):
        raise ValueError(f"{path} must end in .svg or .png")
    if token is not None and token not in trace.tokens:
        raise ValueError(f"token {token} is not in the trace, which has {trace.tokens[0]} to {trace.tokens[-1]}")
    require("matplotlib", "plot")
    from jax_mono.trace_picture import draw  # needs matplotlib

    draw(trace, median_token(trace) if token is None else token, path)
