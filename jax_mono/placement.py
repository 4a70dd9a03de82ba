"""Placement: on which die of its device a block belongs.

The only place where a plan looks at a topology. What it gives is a table, and on a device of one die the table says
nothing: then everything is as it would be without one.
"""

from __future__ import annotations

from dataclasses import dataclass

from jax_mono.config import ConfigError
from jax_mono.spans import Span, even_counts, spans
from jax_mono.topology import Topology

MAX_DIES = 16
"""Dies of one device; bounds the table of the resident program (``kMaxDies`` in ffi/kernel/plan.h)."""


@dataclass(frozen=True)
class Placement:
    """Where the blocks of a device belong.

    A *die* shares a second-level cache, a *side* is an I/O die with the memory that belongs to it. Dies of one side are
    neighbours in number, and so are the blocks of one die.

    Attributes:
        roles: Per die, the blocks that belong on it.
        sides: Per die, the side that it lies on.
    """

    roles: tuple[Span, ...]
    sides: tuple[int, ...]

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


def place(blocks: int, topology: Topology | None = None) -> Placement:
    """Deals the blocks of a device to its dies, evenly.

    Args:
        blocks: Blocks of a device.
        topology: The device; None for one whose blocks are all equally near to each other and to all memory.

    Returns:
        The placement.

    Raises:
        ConfigError: The device has more dies than the resident program knows of, or fewer compute units than blocks.
    """
    if topology is None:
        return Placement((Span(0, blocks),), (0,))
    dies = topology.dies.whole
    if dies > MAX_DIES:
        raise ConfigError(f"{topology.name} has {dies} dies, the resident program knows at most {MAX_DIES}")
    if dies > 1 and blocks > topology.units:
        raise ConfigError(f"{topology.name} has {topology.units} compute units, too few for {blocks} blocks")
    return Placement(spans(even_counts(blocks, dies)), tuple(topology.io_die_of(die) for die in range(dies)))
