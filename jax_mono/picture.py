"""The picture of a plan. Imported by :mod:`jax_mono.draw` only, because it needs matplotlib.

The page is laid out by hand in pixels at the width of a README; y grows downwards. Every number comes from the plan.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, PathPatch
from matplotlib.path import Path as Outline
from matplotlib.textpath import TextPath

from jax_mono import draw as facts
from jax_mono.plan import LAYER_STAGES, STAGES, Plan

WIDTH, MARGIN = 900, 28
INK, GREY, LINE, PAPER = "#1b1f24", "#59636e", "#8c959f", "#f3f5f7"
PEERS = "#8e2a78"
# Okabe and Ito's colours (https://jfly.uni-koeln.de/color), which all common kinds of colour vision tell apart.
COLOURS = {"qkv": "#0072b2", "o": "#56b4e9", "up": "#e69f00", "down": "#f4d35e", "head": "#009e73"}
NAMES = {"qkv": "q, k, v", "o": "o", "up": "gate and up", "down": "down", "head": "LM head"}
PIXEL = 0.72  # points per pixel at 100 dots per inch


class Page:
    """A sheet of paper with pixels as coordinates."""

    def __init__(self, height: float) -> None:
        self.figure = Figure(figsize=(WIDTH / 100, height / 100), dpi=100, facecolor="white")
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, WIDTH), ylim=(height, 0))
        self.axes.axis("off")

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        size: float = 12,
        colour: str = INK,
        weight: str = "normal",
        align: str = "left",
        room: float | None = None,
    ) -> float:
        """Writes words centred on y, smaller if they would be wider than ``room``; returns their width."""
        width = text_width(words, size, weight)
        if room is not None and width > room:
            size, width = size * room / width, room
        self.axes.text(x, y, words, fontsize=size * PIXEL, color=colour, weight=weight, ha=align, va="center_baseline")
        return width

    def box(self, x: float, y: float, width: float, height: float, colour: str, *, edge: str = "none") -> None:
        """Draws a rectangle with slightly rounded corners, over lines."""
        style = "round,pad=0,rounding_size=3"
        patch = FancyBboxPatch((x, y), width, height, boxstyle=style, fc=colour, ec=edge, lw=0.8, zorder=2.5)
        self.axes.add_patch(patch)

    def bars(self, bars: Sequence[tuple[float, float, float, float]], colour: str) -> None:
        """Draws many rectangles (x, y, width, height) as one shape, which keeps files small."""
        codes = [Outline.MOVETO, Outline.LINETO, Outline.LINETO, Outline.LINETO, Outline.CLOSEPOLY] * len(bars)
        corners = [
            corner
            for x, y, width, height in bars
            for corner in ((x, y), (x + width, y), (x + width, y + height), (x, y + height), (x, y))
        ]
        if bars:
            self.axes.add_patch(PathPatch(Outline(corners, codes), fc=colour, lw=0))

    def line(
        self, points: Sequence[tuple[float, float]], *, colour: str = LINE, width: float = 1.0, dashed: bool = False
    ) -> None:
        """Draws a line through points."""
        style = (0, (3, 2)) if dashed else "solid"
        self.axes.plot(*zip(*points, strict=True), color=colour, lw=width, ls=style, solid_capstyle="round")

    def arrow(
        self,
        start: tuple[float, float],
        end: tuple[float, float],
        *,
        colour: str = LINE,
        ends: str = "-|>",
        dashed: bool = False,
    ) -> None:
        """Draws a straight arrow; ``ends`` in matplotlib's notation."""
        style = {"arrowstyle": f"{ends},head_length=3.4,head_width=2", "ls": (0, (3, 2)) if dashed else "solid"}
        patch = FancyArrowPatch(start, end, color=colour, lw=1.0, shrinkA=0, shrinkB=0, joinstyle="miter", **style)
        self.axes.add_patch(patch)

    def disc(self, x: float, y: float, radius: float, colour: str) -> None:
        """Draws a filled circle with a white rim."""
        self.axes.add_patch(Circle((x, y), radius, fc=colour, ec="white", lw=1, zorder=3))


