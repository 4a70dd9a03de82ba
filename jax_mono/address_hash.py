"""Which swizzle a region of memory needs, from the hash by which a device chooses the part of an address.

Pure: (hash, addresses) -> numbers. A program sees virtual addresses, whose bits below the size of a page are those of
the physical ones. What higher bits add is the same for all of a page, and has to be known of each.
"""

from __future__ import annotations

import numpy as np

from jax_mono.topology import AddressHash


def parts(known: AddressHash, addresses: np.ndarray) -> np.ndarray:
    """The parts of memory that addresses belong to.

    Args:
        known: The hash.
        addresses: int64, physical.

    Returns:
        int32, shaped likewise.
    """
    addresses = np.asarray(addresses, np.int64)
    bits = [np.bitwise_count(addresses & mask).astype(np.int32) % 2 << bit for bit, mask in enumerate(known.masks)]
    return np.sum(bits, axis=0, dtype=np.int32)


def swizzle(known: AddressHash, start: int, regions: int) -> np.ndarray:
    """The swizzle of memory whose physical addresses are known.

    Args:
        known: The hash.
        start: Physical address of the first region; the others follow.
        regions: How many.

    Returns:
        int32 [regions].

    Raises:
        ValueError: The memory starts within a region.
    """
    # A region starts with granule 0 of a period, so its part is what all of the region is exchanged by.
    return parts(known, _addresses(known, start, regions))


def paged_swizzle(known: AddressHash, start: int, regions: int, page_bytes: int, exchanged: np.ndarray) -> np.ndarray:
    """The swizzle of memory of whose physical addresses the bits below the size of a page are known.

    Args:
        known: The hash.
        start: Virtual address of the first region; the others follow.
        regions: How many.
        page_bytes: Of a page that is physically in one piece, a power of two, no smaller than a region.
        exchanged: int [pages], for each page that the regions touch: what the bits above it add, 0 to parts - 1.

    Returns:
        int32 [regions].

    Raises:
        ValueError: The memory starts within a region, pages are smaller than regions, or there are not so many pages.
    """
    if page_bytes < known.region_bytes or page_bytes & (page_bytes - 1):
        raise ValueError(f"pages of {page_bytes} bytes do not hold whole regions of {known.region_bytes}")
    addresses = _addresses(known, start, regions)
    page = addresses // page_bytes - start // page_bytes
    if regions and page[-1] >= len(exchanged):
        raise ValueError(f"the memory touches {page[-1] + 1} pages, {len(exchanged)} are known")
    return parts(known, addresses % page_bytes) ^ np.asarray(exchanged, np.int32)[page]


def _addresses(known: AddressHash, start: int, regions: int) -> np.ndarray:
    if start % known.region_bytes:
        raise ValueError(f"memory at {start:#x} starts within a region of {known.region_bytes} bytes")
    return start + np.arange(regions, dtype=np.int64) * known.region_bytes
