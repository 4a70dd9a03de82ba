"""Granules: tapes that take turns in memory, so that each lies in what belongs to its block's side of the device.

Where they do is :class:`jax_mono.placement.Placement`'s to say.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_mono.plan import Plan, Stage
from jax_mono.record import constants_layout

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Swizzle:
    """By what the granules of each period of an array of tapes are exchanged; see :mod:`jax_mono.swizzle`.

    Attributes:
        begun: int32 [...], periods of the array's first region that lie before the array.
        exchanges: int32 [..., regions], what would be granule i of a period in the region is granule i ^ exchange.
    """

    begun: Array
    exchanges: Array

    def of_periods(self, plan: Plan, periods: ArrayLike) -> Array:
        """The exchanges of periods, int32 [...], counted from the start of one device's array."""
        return jnp.asarray(self.exchanges)[(jnp.asarray(periods) + self.begun) // plan.placement.region_periods]


def block_tape(plan: Plan, tapes: np.ndarray, block: int, layer: int | None) -> np.ndarray:
    """A block's tape of one layer, or of the head, as packing lays it: without a swizzle.

    Args:
        plan: The plan.
        tapes: One device's array of tapes: [R, num_layers, layer_words], or [R, head_words].
        block: The block.
        layer: Which layer; None for the head.

    Returns:
        [granules, words of a granule], a view.
    """
    whole = tapes.reshape(-1, plan.placement.granule_words)
    length, period = tapes.shape[-1] // plan.placement.granule_words, len(plan.placement.pattern)
    first = plan.placement.first_granule(block, tapes[0].size // plan.placement.granule_words)
    first += (layer or 0) * length * period
    return whole[first : first + (length - 1) * period + 1 : period]


def store(tape: np.ndarray, offset: int, words: np.ndarray) -> None:
    """Writes words at an offset of a tape from :func:`block_tape`."""
    size = tape.shape[1]
    first, skipped = divmod(offset, size)
    head = min(len(words), -skipped % size)
    if head:
        tape[first, skipped : skipped + head] = words[:head]
        first += 1
    whole, tail = divmod(len(words) - head, size)
    tape[first : first + whole] = words[head : len(words) - tail].reshape(whole, size)
    if tail:
        tape[first + whole, :tail] = words[len(words) - tail :]


def in_one_piece(
    plan: Plan, stage: Stage, tape: Array, layer: ArrayLike | None, swizzle: Swizzle | None = None
) -> tuple[Array, tuple[int, ...]]:
    """Collects what interleaved tapes hold of a stage.

    Args:
        plan: The plan.
        stage: The stage.
        tape: One device's array of tapes: [R, num_layers, layer_words], or [R, head_words].
        layer: Which layer, may be traced; None for the head.
        swizzle: Of this array; None for none.

    Returns:
        [B, words], and per block where in its row the stage starts.
    """
    placement = plan.placement
    size, period = placement.granule_words, len(placement.pattern)
    ends = [offset + run.count * stage.tile_words for offset, run in zip(stage.offsets, stage.shares, strict=True)]
    starts = np.array([offset // size for offset in stage.offsets])
    count = max(-(-end // size) - start for end, start in zip(ends, starts.tolist(), strict=True))
    length = tape.shape[-1] // size
    starts = np.minimum(starts, length - count)  # all alike long, and none beyond its tape
    first = np.array([placement.first_granule(block, tape[0].size // size) for block in range(plan.num_blocks)])
    granules = first[:, None] + (starts[:, None] + np.arange(count)) * period
    if layer is not None:
        granules = granules + jnp.asarray(layer) * (length * period)
    if swizzle is not None:
        granules = granules ^ swizzle.of_periods(plan, granules // period)
    rows = tape.reshape(-1, size)[granules].reshape(plan.num_blocks, count * size)
    return rows, tuple(int(offset - start * size) for offset, start in zip(stage.offsets, starts, strict=True))


def interleave(plan: Plan, tapes: Array) -> Array:
    """Puts tapes where a plan has them.

    Args:
        plan: The plan.
        tapes: [D, B, ...], one block's after the other's.

    Returns:
        [D, R, ...], zero where no tape lies.
    """
    placement = plan.placement
    if not placement.interleaved:
        return tapes
    size, period = placement.granule_words, len(placement.pattern)
    length = math.prod(tapes.shape[2:]) // size
    total = plan.num_blocks * length
    source = np.full(placement.tape_rows * length, total, np.int32)
    for block in range(plan.num_blocks):
        first = placement.first_granule(block, length)
        source[first : first + length * period : period] = np.arange(block * length, (block + 1) * length)
    taken = tapes.reshape(-1, total, size).at[:, source].get(mode="fill", fill_value=0)
    return taken.reshape(tapes.shape[0], placement.tape_rows, *tapes.shape[2:])


def layers_swizzle(plan: Plan, constants: Array) -> Swizzle | None:
    """The swizzle of the layer tapes.

    Args:
        plan: The plan.
        constants: float32 [..., floats], see :class:`jax_mono.tape.Tapes`.

    Returns:
        The swizzle, [...]; None if the plan's tapes are never swizzled.
    """
    return _part(plan, constants, "layers_swizzle", "head_swizzle")


def head_swizzle(plan: Plan, constants: Array) -> Swizzle | None:
    """The swizzle of the LM head's tapes; as :func:`layers_swizzle`."""
    return _part(plan, constants, "head_swizzle", "floats")


def _part(plan: Plan, constants: Array, first: str, end: str) -> Swizzle | None:
    if not plan.placement.region_periods:
        return None
    layout = constants_layout(plan)
    words = constants[..., layout[first] : layout[end]].astype(jnp.int32)
    return Swizzle(words[..., 0], words[..., 1:])


def check_alignment(plan: Plan, arrays: Sequence[Array]) -> None:
    """Warns if interleaved tapes start in the middle of a period: then they work, but their granules lie elsewhere.

    Args:
        plan: The plan.
        arrays: The tapes, where they are.
    """
    if not plan.placement.interleaved:
        return
    bytes_of_period = plan.placement.granule_words * len(plan.placement.pattern) * arrays[0].dtype.itemsize
    for array in arrays:
        for shard in array.addressable_shards:
            beyond = shard.data.unsafe_buffer_pointer() % bytes_of_period
            if beyond:
                warnings.warn(
                    f"tapes on {shard.device} start {beyond} bytes beyond a multiple of {bytes_of_period}, so blocks "
                    "do not read the memory on their own side; set XLA_PYTHON_CLIENT_ALLOCATOR=platform, with which "
                    "arrays start on pages",
                    stacklevel=2,
                )
