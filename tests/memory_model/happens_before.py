"""The same question for plans of real size, where executions cannot be enumerated.

As long as every read finds the value that is meant for it, what an agent does never depends on timing. So the order
that all executions have in common is known: an agent's own order, and each store before the reads of its value. A value
can be overwritten too early if and only if the store of the next one is not behind all reads of it in this order, which
vector clocks tell (Lamport, Time, clocks, and the ordering of events in a distributed system, 1978; Mattern, Virtual
time and global states of distributed systems, 1989).
"""

from __future__ import annotations

import numpy as np
from memory_model.machine import Hang, Machine, Overwritten


def check_order(machine: Machine) -> int:
    """Shows that no value is overwritten before all its readers have seen it, whatever the timing.

    Args:
        machine: The machine with its protocol; words are whole, tags tell all values of a cell apart.

    Returns:
        How many reads of values that are overwritten later were found to come first.

    Raises:
        Overwritten: One of them need not come first.
        Hang: Reads wait for each other in a circle, or for values that nobody stores.
    """
    agents = len(machine.start)
    clocks = [np.zeros(agents, np.int32) for _ in range(agents)]
    # What a writer knew when it stored, by agent and event; shared by stores without a read between them.
    knew: list[dict[int, np.ndarray]] = [{} for _ in range(agents)]
    joined: dict[tuple[tuple[int, int], ...], np.ndarray] = {}
    done, checked = [0] * agents, 0
    stored: dict[int, int] = {}
    while any(at < end for at, end in zip(done, machine.end, strict=True)):
        moved = False
        for agent in range(agents):
            program = machine.protocol.programs[agent]
            while done[agent] < len(program):
                event = program[done[agent]]
                if event.kind == "write":
                    for access in event.accesses:
                        checked += _check(machine, clocks[agent], access.cell, stored.get(access.cell, 0), agent)
                        stored[access.cell] = stored.get(access.cell, 0) + 1
                    knew[agent][done[agent]] = clocks[agent]
                else:
                    readings = machine.readings[agent][done[agent]]
                    if any(r.wanted is None or stored.get(r.cell, 0) < r.wanted for r in readings):
                        break
                    sources = dict.fromkeys(
                        (machine.protocol.cells[r.cell].writer, machine.stores[r.cell, "whole"][r.wanted - 1])
                        for r in readings
                    )
                    key = tuple(sources)
                    if key not in joined:
                        joined[key] = np.max([knew[writer][at] for writer, at in key], axis=0)
                        writers, ats = np.asarray(key).T
                        np.maximum.at(joined[key], writers, ats + 1)
                    clocks[agent] = np.maximum(clocks[agent], joined[key])
                done[agent] += 1
                if event.kind == "read":
                    clocks[agent][agent] = done[agent]
                moved = True
        if not moved:
            raise Hang("reads wait for each other, or for what nobody stores")
    return checked


def _check(machine: Machine, clock: np.ndarray, cell: int, value: int, writer: int) -> int:
    reads = machine.last_reads.get((cell, value), ())
    for reader, at in reads:
        if reader != writer and clock[reader] <= at:
            name = machine.protocol.cells[cell].name
            raise Overwritten(f"agent {writer} may overwrite {name} before agent {reader} has read it")
    return len(reads)
