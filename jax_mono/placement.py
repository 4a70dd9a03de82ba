"""Placement: on which die of its device a block belongs, and in which granules of memory its tape lies.

The only place where a plan looks at a topology. What it gives are tables, and on a device of one die they say nothing:
then everything is as it would be without one.

Memory is dealt to the sides of a device in granules, by a pattern that repeats. A block's tape takes one granule of
every period, always the same one, which belongs to its side. So a word of a tape is found by a constant expression
from the block's first granule, whatever the pattern. Blocks of a side take its granules of the period in turn; if
these do not come out even, the last periods have granules that nobody uses.

Where a hash of addresses exchanges sides from one region of memory to the next, tapes follow by a table,
:mod:`jax_mono.swizzle`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jax_mono.config import ConfigError
from jax_mono.spans import Span, even_counts, spans
from jax_mono.topology import Topology

MAX_DIES = 16
"""Dies of one device; bounds the table of the resident program (``kMaxDies`` in ffi/kernel/plan.h)."""

MOST_IDLE = 1 / 8
"""Of the blocks' memory, the most that may lie idle beside it so that granules come out even."""

LEAST_GRANULE = 256
"""Weights; a chunk of a tile."""


@dataclass(frozen=True)
class Placement:
    """Where the blocks of a device belong.

    A *die* shares a second-level cache, a *side* is an I/O die with the memory that belongs to it. Dies of one side are
    neighbours in number, and so are the blocks of one die.

    Attributes:
        roles: Per die, the blocks that belong on it.
        sides: Per die, the side that it lies on.
        granule_words: Weights of a granule of memory, a power of two; 1 where all memory is equally near.
        pattern: The sides to which the granules of one period belong; (0,) likewise.
        region_periods: Periods of a region of memory, in which sides are exchanged alike; 0 if they never are.
    """

    roles: tuple[Span, ...]
    sides: tuple[int, ...]
    granule_words: int = 1
    pattern: tuple[int, ...] = (0,)
    region_periods: int = 0

    @property
    def num_sides(self) -> int:
        """Sides of the device."""
        return self.sides[-1] + 1

    def die_of(self, block: int) -> int:
        """The die on which a block belongs."""
        return next(die for die, span in enumerate(self.roles) if span.first <= block < span.stop)

    def side_of(self, block: int) -> int:
        """The side on which a block belongs."""
        return self.sides[self.die_of(block)]

    @property
    def num_blocks(self) -> int:
        """Blocks of the device."""
        return self.roles[-1].stop

    @property
    def interleaved(self) -> bool:
        """Whether the tapes of several blocks take turns in memory."""
        return len(self.pattern) > 1

    @property
    def tape_rows(self) -> int:
        """Rows that an array of tapes has, one per block and padding."""
        return len(self.pattern) * (1 + max(self._turn(block)[0] for block in range(self.num_blocks)))

    def first_granule(self, block: int, length: int) -> int:
        """Where a block's tape starts.

        Args:
            block: The block.
            length: Granules of a tape, the same for all blocks.

        Returns:
            Its first granule, counted in the array of tapes; the others follow at a distance of one period each.
        """
        before, slot = self._turn(block)
        return before * length * len(self.pattern) + slot

    def regions(self, length: int) -> int:
        """Regions of memory that an array of tapes of so many granules each touches at most; 0 if none exchange any."""
        periods = self.tape_rows // len(self.pattern) * length
        return (periods + 2 * self.region_periods - 2) // self.region_periods if self.region_periods else 0

    def rounded(self, words: int) -> int:
        """A tape of so many weights in whole granules."""
        return -(-words // self.granule_words) * self.granule_words

    def _turn(self, block: int) -> tuple[int, int]:
        """How many blocks come before one in the same granule of the period, and which granule that is."""
        if not self.interleaved:
            return block, 0
        side = self.side_of(block)
        first = next(span.first for span, other in zip(self.roles, self.sides, strict=True) if other == side)
        slots = [slot for slot, owner in enumerate(self.pattern) if owner == side]
        before, turn = divmod(block - first, len(slots))
        return before, slots[turn]


def place(
    blocks: int, topology: Topology | None = None, pattern: Sequence[int] | None = None, weight_bytes: int = 2
) -> Placement:
    """Deals the blocks of a device to its dies, evenly.

    Args:
        blocks: Blocks of a device.
        topology: The device; None for one whose blocks are all equally near to each other and to all memory.
        pattern: Sides to which consecutive granules of memory belong, over one period, as measured; None takes the
            topology's, unless too much memory would lie idle.
        weight_bytes: Of a weight.

    Returns:
        The placement.

    Raises:
        ConfigError: The device has more dies than the resident program knows of, or fewer compute units than blocks; or
            the pattern does not fit it.
    """
    if topology is None:
        if pattern is not None:
            raise ConfigError("a pattern of memory granules needs the topology that it belongs to")
        return Placement((Span(0, blocks),), (0,))
    dies = topology.dies.whole
    if dies > MAX_DIES:
        raise ConfigError(f"{topology.name} has {dies} dies, the resident program knows at most {MAX_DIES}")
    if dies > 1 and blocks > topology.units:
        raise ConfigError(f"{topology.name} has {topology.units} compute units, too few for {blocks} blocks")
    roles, sides = spans(even_counts(blocks, dies)), tuple(topology.io_die_of(die) for die in range(dies))
    chosen = _shortest(topology.granule_sides if pattern is None else pattern)
    if chosen == (0,):
        return Placement(roles, sides)
    if sorted(set(chosen)) != list(range(sides[-1] + 1)):
        raise ConfigError(
            f"a pattern {chosen} does not give granules to each side of {topology.name}, 0 to {sides[-1]}"
        )
    granule, rest = divmod(topology.granule_bytes.whole, weight_bytes)
    if rest or granule < LEAST_GRANULE or granule & (granule - 1):
        raise ConfigError(
            f"granules of {topology.granule_bytes.whole} bytes cannot be dealt: their size must be a "
            f"power of two, of at least {LEAST_GRANULE * weight_bytes}"
        )
    placed = Placement(roles, sides, granule, chosen, _region_periods(topology, len(chosen)))
    if placed.tape_rows <= (1 + MOST_IDLE) * blocks:
        return placed
    if pattern is None:
        return Placement(roles, sides)
    raise ConfigError(
        f"with a pattern of {len(chosen)} granules the tapes of {blocks} blocks need the memory of "
        f"{placed.tape_rows}; use a shorter pattern, or more blocks"
    )


def _region_periods(topology: Topology, period: int) -> int:
    """Periods of a region, if it is the period of the topology's hash."""
    known = topology.address_hash
    if known is None or (known.granule_bytes, known.parts) != (topology.granule_bytes.whole, period):
        return 0
    return known.region_bytes // (known.granule_bytes * period)


def _shortest(pattern: Sequence[int]) -> tuple[int, ...]:
    """The period of a pattern, which may have been given several times over."""
    whole = tuple(pattern)
    for length in range(1, len(whole)):
        if len(whole) % length == 0 and whole == whole[:length] * (len(whole) // length):
            return whole[:length]
    return whole
