"""Locality: who works on a KV head, so that its rows are handed over within a die, where the heads of a device allow.

A token's query, key and value of a head go from the blocks that multiply the rows to those that hold the head's
positions. Blocks of one die have a cache in common, and dies of one side are near each other. So every head gets a
home, the dies whose blocks hold its positions, and its rows are multiplied there.

Only a device of several dies has homes. On any other, blocks take the rows in their order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from jax_mono.placement import Placement
from jax_mono.spans import Span, even_counts, spans


def head_splits(placement: Placement, heads: Sequence[int], chunks: int) -> int:
    """Over how many blocks the positions of one KV head are best spread.

    As many as leave every block at most one head's split, if there are blocks enough. Of several dies each has whole
    heads, if there are heads enough; else a head has no more of them than can have a chunk of its positions.

    Args:
        placement: Where the blocks belong.
        heads: KV heads of each device.
        chunks: Of positions, the most that a head can have.
    """
    dies = [span.count for span in placement.roles]
    most = max(1, sum(dies) // max(1, *heads))
    if len(dies) == 1:
        return most
    if not _whole_heads(dies, min(heads)):
        enough = next((total for total in accumulate(dies) if total >= chunks), most)
        return max(1, min(most, enough))
    splits = [blocks // own for count in heads for blocks, own in zip(dies, even_counts(count, len(dies)), strict=True)]
    return max(1, min(splits))


def _whole_heads(dies: Sequence[int], heads: int) -> bool:
    """Whether each die, of so many blocks, has a head or more for itself."""
    return min(dies) > 0 and heads >= len(dies)


def attention_spans(placement: Placement, heads: int, splits: int) -> tuple[Span, ...]:
    """Deals attention items (head times splits plus split) to the blocks of one device, in their order.

    Args:
        placement: Where the blocks belong.
        heads: KV heads of the device.
        splits: Of each head.

    Returns:
        Per block, its run of items.
    """
    dies = [span.count for span in placement.roles]
    if len(dies) == 1 or not _whole_heads(dies, heads):
        return spans(even_counts(heads * splits, sum(dies)))
    whole = even_counts(heads, len(dies))
    return spans(count for own, blocks in zip(whole, dies, strict=True) for count in even_counts(own * splits, blocks))


def tile_heads(lanes: int, heads: int, group: int, size: int, tile_rows: int) -> list[int]:
    """Per tile of query, key and value rows, the KV head that the row in its middle belongs to.

    Args:
        lanes: Of the device.
        heads: KV heads of a lane.
        group: Query heads of a KV head.
        size: Rows of a head.
        tile_rows: Rows of a tile; each lane starts a new one.
    """
    queries, rows = heads * group * size, heads * (group + 2) * size
    found = []
    for lane in range(lanes):
        for first in range(0, rows, tile_rows):
            row = min(first + tile_rows // 2, rows - 1)
            head = row // (group * size) if row < queries else (row - queries) // size % heads
            found.append(lane * heads + head)
    return found


@dataclass(frozen=True)
class _Run:
    """Tiles that one block multiplies, all of one head if they can be."""

    tiles: Span
    head: int


def row_spans(
    placement: Placement,
    tile_heads: Sequence[int],
    attention: Sequence[Span],
    splits: int,
    load: Sequence[int],
) -> tuple[Span, ...]:
    """Deals the tiles of query, key and value rows to the blocks of one device of several dies.

    No block gets more tiles than it must: a stage lasts as long as on its busiest block. Runs end where another head
    begins, and a head's runs go to its home as long as that has blocks for them, then to the same side.

    Args:
        placement: Where the blocks belong.
        tile_heads: Per tile, the KV head whose rows it holds.
        attention: Per block, its items; see :func:`attention_spans`.
        splits: Of each head.
        load: Per block, what it carries already.

    Returns:
        Per block, its run of tiles, maybe none.
    """
    blocks, tiles = len(load), len(tile_heads)
    homes = _homes(placement, attention, splits)
    free = {die: span.count for die, span in enumerate(placement.roles)}
    given: dict[int, list[_Run]] = {die: [] for die in free}
    for run in sorted(_cut(tile_heads, blocks, homes, free), key=lambda run: len(homes[run.head])):
        taken = Counter({die: sum(other.head == run.head for other in given[die]) for die in homes[run.head]})
        die = _nearest(placement, homes[run.head], taken, free)
        free[die] -= 1
        given[die].append(run)
    shares = [Span(tiles, 0)] * blocks
    for die, runs in given.items():
        belong = placement.roles[die]
        idlest = sorted(range(belong.first, belong.stop), key=lambda block: (load[block], block))
        # The longest runs to those who carry least, equally long ones in the order of blocks.
        runs.sort(key=lambda run: (-run.tiles.count, run.tiles.first))
        for block, run in zip(idlest, runs, strict=False):
            shares[block] = run.tiles
    return tuple(shares)


def _homes(placement: Placement, attention: Sequence[Span], splits: int) -> dict[int, Counter[int]]:
    """Per head, the dies that hold its positions, and how many of its splits each holds."""
    found: dict[int, Counter[int]] = {}
    for block, items in enumerate(attention):
        for item in range(items.first, items.stop):
            found.setdefault(item // splits, Counter())[placement.die_of(block)] += 1
    return found


def _cut(tile_heads: Sequence[int], blocks: int, homes: dict[int, Counter[int]], room: dict[int, int]) -> list[_Run]:
    """Cuts tiles into at most ``blocks`` runs, none longer than if they were dealt evenly."""
    most = -(-len(tile_heads) // blocks)
    starts = [t for t, head in enumerate(tile_heads) if t == 0 or head != tile_heads[t - 1]]
    parts = [Span(start, stop - start) for start, stop in zip(starts, [*starts[1:], len(tile_heads)], strict=True)]
    counts = [-(-part.count // most) for part in parts]
    if sum(counts) > blocks:  # too many ends: runs go on into the next head
        even = spans(even_counts(len(tile_heads), blocks))
        return [_Run(run, tile_heads[run.first + run.count // 2]) for run in even if run.count]
    # More and shorter runs, as far as the homes have blocks for them.
    used: Counter[tuple[int, ...]] = Counter()
    at = [tuple(sorted(homes[tile_heads[part.first]])) for part in parts]
    for home, count in zip(at, counts, strict=True):
        used[home] += count
    while True:
        growing = [
            i
            for i, part in enumerate(parts)
            if counts[i] < part.count and used[at[i]] < sum(room[die] for die in at[i])
        ]
        if not growing or sum(counts) == blocks:
            break
        longest = max(growing, key=lambda i: (parts[i].count / counts[i], -i))
        counts[longest] += 1
        used[at[longest]] += 1
    return [
        _Run(Span(part.first + run.first, run.count), tile_heads[part.first])
        for part, count in zip(parts, counts, strict=True)
        for run in spans(even_counts(part.count, count))
    ]


def _nearest(placement: Placement, home: Counter[int], taken: Counter[int], free: dict[int, int]) -> int:
    """A die with a block left for a head's next run: of its home, else on the same side, else the emptiest.

    The dies of a home take turns, in proportion to the splits that they hold; ``taken`` are the runs that they have.
    """
    left = [die for die, blocks in free.items() if blocks]
    near = [die for die in left if die in home]
    if near:
        return max(near, key=lambda die: (home[die] / (taken[die] + 1), -die))
    sides = {placement.sides[die] for die in home}
    beside = [die for die in left if placement.sides[die] in sides]
    return max(beside or left, key=lambda die: (free[die], -die))
