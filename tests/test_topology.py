"""Topologies are consistent data, and every figure names its source."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from jax_mono.topology import H200, HOST, MI300X, MI355X, SOURCES, TOPOLOGIES, Figure, Topology


@pytest.mark.parametrize("topology", TOPOLOGIES.values(), ids=lambda topology: topology.name)
def test_figures(topology: Topology) -> None:
    figures = [getattr(topology, field.name) for field in dataclasses.fields(topology)]
    assert sum(isinstance(figure, Figure) for figure in figures) == 16
    assert TOPOLOGIES[topology.name] is topology
    assert topology.dies.whole % topology.io_dies.whole == 0
    assert topology.interleave_ways.whole % topology.io_dies.whole == 0
    assert 1e9 < topology.memory_rate.value < 1e13
    assert topology.link_rate.value <= topology.device_rate.value


def test_sources_are_all_used() -> None:
    used = {
        value.source
        for topology in TOPOLOGIES.values()
        for field in dataclasses.fields(topology)
        if isinstance(value := getattr(topology, field.name), Figure)
    }
    assert used == SOURCES.keys()
    with pytest.raises(ValueError, match="add it to SOURCES"):
        Figure(1, "hearsay")
    with pytest.raises(ValueError, match=r"0\.5 is not a whole number"):
        _ = Figure(0.5, "cdna3").whole


def test_dies_in_pairs_on_io_dies() -> None:
    assert MI300X.units == 304 and [MI300X.io_die_of(die) for die in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert MI355X.units == 256 and [MI355X.io_die_of(die) for die in range(8)] == [0] * 4 + [1] * 4
    with pytest.raises(ValueError, match="dies 0 to 7, not 8"):
        MI300X.io_die_of(8)


def test_granules_take_turns_on_io_dies() -> None:
    assert MI300X.granule_sides == (0, 1, 2, 3) and MI355X.granule_sides == (0, 0, 1, 1)
    assert H200.granule_sides == HOST.granule_sides == (0,)


def test_links() -> None:
    pairs = {(a, b) for a, b, _ in MI300X.link_graph(8)}
    assert pairs == set(itertools.combinations(range(8), 2))
    assert sum(rate for a, _, rate in MI300X.link_graph(8) if a == 0) == MI300X.device_rate.value
    assert [(a, b) for a, b, _ in H200.link_graph(4)] == [(device, -1) for device in range(4)]
    assert HOST.link_graph(4) == H200.link_graph(1) == ()
    with pytest.raises(ValueError, match="1 to 8 devices mi300x, not 9"):
        MI300X.link_graph(9)
