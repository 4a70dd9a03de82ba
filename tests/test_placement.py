"""On which die a block belongs."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_mono.config import ConfigError
from jax_mono.models.presets import preset
from jax_mono.placement import MAX_DIES, place
from jax_mono.plan import GPU, make_plan
from jax_mono.spans import Span
from jax_mono.topology import H200, HOST, MI300X, MI355X, TOPOLOGIES, Figure, Topology


@pytest.mark.parametrize("topology", TOPOLOGIES.values(), ids=TOPOLOGIES)
@given(data=st.data())
def test_every_block_has_one_die_and_neighbours_share_it(topology: Topology, data: st.DataObject) -> None:
    blocks = data.draw(st.integers(1, topology.units))
    placement = place(blocks, topology)
    dies = [placement.die_of(block) for block in range(blocks)]
    assert dies == sorted(dies) and len(placement.roles) == topology.dies.whole
    counts = [dies.count(die) for die in range(topology.dies.whole)]
    assert counts == [span.count for span in placement.roles] and max(counts) - min(counts) <= 1
    assert max(counts) <= topology.units_per_die.whole
    assert [placement.side_of(block) for block in range(blocks)] == [topology.io_die_of(die) for die in dies]
    assert placement.num_sides == topology.io_dies.whole


def test_an_mi300x() -> None:
    placement = place(304, MI300X)
    assert placement.roles == tuple(Span(38 * die, 38) for die in range(8))
    assert placement.sides == (0, 0, 1, 1, 2, 2, 3, 3)
    assert place(256, MI355X).sides == (0, 0, 0, 0, 1, 1, 1, 1)


def test_one_die_is_like_no_topology() -> None:
    config = preset("smollm2-135m")
    flat = make_plan(config, blocks=66, target=GPU)
    assert make_plan(config, blocks=66, target=GPU, topology=H200) == flat
    assert make_plan(config, blocks=2) == make_plan(config, blocks=2, topology=HOST)
    assert make_plan(config, blocks=66, target=GPU, topology=MI300X) != flat


def test_what_cannot_be_placed() -> None:
    many = dataclasses.replace(MI300X, name="mi999", dies=Figure(MAX_DIES + 1, "reported"))
    with pytest.raises(ConfigError, match="mi999 has 17 dies, the resident program knows at most 16"):
        place(1, many)
    with pytest.raises(ConfigError, match="mi300x has 304 compute units, too few for 305 blocks"):
        place(305, MI300X)
    with pytest.raises(ConfigError, match="a plan for CPUs has no dies; plan for mi300x with target=GPU"):
        make_plan(preset("smollm2-135m"), topology=MI300X)
