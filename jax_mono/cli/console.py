"""What commands print: notes and progress on stderr, records on stdout."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jax_mono.extras import MissingExtraError, require

OnTensor = Callable[[str, int], None]


def note(text: str, *, quiet: bool = False) -> None:
    """Prints a remark to stderr."""
    if not quiet:
        print(f"jax-mono: {text}", file=sys.stderr, flush=True)


def print_json(record: Mapping[str, Any], *, indent: int | None = 2) -> None:
    """Prints one JSON object to stdout; numbers that JSON does not know become null."""
    print(json.dumps(plain(record), indent=indent, ensure_ascii=False, allow_nan=False), flush=True)


def plain(value: Any) -> Any:
    """The same, with None for numbers that JSON does not know."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def progress(title: str, total: int, *, quiet: bool = False) -> Iterator[OnTensor]:
    """Shows how far the reading of a checkpoint is: a bar with rich, a line without, nothing where nobody looks.

    Args:
        title: What is going on.
        total: Bytes that will be read.
        quiet: Whether to show nothing.

    Yields:
        A callback for each tensor.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda path, nbytes: None
        return
    try:
        bars = require("rich.progress", "cli")
        console = require("rich.console", "cli").Console(stderr=True)
    except MissingExtraError:
        line = _Line(title, total)
        yield line.add
        line.finish()
        return
    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.DownloadColumn(),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=console, transient=True) as shown:
        task = shown.add_task(title, total=total)
        yield lambda path, nbytes: shown.advance(task, nbytes)


@contextmanager
def counter(title: str, total: int, *, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """Shows how many of some things are done: a bar with rich, nothing where nobody looks.

    Args:
        title: What is going on.
        total: How many there are.
        quiet: Whether to show nothing.

    Yields:
        A callback for each thing, given a remark that stands behind the bar.
    """
    try:
        bars = None if quiet or not sys.stderr.isatty() else require("rich.progress", "cli")
    except MissingExtraError:
        bars = None
    if bars is None:
        yield lambda remark: None
        return
    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeRemainingColumn(),
        bars.TextColumn("{task.fields[remark]}"),
    )
    console = require("rich.console", "cli").Console(stderr=True)
    with bars.Progress(*columns, console=console, transient=True) as shown:
        task = shown.add_task(title, total=total, remark="")
        yield lambda remark: shown.update(task, advance=1, remark=remark)


class _Line:
    """One line of a terminal that counts up."""

    _INTERVAL = 0.1

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total, self._done, self._shown = title, max(1, total), 0, 0.0

    def add(self, path: str, nbytes: int) -> None:
        self._done += nbytes
        if time.monotonic() - self._shown > self._INTERVAL:
            self._shown = time.monotonic()
            share = min(1.0, self._done / self._total)
            print(f"\r{self._title} {share:4.0%}", end="", file=sys.stderr, flush=True)

    def finish(self) -> None:
        # Clears the line, as the bar does.
        print(f"\r{' ' * (len(self._title) + 5)}\r", end="", file=sys.stderr, flush=True)
