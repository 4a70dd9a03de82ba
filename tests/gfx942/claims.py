"""What is claimed of every program for gfx942. Each claim raises an AssertionError where it does not hold."""

from __future__ import annotations

import re

from gfx942.builds import Listing

from jax_mono.gfx942.toolchain import SHARED_MEMORY

STAGES = 5
"""Products of a token's way: each has its own loop over pieces."""

LANES = 64
"""Of a vector register: so many scalar values wait in one."""


def count(listing: Listing, pattern: str) -> int:
    return sum(re.match(pattern, line) is not None for line in listing.instructions)


def both_kernels(listing: Listing) -> None:
    assert listing.kernels.keys() == {"mono_decode", "mono_stream"}
    assert all(kernel.threads == listing.shape.threads == 512 for kernel in listing.kernels.values())


def no_scratch(listing: Listing) -> None:
    assert all(kernel.scratch == 0 for kernel in listing.kernels.values())
    assert count(listing, "scratch_|buffer_(load|store)_dword .* s32 ") == 0


def no_vector_spills(listing: Listing) -> None:
    assert all(kernel.spilled_vectors == 0 for kernel in listing.kernels.values())


def scalars_in_two_vector_registers(listing: Listing) -> None:
    """More scalar values are alive than there are registers; they wait in lanes, never in memory."""
    assert listing.kernels["mono_decode"].spilled_scalars <= 2 * LANES
    assert listing.kernels["mono_stream"].spilled_scalars == 0


def two_waves_per_simd(listing: Listing) -> None:
    """512 threads are two waves on each of a compute unit's four SIMDs, which have 512 registers per lane."""
    assert all(kernel.vector_registers <= 256 for kernel in listing.kernels.values())


def shared_memory_fits(listing: Listing) -> None:
    most = max(kernel.shared_memory for kernel in listing.kernels.values())
    assert most + listing.shape.shared_memory <= SHARED_MEMORY


def weights_are_streamed(listing: Listing) -> None:
    """Sixteen bytes a lane, read once: every product and each kernel's first and last piece."""
    weights = [line for line in listing.instructions if re.search(r"\bnt\b", line)]
    assert all(line.startswith("buffer_load_dwordx4 ") and " sc" not in line for line in weights)
    assert len(weights) >= listing.quads * (STAGES + 3)


def words_pass_every_cache(listing: Listing) -> None:
    """Words of hand-offs go to and come from memory that all devices see, whole."""
    words = [line for line in listing.instructions if re.match("buffer_(load|store)", line) and " nt" not in line]
    assert all(re.match(r"buffer_(load|store)_dwordx4 .*\bsc0 sc1\b", line) for line in words)
    assert {line.split("_")[1] for line in words} == {"load", "store"}


def control_is_ordered_for_all_devices(listing: Listing) -> None:
    """The abort word: written back, and caches forgotten, to the end of the system."""
    assert count(listing, "buffer_wbl2 sc0 sc1$") > 0 and count(listing, "buffer_wbl2 sc1$") == 0
    assert count(listing, "buffer_inv sc0 sc1$") > 0 and count(listing, "buffer_inv sc1$") == 0


def products_are_packed(listing: Listing) -> None:
    """Two products an instruction: four for each of a lane's loads of eight weights."""
    assert count(listing, "v_pk_fma_f32 ") >= 4 * listing.quads * STAGES


def weights_land_while_others_are_multiplied(listing: Listing) -> None:
    """In the loops over pieces, a load follows each multiplied quad: none of them waits for those after it."""
    between: list[int] = []  # products since the load before
    products: int | None = None
    for line in listing.instructions:
        if re.match(r"buffer_load_dwordx4 .* nt", line):
            if products is not None:
                between.append(products)
            products = 0
        elif products is not None:
            products = None if line.startswith("s_barrier") else products + line.startswith("v_pk_fma_f32 ")
    assert sum(products >= 4 for products in between) >= (listing.quads - 1) * STAGES


def barriers_leave_weights_under_way(listing: Listing) -> None:
    """No barrier drains the loads; only shared memory has to be settled."""
    barriers = [i for i, line in enumerate(listing.instructions) if line == "s_barrier"]
    assert barriers
    for i in barriers:
        assert not any("vmcnt" in line for line in listing.instructions[i - 2 : i])


def waits_are_bounded_by_a_clock(listing: Listing) -> None:
    assert count(listing, "s_memrealtime ") > 0
    assert count(listing, "s_sleep 1$") > 0


def the_die_is_noted(listing: Listing) -> None:
    assert count(listing, r"s_getreg_b32 s\d+, hwreg\(HW_REG_XCC_ID, 0, 4\)$") > 0


def blocks_are_counted_by_die(listing: Listing) -> None:
    """By counters of the whole system, in each kernel; where there is but one die, nobody counts."""
    counted = 0 if listing.build.topology is None else len(listing.kernels)
    assert count(listing, r"(global|flat)_atomic_(add|inc)") == counted
    assert count(listing, r"global_atomic_add .* sc0 sc1$") == counted


CLAIMS = (
    both_kernels,
    no_scratch,
    no_vector_spills,
    scalars_in_two_vector_registers,
    two_waves_per_simd,
    shared_memory_fits,
    weights_are_streamed,
    words_pass_every_cache,
    control_is_ordered_for_all_devices,
    products_are_packed,
    weights_land_while_others_are_multiplied,
    barriers_leave_weights_under_way,
    waits_are_bounded_by_a_clock,
    the_die_is_noted,
    blocks_are_counted_by_die,
)
