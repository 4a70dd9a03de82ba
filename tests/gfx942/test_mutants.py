"""The claims see what they are there for: each fails on sources that break it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from gfx942 import claims
from gfx942.builds import Build, Change, Listing

ARCH, ENTRY, ROLES = "kernel/arch/gfx942.h", "kernel/entry/gfx942.h", "kernel/roles.h"
ACQUIRE = "__hip_atomic_load(at, __ATOMIC_ACQUIRE, __HIP_MEMORY_SCOPE_{})"
COUNT = "__hip_atomic_fetch_add(at, 1u, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_{})"
RELEASE = "__hip_atomic_store(at, value, __ATOMIC_RELEASE, __HIP_MEMORY_SCOPE_{})"

# They concern different instructions, so one program has them all.
POLICIES = Build(
    "smollm2-135m",
    changes=(
        Change(ARCH, "kStreamed = 2;", "kStreamed = 0;"),
        Change(ARCH, "kSystem = 1 | 16;", "kSystem = 16;"),
        Change(ARCH, ACQUIRE.format("SYSTEM"), ACQUIRE.format("AGENT")),
        Change(ARCH, RELEASE.format("SYSTEM"), RELEASE.format("AGENT")),
        Change(
            ARCH,
            '__builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup")',
            '__builtin_amdgcn_fence(__ATOMIC_RELEASE, "agent")',
        ),
        Change(ARCH, "Place::on_die(key, die())", "key"),
        Change(ROLES, "i32(arch::die() % u32(dies))", "0"),
        Change(ARCH, COUNT.format("SYSTEM"), COUNT.format("AGENT")),
        Change(ARCH, "i64(__builtin_amdgcn_s_memrealtime())", "0"),
    ),
)
REGISTERS = Build(
    "smollm2-135m",
    changes=(
        Change(ARCH, 'asm volatile("" : "+v"(sums[0]), "+v"(sums[1]), "+v"(sums[2]), "+v"(sums[3]));', ""),
        Change(
            ARCH,
            "__builtin_elementwise_fma(unpacked(held_[q][k], T{}), unpacked(values[q][k], T{}), sums[k])",
            "Pair{__builtin_fmaf(to_float(T{u16(held_[q][k])}), to_float(T{u16(values[q][k])}), sums[k].x), sums[k].y}",
        ),
        Change(ENTRY, "amdgpu_waves_per_eu(2, 2)", "amdgpu_waves_per_eu(8, 8)"),
    ),
)

CASES = [
    (POLICIES, claims.weights_are_streamed),
    (POLICIES, claims.words_pass_every_cache),
    (POLICIES, claims.control_is_ordered_for_all_devices),
    (POLICIES, claims.barriers_leave_weights_under_way),
    (POLICIES, claims.the_die_is_noted),
    (POLICIES, claims.blocks_are_counted_by_die),
    (POLICIES, claims.waits_are_bounded_by_a_clock),
    (REGISTERS, claims.no_scratch),
    (REGISTERS, claims.no_vector_spills),
    (REGISTERS, claims.products_are_packed),
    (REGISTERS, claims.weights_land_while_others_are_multiplied),
]


@pytest.mark.parametrize(("build", "claim"), CASES, ids=lambda value: getattr(value, "__name__", None))
def test_broken_sources_are_seen(listing: Listing, claim: Callable[[Listing], None]) -> None:
    with pytest.raises(AssertionError):
        claim(listing)
