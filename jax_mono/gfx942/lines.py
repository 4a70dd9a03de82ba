"""A listing with lines: blocks of instructions, what they were made of, and the loops that they lie in."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jax_mono.gfx942.toolchain import OPTIONS

WITH_LINES = (*OPTIONS, "-gline-tables-only")
"""Options of a listing that names source lines; its instructions are the same."""

Way = tuple[str, ...]
"""Texts of the source lines that an instruction was made of: calls that were inlined, outermost first."""


@dataclass
class Block:
    """Instructions that run one after the other.

    Attributes:
        number: In its label.
        loops: Numbers of the first blocks of the loops that it lies in, outermost first.
        lines: Instructions, each with its way.
        size: Bytes.
    """

    number: str
    loops: list[str] = field(default_factory=list)
    lines: list[tuple[str, Way]] = field(default_factory=list)
    size: int = 0

    @property
    def waits(self) -> bool:
        """Whether it calls the one function that is not inlined, a wait that is not over at the first look."""
        return any(line.startswith("s_swappc") for line, _ in self.lines)


def blocks(listing: str, sizes: Sequence[int], sources: Mapping[str, str]) -> list[Block]:
    """Takes the kernel ``mono_decode`` apart.

    Args:
        listing: Compiled with :data:`WITH_LINES`.
        sizes: Bytes of its instructions (:func:`jax_mono.gfx942.toolchain.sizes`).
        sources: By name, what it was made of.
    """
    texts = {name: text.splitlines() for name, text in sources.items()}
    found: list[Block] = []
    way: Way = ()
    at, inside = 0, False
    for line in listing.splitlines():
        starts = line.startswith("mono_decode:")
        inside = (inside or starts) and not line.startswith(".Lfunc_end")
        label = re.match(r"(?:\.LBB\d+_|; %bb\.)(\d+):", line)
        if inside and (label or starts):
            found.append(Block(label[1] if label else ""))
        if inside and re.match(r"\.LBB|; %bb| +;", line):
            found[-1].loops += re.findall(r"(?:Header=|Parent Loop )BB\d+_(\d+)", line)
            found[-1].loops += [found[-1].number] if "=>" in line else []
        elif located := re.match(r"\t\.loc\t.*; (.*)$", line):
            frames = re.findall(r"(kernel/[\w/.]+):(\d+):\d+", located[1])
            if len(frames) > 1 or (frames and frames[0][1] != "0"):  # else of no line: registers are copied
                way = tuple(texts[name][int(n) - 1].strip() if int(n) else "" for name, n in reversed(frames))
        elif re.match(r"\t[a-z]", line):
            if inside:
                found[-1].lines.append((" ".join(line.split()), way))
                found[-1].size += sizes[at]
            at += 1
    heads = {block.number: block.loops for block in found if block.loops and block.loops[-1] == block.number}
    for block in found:  # most blocks name their innermost loop only
        block.loops = heads[block.loops[-1]] if block.loops else []
    return found


def statements(found: Sequence[Block]) -> dict[str, list[str]]:
    """What the loops of a program were made of, by the number of their first block.

    The end of a loop and the way to its next round were made of its statement. Each text has that, after the line that
    it was called from and before what else the instruction was made of.
    """
    number, said = {block.number: block for block in found}, {}
    for block in found:
        for i, (line, _) in enumerate(block.lines):
            target = re.match(r"s_c?branch\S* \.LBB\d+_(\d+)", line)
            for loop in block.loops if target else ():
                if target[1] == loop or loop not in number[target[1]].loops:
                    said.setdefault(loop, []).extend(_innermost(way) for _, way in block.lines[max(0, i - 3) : i + 1])
    return said


def _innermost(way: Way) -> str:
    at = next((i for i in reversed(range(len(way))) if re.match(r"(for|while) \(", way[i])), None)
    return "" if at is None else " ".join(way[max(0, at - 1) :])
