"""The bring-up's step for placement on fibers: both plans really decode."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from bringup.synthetic_pages import times
from gpu_host.stand_in import Device

from jax_mono.address_hash import parts
from jax_mono.bringup import placement_step, probes
from jax_mono.bringup.machine import Machine
from jax_mono.bringup.placement_step import Placement
from jax_mono.bringup.step import Context
from jax_mono.decoder import Decoder
from jax_mono.plan import Plan
from jax_mono.random_tapes import random_tapes
from jax_mono.topology import MI300X, TOPOLOGIES


def aligned(plan: Plan) -> Decoder:
    """A decoder whose tapes start at a period, as a GPU's driver has it."""

    def moved(array: jax.Array) -> jax.Array:
        room = np.empty(array.nbytes + (1 << 14), np.uint8)
        start = -room.ctypes.data % (1 << 14)
        copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        copy[...] = array
        return jax.device_put(copy, may_alias=True)

    tapes = random_tapes(plan)
    return Decoder(plan, dataclasses.replace(tapes, layers=moved(tapes.layers), head=moved(tapes.head)), context=256)


@pytest.mark.filterwarnings("ignore:tapes on cpu")
def test_it_decodes_with_tapes_on_their_sides_and_anywhere(
    fibers: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FIBER_DIES", "0,1,2,3,4,5,6,7")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_ALLOCATOR", "platform")
    monkeypatch.setattr(placement_step, "_units", lambda _: 32)
    monkeypatch.setattr(placement_step, "_stream_rate", lambda decoder: 1.0)  # fibers have no speed
    monkeypatch.setattr(placement_step, "_decoder", aligned)
    machine = Machine("rocm", ("stand-in GPU",), "gfx942", "mi300x")
    found = Placement().run(Context(tmp_path, machine, "toy"))
    assert (found.details["groups"], found.details["blocks"]) == (4, 8)
    assert all(len(speeds) == 1 and speeds[0] > 0 for speeds in found.details["tokens_per_s"].values())
    assert len(found.remarks) == 2, "one of the plans lays no tapes by sides, or does not decode"
    assert "no tapes follow exchanged dies: there are no probes for fibers" in found.remarks


@pytest.mark.filterwarnings("ignore:tapes on cpu")
def test_it_decodes_with_tapes_that_follow_exchanged_dies(
    fibers: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Pages lie by the driver's hash of their addresses."""
    known = MI300X.address_hash
    assert known is not None
    regions = dataclasses.replace(
        known, masks=tuple(mask & 3 << 12 | 1 << 15 + bit for bit, mask in enumerate(known.masks))
    )
    monkeypatch.setitem(TOPOLOGIES, "mi300x", dataclasses.replace(MI300X, address_hash=regions))
    monkeypatch.setenv("FIBER_DIES", "0,1,2,3,4,5,6,7")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_ALLOCATOR", "platform")
    monkeypatch.setattr(placement_step, "_units", lambda _: 32)
    monkeypatch.setattr(placement_step, "_stream_rate", lambda decoder: 1.0)
    asked = []

    def page_times(platform: str, *, address: int, pages: int, **_: object) -> tuple[np.ndarray, np.ndarray]:
        asked.append(address % (1 << 14))
        return times(lambda page: parts(regions, address + page * 4096), pages=pages), np.arange(8)

    monkeypatch.setattr(probes, "page_times", page_times)
    monkeypatch.setattr(placement_step, "_decoder", aligned)
    found = Placement().run(Context(tmp_path, Machine("rocm", ("stand-in GPU",), "gfx942", "mi300x"), "toy"))
    assert asked == [0, 0], "the layers' pages, and the head's"
    assert len(found.remarks) <= 2 and not any(remark.startswith("no tapes") for remark in found.remarks)
    assert found.details["tokens_per_s"]["following"][0] > 0
