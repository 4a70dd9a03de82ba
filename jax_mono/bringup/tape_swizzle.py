"""The swizzle that tapes need where they lie: measured on the pages of their own memory.

On one JAX device, the first one: there the probe reads.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from jax_mono.bringup.pages import PageMap, Refusal, solve_regions
from jax_mono.bringup.probes import PAGE_BYTES
from jax_mono.bringup.region_fit import fit
from jax_mono.granules import Swizzle
from jax_mono.plan import Plan
from jax_mono.swizzle import swizzled
from jax_mono.tape import Tapes
from jax_mono.topology import Topology

Times = Callable[[int, int], np.ndarray]
"""(address of the first page, pages) -> float32 [xcds, pages], nanoseconds of a read of each page by each XCD."""


def follow(plan: Plan, tapes: Tapes, topology: Topology, times: Times) -> tuple[Tapes, list[str]] | Refusal:
    """Gives tapes the swizzle that they need where they lie.

    Args:
        plan: The plan.
        tapes: Its tapes, all on one JAX device; donated unless this is refused.
        topology: Of that device.
        times: The probe.

    Returns:
        The tapes and what is to be said of them; or why they are left as they are.
    """
    jax.block_until_ready(tapes)
    layers, head = (
        measured(plan, array, regions, topology, times)
        for array, regions in zip((tapes.layers, tapes.head), plan.tape_regions, strict=True)
    )
    if isinstance(layers, Refusal):
        return layers
    remarks = []
    if isinstance(head, Refusal):
        remarks.append(f"the LM head's tapes do not follow exchanged dies: {head.reason}")
        head = Swizzle(np.zeros(plan.num_devices, int), np.zeros((plan.num_devices, plan.tape_regions[1]), int))
    return swizzled(plan, tapes, layers, head), remarks


def measured(plan: Plan, array: jax.Array, regions: int, topology: Topology, times: Times) -> Swizzle | Refusal:
    """Finds the swizzle of an array of tapes.

    Args:
        plan: The plan.
        array: [D, R, ...], the tapes of all devices of the plan, on one JAX device, which nobody writes meanwhile.
        regions: That one device's tapes touch at most; see :attr:`jax_mono.plan.Plan.tape_regions`.
        topology: Of that device.
        times: The probe.

    Returns:
        The swizzle, [D]; or why there is none.
    """
    known, placement = topology.address_hash, plan.placement
    if known is None or not placement.region_periods:
        return Refusal("the plan knows no regions of memory that exchange granules")
    if known.granule_bytes != PAGE_BYTES:
        return Refusal(f"granules have {known.granule_bytes} bytes, and pages of {PAGE_BYTES} are timed")
    address, period_bytes = array.unsafe_buffer_pointer(), known.granule_bytes * known.parts
    if address % period_bytes:
        return Refusal(f"the tapes start {address % period_bytes} bytes beyond a multiple of {period_bytes}")
    before = address % known.region_bytes  # of the first region, before the array
    found = solve_regions(times(address, array.nbytes // PAGE_BYTES), topology, before // PAGE_BYTES)
    if isinstance(found, Refusal):
        return found
    if not _in_order(found, topology):
        return Refusal(f"XCDs lie on dies {found.die_of_xcd}, and plans have them in the order of their numbers")
    fitted = fit(found.die, placement.pattern, known.region_bytes // PAGE_BYTES, before // PAGE_BYTES)
    if fitted.refusal:
        return Refusal(fitted.refusal)
    starts = before + np.arange(len(array)) * (array.nbytes // len(array))
    padded = np.pad(fitted.swizzle, (0, regions))
    first = starts // known.region_bytes
    return Swizzle(starts % known.region_bytes // period_bytes, padded[first[:, None] + np.arange(regions)])


def _in_order(found: PageMap, topology: Topology) -> bool:
    return found.die_of_xcd == tuple(topology.io_die_of(xcd) for xcd in range(len(found.die_of_xcd)))
