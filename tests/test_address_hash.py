"""The hash of addresses: parts of memory, and the swizzle that follows."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from jax_mono.address_hash import paged_swizzle, parts, swizzle
from jax_mono.placement import place
from jax_mono.topology import H200, HOST, MI300X, MI325X, MI355X, AddressHash

KNOWN = MI300X.address_hash
assert KNOWN is not None
MIB = 1 << 20


def test_the_hash_of_the_driver() -> None:
    assert MI325X.address_hash == MI355X.address_hash == KNOWN
    assert H200.address_hash is HOST.address_hash is None
    assert (KNOWN.granule_bytes, KNOWN.parts, KNOWN.region_bytes) == (4096, 4, MIB)
    assert KNOWN.granule_bytes == MI300X.granule_bytes.whole and KNOWN.parts == MI300X.interleave_ways.whole
    for bit, masked in enumerate(((12, 20, 27, 34, 41), (13, 21, 28, 35, 42))):
        for place_ in range(48):
            assert parts(KNOWN, np.array(1 << place_)) == (1 << bit if place_ in masked else 0) | (
                1 << 1 - bit if place_ in ((13, 21, 28, 35, 42), (12, 20, 27, 34, 41))[bit] else 0
            )


@pytest.mark.parametrize("start", [0, 5 * MIB, (1 << 34) + 127 * MIB, (3 << 41) + (5 << 27)])
def test_granules_lie_where_the_hash_takes_their_addresses(start: int) -> None:
    """A block of part w finds its granule of a period in place w ^ s, in every region."""
    regions = 300
    addresses = start + np.arange(regions * MIB // 4096) * 4096
    places = np.arange(len(addresses)) % 4
    table = np.repeat(swizzle(KNOWN, start, regions), 256)
    np.testing.assert_array_equal(parts(KNOWN, addresses), places ^ table)
    assert set(table) == {0, 1, 2, 3}


def test_pages_add_what_the_bits_above_them_say() -> None:
    draw = np.random.default_rng(0)
    page, start, regions = 2 * MIB, (7 << 40) + 3 * MIB, 41
    frames = draw.integers(0, 1 << 26, 21) * page  # physical pages, anywhere
    virtual = start + np.arange(regions) * MIB
    physical = frames[virtual // page - start // page] + virtual % page
    exchanged = parts(KNOWN, frames)
    assert len(set(exchanged)) == 4
    np.testing.assert_array_equal(paged_swizzle(KNOWN, start, regions, page, exchanged), parts(KNOWN, physical))


def test_memory_that_has_no_swizzle() -> None:
    with pytest.raises(ValueError, match="starts within a region of 1048576 bytes"):
        swizzle(KNOWN, 4096, 1)
    with pytest.raises(ValueError, match="starts within a region"):
        paged_swizzle(KNOWN, 4096, 1, 2 * MIB, np.zeros(1, int))
    with pytest.raises(ValueError, match="pages of 65536 bytes do not hold whole regions"):
        paged_swizzle(KNOWN, 0, 1, 1 << 16, np.zeros(1, int))
    with pytest.raises(ValueError, match="touches 3 pages, 2 are known"):
        paged_swizzle(KNOWN, MIB, 4, 2 * MIB, np.zeros(2, int))


def test_a_hash_numbers_granules_in_order() -> None:
    for masks in ((1 << 12 | 1 << 20, 1 << 14), (1 << 13, 1 << 12)):
        with pytest.raises(ValueError, match="the lowest bits of the masks must follow each other"):
            AddressHash(masks, "amdgpu")
    with pytest.raises(ValueError, match="no further bit of an address exchanges parts"):
        AddressHash((1 << 12, 1 << 13), "amdgpu")
    with pytest.raises(ValueError, match="add it to SOURCES"):
        AddressHash((1 << 12 | 1 << 20,), "hearsay")


def test_regions_of_a_plan() -> None:
    assert place(304, MI300X).region_periods == 64, "a MiB of periods of 16 KiB"
    assert place(256, MI355X).region_periods == 64
    assert place(304, MI300X, (0, 1, 2, 3, 3, 2, 1, 0)).region_periods == 0, "not the period of the hash"
    assert place(304, MI300X, (0,)).region_periods == place(304).region_periods == 0
    assert place(304, dataclasses.replace(MI300X, address_hash=None)).region_periods == 0
    one = place(304, MI300X)
    assert (one.regions(64), one.regions(65)) == (77, 79), (
        "one more than they fill: they may start in the middle of one"
    )
