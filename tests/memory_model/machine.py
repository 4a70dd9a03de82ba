"""An abstract machine with weak memory that runs a protocol, in all ways or in many.

Memory. A store becomes visible to each reader at an arbitrary later time, stores to different words in any order. So a
load returns any value that was stored since the one that its reader saw last, or that one; only the values of one word
come in the order in which they were stored. Caches of a device or a die may keep an old value for ever unless store and
load both reach far enough; if they do, a load returns the newest value in the end.

What can go wrong. A reader takes a value that was not meant for it (``WrongValue``). A value is overwritten while a
reader still waits for it (``Overwritten``): the reader may only ever see the newer one. Nobody is certain to get on
(``Hang``).

A poll that finds another tag changes nothing, so the state of the machine is how far each agent has come, and all
executions are the paths through these states. What a reader has seen last follows from how far it has come, too.
"""

from __future__ import annotations

import bisect
import random
from collections import defaultdict
from dataclasses import dataclass

from memory_model.protocol import SCOPES, Access, Event, Protocol, Scope

State = tuple[int, ...]


class Violation(Exception):
    """An execution in which the protocol fails."""


class WrongValue(Violation):
    """A reader takes a value that was not meant for it."""


class Overwritten(Violation):
    """A value is gone before its reader has seen it."""


class Hang(Violation):
    """Some agents wait and none is certain to get on."""


class TooManyStates(Exception):
    """An exhaustive search was not finished."""


@dataclass(frozen=True)
class Reading:
    """One awaited value of a cell.

    Attributes:
        cell: The cell.
        oldest: Index of the value that the reader has seen last.
        wanted: Index of the value that is meant for it; None if it is never stored.
        lures: Indices of other values with the awaited tag.
        sure: Whether it sees a stored value in the end.
    """

    cell: int
    oldest: int
    wanted: int | None
    lures: tuple[int, ...]
    sure: bool