def text_width(words: str, size: float, weight: str) -> float:
    """Width of words in pixels."""
    path = TextPath((0, 0), words, size=size, prop=FontProperties(weight=weight))
    return path.get_extents().x1 if words.strip() else 0.0


def draw(plan: Plan, path: Path) -> None:
    """Draws the plan into a file."""
    style = {"font.family": "DejaVu Sans", "svg.fonttype": "path", "svg.hashsalt": "jax_mono"}
    with matplotlib.rc_context(style):
        blocks, devices = facts.shown(plan.num_blocks, 4), facts.shown(plan.num_devices, 4)
        tapes_height = 100 + sum(_device_height(device, blocks) for device in devices)
        layer_height = 164 + 28 * len(blocks) + (62 if _has_peers(plan) else 0)
        sums_height = 142 if _has_sums(plan) else 0
        page = Page(84 + tapes_height + layer_height + sums_height + 96)
        _header(page, plan)
        y = 84.0
        _tapes(page, plan, y, devices, blocks)
        y += tapes_height
        _layer(page, plan, y, blocks)
        y += layer_height
        if sums_height:
            _sums(page, plan, y)
        y += sums_height
        _totals(page, plan, y)
        # Without a date, the same plan gives the same file.
        page.figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=200)
    if path.suffix == ".svg":
        # A hundredth of a point is enough.
        path.write_text(re.sub(r"(?<![\d.])([1-9]\d*\.\d\d)\d+", r"\1", path.read_text()))


def _has_peers(plan: Plan) -> bool:
    return plan.num_devices > 1


def _has_sums(plan: Plan) -> bool:
    return plan.num_devices * plan.config.num_lanes > 1


def _header(page: Page, plan: Plan) -> None:
    page.text(MARGIN, 32, facts.title(plan), size=20, weight="bold", room=WIDTH - 2 * MARGIN)
    page.text(
        MARGIN, 60, "Every share is fixed before the first token; nothing is scheduled while tokens are made.",
        size=13, colour=GREY,
    )  # fmt: skip


def _section(page: Page, y: float, number: int, heading: str, words: str) -> None:
    page.disc(MARGIN + 10, y + 14, 10, INK)
    page.axes.text(
        MARGIN + 10, y + 14.3, str(number), fontsize=12 * PIXEL, color="white", weight="bold", ha="center",
        va="center_baseline", zorder=4,
    )  # fmt: skip
    width = page.text(MARGIN + 28, y + 14, heading, size=15, weight="bold")
    x = MARGIN + 28 + width + 14
    page.text(x, y + 14.5, words, size=12, colour=GREY, room=WIDTH - MARGIN - x)


# The tapes ----------------------------------------------------------------------------------------------------------

_TAPE_X = 200
_BAR, _PITCH = 10, 14


def _device_height(device: int | None, blocks: Sequence[int | None]) -> float:
    return 28 if device is None else max(2, len(blocks)) * _PITCH + 16


def _tapes(page: Page, plan: Plan, y: float, devices: Sequence[int | None], blocks: Sequence[int | None]) -> None:
    _section(
        page, y, 1, "One tape per block", "all weights it needs, in the order of use; read end to end for every token"
    )
    totals = facts.totals(plan)
    x = float(_TAPE_X)
    for name in STAGES:
        page.box(x, y + 35, 12, 12, COLOURS[name])
        x += 17 + page.text(x + 17, y + 41.5, f"{NAMES[name]}  {totals.shares[name]:.0%}", size=12) + 20
    room = WIDTH - MARGIN - _TAPE_X
    scale = room / totals.busiest
    _layer_numbers(page, plan, y + 65, scale)
    y += 75
    for device in devices:
        if device is None:
            page.text(MARGIN, y + 8, f"⋮  {plan.num_devices - len(devices) + 1} more devices", colour=GREY)
        else:
            _device_tapes(page, plan, y, device, blocks, scale)
        y += _device_height(device, blocks)
    page.text(_TAPE_X - 8, y, "read so far", size=11, colour=GREY, align="right")
    for words in _ticks(totals.busiest):
        page.line([(_TAPE_X + words * scale, y - 10), (_TAPE_X + words * scale, y - 6)])
        align = "left" if words == 0 else "center"
        page.text(_TAPE_X + words * scale, y + 1, facts.number_of_bytes(words), size=11, colour=GREY, align=align)


