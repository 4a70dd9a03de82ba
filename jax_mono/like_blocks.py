"""Blocks whose tapes are alike where a stage is: written and read at once, for XLA takes long for many slices."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from jax_mono.plan import Stage


@dataclass(frozen=True)
class LikeBlocks:
    """Neighbouring blocks that hold equally many tiles of a stage at the same place of their tapes.

    Attributes:
        block: The first one.
        blocks: How many there are.
        tile: The first tile of the first one; the others' follow.
        tiles: Tiles of each.
        offset: Where they start in each tape, in words.
    """

    block: int
    blocks: int
    tile: int
    tiles: int
    offset: int


def like_blocks(stage: Stage, offsets: Sequence[int]) -> tuple[LikeBlocks, ...]:
    """Groups all blocks that have tiles of a stage, in the order of the tiles.

    Args:
        stage: The stage.
        offsets: Per block, where its tiles start in its tape.
    """
    blocks = sorted(range(len(stage.shares)), key=lambda block: stage.shares[block].first)
    found = []
    for (_, tiles, offset), like in itertools.groupby(
        enumerate(blocks), lambda item: (item[1] - item[0], stage.shares[item[1]].count, offsets[item[1]])
    ):
        first, *others = (block for _, block in like)
        if tiles:
            found.append(LikeBlocks(first, 1 + len(others), stage.shares[first].first, tiles, offset))
    return tuple(found)
