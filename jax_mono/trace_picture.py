"""The picture of a traced token. Imported by :mod:`jax_mono.trace` only, because it needs matplotlib.

Every block is a row, time goes to the right. Rows are painted as an image, so that many blocks make no large file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import to_rgb

from jax_mono.picture import COLOURS, GREY, INK, LINE, MARGIN, NAMES, WIDTH, Page, text_width
from jax_mono.trace import LAYER_MARKS, Trace, title, waits

_WAITING, _RECEIVING, _ATTENTION = "waits for the last block", "receives", "attention"
_PAINT = {
    _WAITING: "#dde1e6",
    _RECEIVING: "#a3abb4",
    "qkv": COLOURS["qkv"],
    _ATTENTION: "#cc79a7",
    "o": COLOURS["o"],
    "up": COLOURS["up"],
    "down": COLOURS["down"],
    "head": COLOURS["head"],
}
_WORK = {
    "begun": "head",  # lies before the token: never painted
    "qkv_input": "qkv",  # of the first layer, which waits for nobody
    "qkv_product": "qkv",
    "attended": _ATTENTION,
    "o_product": "o",
    "attention_mixed": "o",
    "up_product": "up",
    "down_product": "down",
    "mlp_mixed": "down",
    "head_product": "head",
    "summarised": "head",
}
_TIME_X, _TIME_WIDTH = 104, 560
_BARS = ((_TIME_X + _TIME_WIDTH + 18, "waited"), (_TIME_X + _TIME_WIDTH + 116, "made others wait"))
_BAR_WIDTH = 76
_GAP = 8  # between devices


@dataclass(frozen=True)
class _Rows:
    """Where rows lie below the top of a panel."""

    devices: int
    blocks: int

    @property
    def height(self) -> float:
        return min(22.0, 420 / (self.devices * self.blocks))

    def top(self, device: int, block: int = 0) -> float:
        return device * (self.blocks * self.height + _GAP) + block * self.height

    @property
    def bottom(self) -> float:
        return self.top(self.devices) - _GAP

    @property
    def label_step(self) -> int:
        return next(step for step in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if step * self.height >= 13)


def draw(trace: Trace, token: int, path: Path) -> None:
    """Draws a token into a file."""
    at = token - trace.first_token
    ends, rows = trace.ends()[:, :, at], _Rows(len(trace.devices), trace.num_blocks)
    ends = ends - ends[..., :1].min(axis=1, keepdims=True)
    layer = _median_layer(ends, trace.num_layers)
    first = 1 + layer * len(LAYER_MARKS)
    panels = (
        (f"The whole token: {ends.max() / 1e3:,.1f} µs", 0.0, float(ends.max())),
        (
            f"Layer {layer}, one of median length",
            float(ends[..., first - 1].min()),
            float(ends[..., first + len(LAYER_MARKS) - 1].max()),
        ),
    )
    style = {"font.family": "DejaVu Sans", "svg.fonttype": "path", "svg.hashsalt": "jax_mono"}
    with matplotlib.rc_context(style):
        page = Page(128 + len(panels) * (rows.bottom + 92))
        page.text(MARGIN, 32, f"Token {token} of {title(trace)}", size=20, weight="bold", room=WIDTH - 2 * MARGIN)
        words = "A black line: this block was the last of its device to publish what the others were waiting for."
        if rows.devices > 1:
            words += " Rows are device · block."
        page.text(MARGIN, 60, words, size=13, colour=GREY, room=WIDTH - 2 * MARGIN)
        _legend(page, 86)
        y = 118.0
        for heading, start, end in panels:
            _panel(page, trace, at, ends, rows, y, heading, start, end)
            y += rows.bottom + 92
        page.figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=200)


def _median_layer(ends: np.ndarray, layers: int) -> int:
    last = ends[..., [index * len(LAYER_MARKS) for index in range(layers + 1)]]
    lengths = np.diff(last, axis=-1).mean(axis=(0, 1))
    return int(np.argsort(lengths)[(layers - 1) // 2])


def _legend(page: Page, y: float) -> None:
    x = float(MARGIN)
    for name, colour in _PAINT.items():
        page.box(x, y - 6, 12, 12, colour)
        words = NAMES.get(name, name)
        page.text(x + 17, y, words, size=12)
        x += 17 + text_width(words, 12, "normal") + 16


def _panel(
    page: Page, trace: Trace, at: int, ends: np.ndarray, rows: _Rows, y: float, heading: str, start: float, end: float
) -> None:
    page.text(MARGIN, y + 10, heading, size=15, weight="bold")
    top = y + 32
    scale = _TIME_WIDTH / max(end - start, 1)
    found = waits(trace)
    for device, number in enumerate(trace.devices):
        _paint(page, trace, at, device, ends[device], rows, top, start, end)
        for block in range(0, trace.num_blocks, rows.label_step):
            if block and (trace.num_blocks - block) * rows.height + _GAP < 13:
                break  # too near to the next device's first label
            label = f"block {block}" if rows.devices == 1 else f"{number} · {block}"
            middle = top + rows.top(device, block) + rows.height / 2
            page.text(_TIME_X - 8, middle, label, size=11, colour=GREY, align="right")
    # Times of this panel, counted as those of `ends` are.
    shift = trace.ends()[:, :, at, 0].min(axis=1)
    arrived = found.arrived[:, at] - shift[:, None]
    seen = found.counted[:, at] & (arrived >= start) & (arrived <= end) & (trace.num_blocks > 1)
    for device, wait in np.argwhere(seen):
        row = top + rows.top(device, found.last[device, at, wait])
        x, reach = _TIME_X + (arrived[device, wait] - start) * scale, max(0.0, 5 - rows.height) / 2
        page.line([(x, row - reach), (x, row + rows.height + reach)], colour=INK, width=1.1)
    lost = np.where(seen, found.waited[:, :, at].sum(axis=1) / max(1, trace.num_blocks - 1), 0)  # by each of the others
    kept = np.zeros(ends.shape[:2])
    np.add.at(kept, (np.arange(rows.devices)[:, None], found.last[:, at]), lost)
    waited = (found.waited[:, :, at] * seen[:, None]).sum(axis=-1)
    for (x, name), values, colour in zip(_BARS, (waited, kept), (_PAINT[_WAITING], INK), strict=True):
        _bars(page, rows, top, x, name, values, colour)
    _time_axis(page, top + rows.bottom, start, end)


def _paint(
    page: Page, trace: Trace, at: int, device: int, ends: np.ndarray, rows: _Rows, top: float, start: float, end: float
) -> None:
    """Paints what the blocks of a device do, from ``start`` to ``end``; ``ends`` is [blocks, moments]."""
    found = waits(trace)
    arrived = np.full(ends.shape[1], -1)
    arrived[found.moments] = found.arrived[device, at] - trace.ends()[device, :, at, 0].min()
    names = list(_PAINT)
    work = np.asarray([names.index(_RECEIVING if moment.receives else _WORK[moment.name]) for moment in trace.moments])
    palette = np.asarray([to_rgb(colour) for colour in (*_PAINT.values(), "white")])
    times = np.linspace(start, end, 3 * _TIME_WIDTH)
    image = np.empty((len(ends), len(times), 3))
    for block, own in enumerate(ends):
        phase = np.searchsorted(own, times)
        inside = (times > own[0]) & (phase < len(own))
        phase = np.minimum(phase, len(own) - 1)
        paint = np.where(times < arrived[phase], names.index(_WAITING), work[phase])
        image[block] = palette[np.where(inside, paint, len(names))]
    low, high = top + rows.top(device), top + rows.top(device, len(ends))
    extent = (_TIME_X, _TIME_X + _TIME_WIDTH, high, low)
    page.axes.imshow(image, extent=extent, aspect="auto", interpolation="nearest", zorder=1)
    if rows.height >= 8:
        for block in range(1, len(ends)):
            line = low + block * rows.height
            page.line([(_TIME_X, line), (_TIME_X + _TIME_WIDTH, line)], colour="white", width=1.4)


def _bars(page: Page, rows: _Rows, top: float, x: float, name: str, values: np.ndarray, colour: str) -> None:
    """Draws a number per block beside its row; the longest bar has its value above."""
    most = values.max()
    page.text(x, top - 24, name, size=11, colour=GREY)
    page.text(x, top - 10, f"up to {most / 1e3:,.1f} µs", size=11, colour=GREY)
    inset = 0.12 * rows.height
    page.bars(
        [
            (x, top + rows.top(device, block) + inset, _BAR_WIDTH * value / most, rows.height - 2 * inset)
            for (device, block), value in np.ndenumerate(values)
            if value > 0
        ],
        colour,
    )
    page.line([(x, top), (x, top + rows.bottom)], width=0.8)


def _time_axis(page: Page, y: float, start: float, end: float) -> None:
    length = max(end - start, 1.0)
    step = next(step for power in range(13) for step in (10**power, 2 * 10**power, 5 * 10**power) if length / step <= 8)
    for time in np.arange(-(-start // step) * step, end, step):
        x = _TIME_X + (time - start) / length * _TIME_WIDTH
        page.line([(x, y), (x, y + 4)], colour=LINE)
        page.text(x, y + 13, f"{time / 1e3:,.12g}", size=11, colour=GREY, align="center")
    page.text(_TIME_X + _TIME_WIDTH, y + 27, "µs since the token began", size=11, colour=GREY, align="right")