def _device_tapes(page: Page, plan: Plan, y: float, device: int, blocks: Sequence[int | None], scale: float) -> None:
    share = plan.devices[device]
    page.text(MARGIN, y + 5, f"device {device}", size=13, weight="bold")
    holds = [f"{_counted('KV head', share.kv_heads.count)} {facts.bounds(share.kv_heads)}".strip()]
    if plan.config.lanes is not None:
        holds.insert(0, f"{_counted('lane', share.lanes.count)} {facts.bounds(share.lanes)}")
    for row, words in enumerate(holds):
        page.text(MARGIN, y + 21 + 15 * row, words, size=11, colour=GREY, room=104)
    bars: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in STAGES}
    for row, block in enumerate(blocks):
        top = y + row * _PITCH
        if block is None:
            page.text(_TAPE_X - 8, top + _BAR / 2, "⋮", size=11, colour=GREY, align="right")
            page.text(_TAPE_X, top + _BAR / 2, f"{plan.num_blocks - len(blocks) + 1} more blocks", size=11, colour=GREY)
            continue
        label = f"block {block}" if row == 0 else str(block)
        page.text(_TAPE_X - 8, top + _BAR / 2, label, size=11, colour=GREY, align="right")
        for name, first, words, ends_layer in _segments(plan, device, block):
            # A hair of paper ends every layer.
            width = words * scale - (1.2 if ends_layer else 0)
            bars[name].append((_TAPE_X + first * scale, top, max(0.2, width), _BAR))
    for name in STAGES:
        page.bars(bars[name], COLOURS[name])


def _segments(plan: Plan, device: int, block: int) -> Iterator[tuple[str, int, int, bool]]:
    """Yields the runs of a block's tape: stage, first weight, number of weights, whether it ends a layer."""
    stages, at = plan.devices[device].stages, 0
    for name in (*LAYER_STAGES * plan.config.num_layers, "head"):
        words = stages[name].shares[block].count * stages[name].tile_words
        yield name, at, words, name == LAYER_STAGES[-1]
        at += words


def _layer_numbers(page: Page, plan: Plan, y: float, scale: float) -> None:
    stages, layers = plan.devices[0].stages, plan.config.num_layers
    layer = sum(stages[name].shares[0].count * stages[name].tile_words for name in LAYER_STAGES) * scale
    every = next(step for step in (1, 2, 5, 10, 20, 50) if step * layer >= 24)
    page.text(_TAPE_X - 8, y, "layer", size=11, colour=GREY, align="right")
    for index in range(0, layers, every):
        page.text(_TAPE_X + (index + 0.5) * layer, y, str(index), size=11, colour=GREY, align="center")
    left = WIDTH - MARGIN - _TAPE_X - layers * layer
    if left > 30:
        page.text(_TAPE_X + layers * layer + left / 2, y, "head", size=11, colour=GREY, align="center", room=left)


def _ticks(longest: int) -> list[int]:
    """Round numbers of bytes, as weights, up to the longest tape."""
    size = longest * facts.BYTES_PER_WEIGHT
    unit = 10 ** (len(str(size)) - 1)
    step = next(unit * part for part in (0.1, 0.2, 0.5, 1, 2) if size / (unit * part) <= 6.5)
    return [round(tick * step / facts.BYTES_PER_WEIGHT) for tick in range(int(size / step) + 1)]


# One layer ----------------------------------------------------------------------------------------------------------

_COLUMN_X, _COLUMN, _GAP, _CELL, _ROW = 104, 92, 43.2, 24, 28


