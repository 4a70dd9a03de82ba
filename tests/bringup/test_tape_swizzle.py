"""The swizzle of tapes, measured where they lie: afterwards every granule is on its block's side."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from bringup.synthetic_pages import times
from tiny import tiny

from jax_mono.address_hash import parts
from jax_mono.bringup.pages import Refusal
from jax_mono.bringup.tape_swizzle import measured
from jax_mono.granules import Swizzle
from jax_mono.plan import GPU, Plan, make_plan
from jax_mono.random_tapes import random_tapes
from jax_mono.swizzle import swizzled
from jax_mono.topology import MI300X, AddressHash, Topology

KNOWN = AddressHash((1 << 12 | 1 << 16 | 1 << 21, 1 << 13 | 1 << 17 | 1 << 20), "amdgpu")
"""Regions of 64 KiB: tapes of small models have many."""
NODE = dataclasses.replace(MI300X, address_hash=KNOWN)
IN_ORDER = (0, 0, 1, 1, 2, 2, 3, 3)
CONFIG = tiny("llama", num_layers=3, hidden_size=256, intermediate_size=768)


def plan_of(topology: Topology = NODE, devices: int = 2) -> Plan:
    return make_plan(CONFIG, devices=devices, blocks=32 // devices, target=GPU, topology=topology)


class Memory:
    """An array that starts at an address, of which the probe would tell such times."""

    def __init__(self, array: jax.Array, address: int, order: tuple[int, ...] = IN_ORDER, noise: float = 5.0) -> None:
        self.array, self.address, self.order, self.noise = array, address, order, noise
        self.nbytes = array.nbytes

    def __len__(self) -> int:
        return len(self.array)

    def unsafe_buffer_pointer(self) -> int:
        return self.address

    def sides(self) -> np.ndarray:
        """Of each granule: by the hash of its address."""
        return parts(KNOWN, self.address + np.arange(self.nbytes // 4096) * 4096)

    def times(self, address: int, pages: int) -> np.ndarray:
        assert (address, pages) == (self.address, self.nbytes // 4096)
        return times(lambda page: self.sides()[page], self.order, pages=pages, noise=self.noise)


@pytest.mark.parametrize("address", [0, 3 << 16, (5 << 20) + (1 << 14), (9 << 21) + (3 << 14)])
def test_every_granule_comes_to_its_side(address: int) -> None:
    plan = plan_of()
    tapes = random_tapes(plan)
    placement, words = plan.placement, plan.placement.granule_words
    memory = Memory(tapes.layers, address)
    # Of each granule, which it was before it moved; its contents say so.
    numbers = np.arange(tapes.layers.size // words)
    marked = np.asarray(tapes.layers).reshape(-1, words).copy()
    marked[:, 0], marked[:, 1] = numbers & 0xFFFF, numbers >> 16
    tapes = dataclasses.replace(tapes, layers=jax.numpy.asarray(marked.reshape(tapes.layers.shape)))
    found = measured(plan, memory, plan.tape_regions[0], NODE, memory.times)  # type: ignore[arg-type]
    assert isinstance(found, Swizzle), found
    none = Swizzle(np.zeros(2, int), np.zeros((2, plan.tape_regions[1]), int))
    moved = np.asarray(swizzled(plan, tapes, found, none).layers).reshape(-1, words)
    was = moved[:, 0].astype(int) | moved[:, 1].astype(int) << 16
    meant = np.asarray(placement.pattern)[was % 4]
    on_side = meant == memory.sides()
    # Regions that are hardly begun have too few pages to say anything.
    assert on_side.mean() > 0.97 and on_side[16:-16].all()
    assert (np.asarray(placement.pattern)[numbers % 4] == memory.sides()).mean() < 0.5, "before, few were"


def test_what_cannot_be_measured_is_refused() -> None:
    plan = plan_of()
    array, regions = random_tapes(plan).layers, plan.tape_regions[0]

    def reason(memory: Memory, plan: Plan = plan, topology: Topology = NODE) -> str:
        found = measured(plan, memory, regions, topology, memory.times)  # type: ignore[arg-type]
        assert isinstance(found, Refusal)
        return found.reason

    assert reason(Memory(array, 4096)) == "the tapes start 4096 bytes beyond a multiple of 16384"
    assert "XCDs do not fall into 4 dies" in reason(Memory(array, 0, noise=5000.0))
    turned = Memory(array, 0, order=(1, 1, 0, 0, 2, 2, 3, 3))
    assert "(0, 0, 1, 1, 2, 2, 3, 3)" in reason(turned) or "do not follow the pattern" in reason(turned)
    assert "XCDs lie on dies (0, 1, 0, 1" in reason(Memory(array, 0, order=(0, 1, 0, 1, 2, 3, 2, 3)))
    flat = make_plan(CONFIG, devices=2, blocks=16, target=GPU, topology=NODE, pattern=(0,))
    assert "no regions of memory" in reason(Memory(array, 0), flat)
    larger = AddressHash((1 << 14 | 1 << 18, 1 << 15 | 1 << 19), "amdgpu")
    assert "pages of 4096 are timed" in reason(
        Memory(array, 0), topology=dataclasses.replace(NODE, address_hash=larger)
    )
