"""The bring-up's step for placement on fibers: both plans really decode."""

from __future__ import annotations

from pathlib import Path

import pytest
from gpu_host.stand_in import Device

from jax_mono.bringup import placement_step
from jax_mono.bringup.machine import Machine
from jax_mono.bringup.placement_step import Placement
from jax_mono.bringup.step import Context


@pytest.mark.filterwarnings("ignore:tapes on cpu")
def test_it_decodes_with_tapes_on_their_sides_and_anywhere(
    fibers: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FIBER_DIES", "0,1,2,3,4,5,6,7")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_ALLOCATOR", "platform")
    monkeypatch.setattr(placement_step, "_units", lambda _: 32)
    monkeypatch.setattr(placement_step, "_stream_rate", lambda decoder: 1.0)  # fibers have no speed
    machine = Machine("rocm", ("stand-in GPU",), "gfx942", "mi300x")
    found = Placement().run(Context(tmp_path, machine, "toy"))
    assert (found.details["groups"], found.details["blocks"]) == (4, 8)
    assert all(len(speeds) == 1 and speeds[0] > 0 for speeds in found.details["tokens_per_s"].values())
    assert len(found.remarks) == 1, "one of the plans lays no tapes by sides, or does not decode"