def _layer(page: Page, plan: Plan, y: float, blocks: Sequence[int | None]) -> None:
    heading = "One token through device 0"
    _section(page, y, 2, heading, "blocks work side by side and hand over their results after every stage")
    shares, words = facts.block_shares(plan, 0), facts.handoffs(plan)
    columns = [
        ("q, k, v", COLOURS["qkv"], "white", "rows", [share.qkv for share in shares]),
        ("attention", GREY, "white", "KV heads", [share.attention for share in shares]),
        ("o", COLOURS["o"], INK, "hidden rows", [share.hidden for share in shares]),
        ("gate and up", COLOURS["up"], INK, "neurons", [share.neurons for share in shares]),
        ("down", COLOURS["down"], INK, "hidden rows", [share.hidden for share in shares]),
        ("LM head", COLOURS["head"], "white", "vocabulary", [share.vocabulary for share in shares]),
    ]
    top = y + 70
    first = top + 46
    bottom = first + _ROW * len(blocks) - (_ROW - _CELL)
    for index, (name, colour, ink, unit, owned) in enumerate(columns):
        x = _column(index)
        page.box(x, top, _COLUMN, 24, colour)
        page.text(
            x + _COLUMN / 2, top + 12, name, size=12.5, weight="bold", colour=ink, align="center", room=_COLUMN - 8
        )
        page.text(x + _COLUMN / 2, top + 35, unit, size=11, colour=GREY, align="center")
        for row, block in enumerate(blocks):
            if block is None:
                page.text(x + _COLUMN / 2, first + row * _ROW + _CELL / 2, "⋮", colour=GREY, align="center")
                continue
            page.box(x, first + row * _ROW, _COLUMN, _CELL, PAPER, edge=colour)
            label = owned[block] or "nothing"
            page.text(
                x + _COLUMN / 2, first + row * _ROW + _CELL / 2, label, size=11, align="center", room=_COLUMN - 8,
                colour=INK if owned[block] else GREY,
            )  # fmt: skip
    for row, block in enumerate(blocks):
        label = f"⋮ {plan.num_blocks - len(blocks) + 1} more" if block is None else f"block {block}"
        page.text(MARGIN, first + row * _ROW + _CELL / 2, label, size=11, colour=GREY, room=58)
    rows = [first + row * _ROW + _CELL / 2 for row, block in enumerate(blocks) if block is not None]
    for gap in range(5):
        _handoff(page, rows, gap, summed=gap in (2, 4) and _has_sums(plan))
    _next_layer(page, plan, top, rows)
    counts = [words.qkv, words.attention, words.residual, words.activation, words.residual]
    page.text(MARGIN, bottom + 16, "words handed over", size=11, colour=GREY)
    for gap, count in enumerate(counts):
        page.text(_sum_x(gap) + 6, bottom + 16, f"{count:,}", size=11, weight="bold")
    if _has_peers(plan):
        _peers(page, plan, bottom + 32, rows, words.peers)


def _column(index: int) -> float:
    return _COLUMN_X + index * (_COLUMN + _GAP)


def _bus(gap: int) -> float:
    return _column(gap) + _COLUMN + _GAP - 14


def _sum_x(gap: int) -> float:
    return _column(gap) + _COLUMN + 12


def _handoff(page: Page, rows: Sequence[float], gap: int, *, summed: bool) -> None:
    bus, left, right = _bus(gap), _column(gap) + _COLUMN, _column(gap + 1)
    page.line([(bus, rows[0]), (bus, rows[-1])], width=1.6, colour=GREY)
    for row in rows:
        page.line([(left, row), (bus, row)], colour=GREY)
        page.arrow((bus, row), (right, row), colour=GREY)
        if summed:
            page.disc(_sum_x(gap), row, 7, PEERS)
            page.axes.text(
                _sum_x(gap), row, "+", fontsize=11 * PIXEL, color="white", weight="bold", ha="center",
                va="center_baseline", zorder=4,
            )  # fmt: skip