class Machine:
    """Runs a protocol.

    Args:
        protocol: The protocol.
        ordered: Whether stores become visible in program order, as on a machine with strong memory. The machines that
            this project is for are not like that; it serves to show what the difference is.

    Attributes:
        readings: Per agent, what its reads wait for, by index of the event.
        stores: By cell and part of a word, indices of the writer's events that store it, in order.
        last_reads: By cell and index of a value, who reads it: agents and indices of their events.
    """

    def __init__(self, protocol: Protocol, *, ordered: bool = False) -> None:
        self.protocol, self.ordered = protocol, ordered
        self.start: State = (0,) * len(protocol.programs)
        self.end: State = tuple(len(program) for program in protocol.programs)
        self.readings: list[dict[int, list[Reading]]] = [{} for _ in protocol.programs]
        self.stores: dict[tuple[int, str], list[int]] = defaultdict(list)
        self.last_reads: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
        for program in protocol.programs:
            for at, event in enumerate(program):
                if event.kind == "write":
                    for access in event.accesses:
                        self.stores[access.cell, event.part].append(at)
        for agent, program in enumerate(protocol.programs):
            seen: dict[int, int] = {}
            for at, event in enumerate(program):
                if event.kind == "read":
                    self.readings[agent][at] = [self._reading(agent, at, access, seen) for access in event.accesses]

    def _reading(self, agent: int, at: int, access: Access, seen: dict[int, int]) -> Reading:
        values = self.protocol.cells[access.cell].values
        oldest = seen.get(access.cell, 0)
        matching = [i for i, value in enumerate(values) if value.tag == access.value.tag]
        meant = [i for i in matching if values[i].meaning == access.value.meaning]
        wanted = meant[0] if meant else None
        if wanted is not None:
            seen[access.cell] = wanted
            self.last_reads[access.cell, wanted].append((agent, at))
        lures = tuple(i for i in matching if i != wanted and i >= oldest)
        return Reading(access.cell, oldest, wanted, lures, self._reaches(agent, access.cell))

    def _reaches(self, agent: int, cell: int) -> bool:
        rules, writer = self.protocol.rules, self.protocol.cells[cell].writer
        if writer < 0:
            return False
        (device, die), (other_device, other_die) = self.protocol.places[agent], self.protocol.places[writer]
        distance: Scope = "system" if device != other_device else "device" if die != other_die else "die"
        return SCOPES.index(distance) <= min(SCOPES.index(rules.store_scope), SCOPES.index(rules.load_scope))

    def _stored(self, state: State, cell: int, part: str) -> int:
        """Index of the newest value of a cell, or of half of it."""
        writer = self.protocol.cells[cell].writer
        return 0 if writer < 0 else bisect.bisect_left(self.stores[cell, part], state[writer])

    def choices(self, state: State) -> tuple[list[int], bool]:
        """Which agents can get on, and whether any of them is certain to.

        Raises:
            Violation: A reader may take a wrong value, or is too late.
        """
        able, certain = [], False
        for agent in range(len(state)):
            ready, sure = self._ready(state, agent)
            if ready:
                able.append(agent)
                certain |= sure
        return able, certain

    def _ready(self, state: State, agent: int) -> tuple[bool, bool]:
        """Whether an agent may get on, and whether it will."""
        at = state[agent]
        if at == self.end[agent]:
            return False, False
        if self.protocol.programs[agent][at].kind == "write":
            return True, True
        return self._look(state, agent, at)

    def _look(self, state: State, agent: int, at: int) -> tuple[bool, bool]:
        """Whether a reader may find what it waits for, and whether it will."""
        ready = sure = True
        halves = self.protocol.rules.word != "whole"
        for reading in self.readings[agent][at]:
            newest = self._stored(state, reading.cell, "tag" if halves else "whole")
            payload = self._stored(state, reading.cell, "payload") if halves else newest
            wanted = reading.wanted
            if any(lure <= newest for lure in reading.lures):
                raise WrongValue(self._say(agent, at, reading, "takes a value that was not meant for it"))
            if wanted is None or newest < wanted:
                ready = False
                continue
            if max(newest, payload) > wanted:
                raise Overwritten(self._say(agent, at, reading, "waits for a value that is overwritten already"))
            if halves and (payload < wanted or not self._in_order()):
                raise WrongValue(self._say(agent, at, reading, "takes the tag of one value and the payload of another"))
            sure &= reading.sure
        return ready, ready and sure

    def _in_order(self) -> bool:
        """Whether a reader that saw the second half sees the first."""
        return self.ordered and self.protocol.rules.word == "payload first"

    def _say(self, agent: int, at: int, reading: Reading, what: str) -> str:
        device, die = self.protocol.places[agent]
        wanted = self.protocol.programs[agent][at].accesses[0].value.meaning
        return (
            f"agent {agent} (device {device}, die {die}) {what}: {wanted} in {self.protocol.cells[reading.cell].name}"
        )

    def check_late_readers(self, state: State, agent: int) -> None:
        """Before an agent writes: whoever needs a value that is overwritten now must have read it.

        Raises:
            Overwritten: Somebody has not.
        """
        event: Event = self.protocol.programs[agent][state[agent]]
        if event.kind != "write":
            return
        for access in event.accesses:
            current = bisect.bisect_left(self.stores[access.cell, event.part], state[agent])
            for reader, at in self.last_reads.get((access.cell, current), ()):
                if state[reader] <= at:
                    name = self.protocol.cells[access.cell].name
                    raise Overwritten(f"agent {agent} overwrites {name} before agent {reader} has read it")

    def step(self, state: State, agent: int) -> State:
        """Lets an agent do its next event.

        Raises:
            Overwritten: It overwrites what somebody needs.
        """
        self.check_late_readers(state, agent)
        return (*state[:agent], state[agent] + 1, *state[agent + 1 :])

    def explore(self, most: int = 200_000) -> int:
        """Tries all executions.

        Args:
            most: States to visit at most.

        Returns:
            How many states there are.

        Raises:
            Violation: One of them fails.
            TooManyStates: There are more.
        """
        waiting, met = [self.start], {self.start}
        while waiting:
            state = waiting.pop()
            able, certain = self.choices(state)
            if state != self.end and not certain:
                raise Hang(self._stuck(state))
            for agent in able:
                after = self.step(state, agent)
                if after not in met:
                    met.add(after)
                    waiting.append(after)
            if len(met) > most:
                raise TooManyStates(f"more than {most} states")
        return len(met)

    def play(self, seed: int) -> None:
        """Runs one execution: some agents hurry, some dawdle, as the seed has it.

        Raises:
            Violation: It fails.
        """
        generator = random.Random(seed)
        eager = [generator.choice((1e-3, 1.0, 1e3)) for _ in self.start]
        state = self.start
        while state != self.end:
            if generator.random() < 0.01:
                generator.shuffle(eager)
            # The first in a random order that favours the eager ones (Efraimidis and Spirakis, 2006).
            order = sorted(range(len(state)), key=lambda agent: generator.expovariate(eager[agent]))
            able = next((agent for agent in order if self._ready(state, agent)[0]), None)
            if able is None:
                raise Hang(self._stuck(state))
            state = self.step(state, able)

    def _stuck(self, state: State) -> str:
        waiting = [agent for agent, at in enumerate(state) if at < self.end[agent]]
        agent = waiting[0]
        wanted = self.protocol.programs[agent][state[agent]].accesses[0].value.meaning
        return f"{len(waiting)} agents wait and none is certain to get on; agent {agent} for {wanted}"