def _next_layer(page: Page, plan: Plan, top: float, rows: Sequence[float]) -> None:
    """The way back from the end of a layer to the start of the next one."""
    back, start, above = _bus(4), _COLUMN_X - 14, top - 14
    page.line([(back, rows[0]), (back, above), (start, above), (start, rows[-1])], colour=GREY, width=1.6)
    for row in rows:
        page.arrow((start, row), (_COLUMN_X, row), colour=GREY)
    words = f"{plan.config.num_layers} layers, one after the other"
    width = text_width(words, 12, "normal")
    middle = (start + back) / 2
    page.box(middle - width / 2 - 8, above - 9, width + 16, 18, "white")
    page.text(middle, above, words, size=12, colour=GREY, align="center")
    page.text(_column(5) + _COLUMN, above, "once per token", size=12, colour=GREY, align="right")


def _peers(page: Page, plan: Plan, y: float, rows: Sequence[float], words: int) -> None:
    """The other devices, with which the same blocks trade the sums of the same rows."""
    others = "device 1" if plan.num_devices == 2 else f"devices 1–{plan.num_devices - 1}"
    page.box(_COLUMN_X, y + 26, WIDTH - MARGIN - _COLUMN_X, 28, "#f7eef5", edge=PEERS)
    page.text(
        _COLUMN_X + (WIDTH - MARGIN - _COLUMN_X) / 2, y + 40,
        f"{others}: the block of the same number owns the same hidden rows, so it adds the same sums",
        size=12, colour=PEERS, align="center",
    )  # fmt: skip
    for gap in (2, 4):
        x = _sum_x(gap)
        page.arrow((x, rows[0]), (x, y + 26), colour=PEERS, ends="<|-|>", dashed=True)
        page.text(x - 8, y + 13, f"{words:,} words out and in", size=11, colour=PEERS, align="right")


# When sums arrive -----------------------------------------------------------------------------------------------------


def _sums(page: Page, plan: Plan, y: float) -> None:
    sources = facts.arrivals(plan)
    crossing = "other devices" if _has_peers(plan) else "other lanes"
    hidden = any(source not in (None, layer) for layer, source in enumerate(sources))
    why = "; until then the work goes on" if hidden else ""
    _section(page, y, 3, f"Sums of {crossing}", facts.arrival_words(plan) + why)
    first, pitch, box = _TAPE_X, 82, 64
    layers = min(len(sources), 8)
    for words, top in (("leave after layer", y + 40), ("are added after layer", y + 98)):
        page.text(first - 12, top + 11, words, size=12, colour=GREY, align="right")
        for layer in range(layers):
            page.box(first + layer * pitch, top, box, 22, PAPER, edge=LINE)
            page.text(first + layer * pitch + box / 2, top + 11, str(layer), size=12, align="center")
        if layers < len(sources):
            page.text(first + layers * pitch, top + 11, "…", size=12, colour=GREY)
    for layer, source in enumerate(sources[:layers]):
        if source is not None:
            ends = [first + index * pitch + box / 2 for index in (source, layer)]
            page.arrow((ends[0], y + 62), (ends[1], y + 98), colour=PEERS, dashed=_has_peers(plan))


def _totals(page: Page, plan: Plan, y: float) -> None:
    totals, words = facts.totals(plan), facts.handoffs(plan)
    tiles = [
        (facts.number_of_bytes(totals.words), "of bfloat16 weights per token"),
        (facts.number_of_bytes(totals.busiest), f"per block, balance {totals.balance:.1%}"),
        (f"{words.local:,} words", "handed over per layer and device"),
        (f"{totals.waits}", "hand-offs in turn per token"),
    ]
    width = (WIDTH - 2 * MARGIN - 3 * 12) / 4
    for index, (number, meaning) in enumerate(tiles):
        x = MARGIN + index * (width + 12)
        page.box(x, y + 16, width, 56, PAPER)
        page.text(x + 12, y + 35, number, size=18, weight="bold", room=width - 24)
        page.text(x + 12, y + 57, meaning, size=11, colour=GREY, room=width - 20)


def _counted(noun: str, count: int) -> str:
    return noun if count == 1 else f"no {noun}s" if count == 0 else f"{noun}s"
