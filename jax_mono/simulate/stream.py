"""The tapes of a device as fluids: all pumps that have room share the memory's bandwidth.

A pump runs ahead of its block by what the ring holds. When the ring is full it rests, or fetches what comes next into
the second-level cache; what lies there is then copied into the ring without the memory. A pump that goes on after a
rest has its first bytes after a latency, which later ones hide. Pumps that read memory get equal shares of the
device's rate, and no more than each can take. Progress is kept per *way* of reading, in a common coordinate, the bytes
that a pump would have read had it read in that way since the start (processor sharing: Kleinrock, Queueing systems II,
1976), so that a change of the number of pumps costs nothing per pump.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field

_NOTHING = 1e-2
"""Bytes that are lost to rounding."""


@dataclass(frozen=True)
class Ahead:
    """How a pump with a full ring goes on.

    Attributes:
        size: Bytes by which it may be ahead of the ring.
        rate: Bytes per nanosecond at which it fetches them.
        near_rate: Bytes per nanosecond at which they come into the ring.
        near_latency: Nanoseconds until the first of them are there.
        most: Bytes per nanosecond that come into all rings together at most.
    """

    size: float
    rate: float
    near_rate: float
    near_latency: float = 0.0
    most: float = math.inf


@dataclass(eq=False)
class _Way:
    """Pumps that read in the same way.

    Attributes:
        most: Bytes per nanosecond of one of them at most.
        common: Bytes that each would have read so far.
        count: How many there are.
        queue: (common coordinate, block, turn) of their next stops.
    """

    most: float
    common: float = 0.0
    count: int = 0
    queue: list[tuple[float, int, int]] = field(default_factory=list)


@dataclass(eq=False)
class _Pump:
    """One block's pump; positions are bytes of its tape since the start.

    Attributes:
        position: What is in the ring or was multiplied, when it was looked at last.
        ahead: Bytes behind that in the cache, likewise.
        seen: The way's coordinate at that time.
        needed: End of the product at hand.
        limit: How far the ring may be filled.
        way: How it reads; None while it rests or wakes up.
        waking: Whether its first bytes after a rest are on their way.
        waiting: Whether the block waits for ``needed``.
        turn: Which of its entries in a queue is valid.
    """

    position: float = 0.0
    ahead: float = 0.0
    seen: float = 0.0
    needed: float = 0.0
    limit: float = 0.0
    way: _Way | None = None
    waking: bool = False
    waiting: bool = False
    turn: int = 0


class Stream:
    """The memory of one device.

    Args:
        blocks: Pumps.
        rate: Bytes per nanosecond of the device.
        block_rate: Bytes per nanosecond of one pump at most.
        ring: Bytes by which a pump may be ahead.
        ahead: How it goes on when the ring is full; None if it rests.
        latency: Nanoseconds until the first bytes are there after a rest.
    """

    def __init__(
        self,
        blocks: int,
        rate: float,
        block_rate: float,
        ring: float,
        *,
        ahead: Ahead | None = None,
        latency: float = 0.0,
    ) -> None:
        self._rate, self._now, self._latency = rate, 0.0, latency
        self._wakes: list[tuple[float, int, int]] = []
        ahead = ahead or Ahead(0.0, 0.0, 0.0)
        self._most_ahead, self._most, self._near_latency = ahead.size, ahead.most, ahead.near_latency
        self._ring, self._ahead, self._near = _Way(block_rate), _Way(ahead.rate), _Way(ahead.near_rate)
        self._pumps = [_Pump() for _ in range(blocks)]
        for block, pump in enumerate(self._pumps):
            pump.limit = ring
            self._go_on(block)

    @property
    def rate(self) -> float:
        """Bytes per nanosecond that come into all rings at the moment."""
        return sum(way.count * self._rate_of(way) for way in (self._ring, self._near))

    def _rate_of(self, way: _Way) -> float:
        """Bytes per nanosecond of each pump of a way: equal shares of the memory, unless some cannot take theirs."""
        if way.count == 0:
            return 0.0
        if way is self._near:
            return min(way.most, (self._most - self._ring.count * self._rate_of(self._ring)) / way.count)
        other = self._ahead if way is self._ring else self._ring
        share = self._rate / (way.count + other.count)
        if other.most < share:
            share = (self._rate - other.count * other.most) / way.count
        return min(way.most, share)

    def next_event(self) -> float:
        """When a pump comes to a stop, or the block at the end of a product; infinity if none runs."""
        soonest = self._wakes[0][0] if self._valid(self._wakes) else math.inf
        for way in (self._ring, self._ahead, self._near):
            self._valid(way.queue)
            if way.queue:
                left = max(0.0, way.queue[0][0] - way.common)
                soonest = min(soonest, self._now + left / self._rate_of(way))
        return soonest

    def _valid(self, queue: list[tuple[float, int, int]]) -> bool:
        """Drops entries that became obsolete from the front of a queue; whether there is another one."""
        while queue and self._pumps[queue[0][1]].turn != queue[0][2]:
            heapq.heappop(queue)
        return bool(queue)

    def advance(self, now: float) -> list[int]:
        """Goes on to ``now``, which must not lie behind :meth:`next_event`.

        Returns:
            Blocks whose product has all its weights by then.
        """
        ways = (self._ring, self._ahead, self._near)
        for way, rate in [(way, self._rate_of(way)) for way in ways]:
            way.common += (now - self._now) * rate
        self._now = now
        ready = []
        while self._valid(self._wakes) and self._wakes[0][0] <= now:
            block = heapq.heappop(self._wakes)[1]
            self._pumps[block].waking = False
            self._go_on(block, awake=True)
        for way in ways:
            while self._valid(way.queue) and way.queue[0][0] <= way.common + _NOTHING:
                block = heapq.heappop(way.queue)[1]
                pump = self._pumps[block]
                self._settle(pump)
                if pump.waiting and pump.position >= pump.needed - _NOTHING:
                    pump.waiting = False
                    ready.append(block)
                self._go_on(block)
        return ready

    def begin(self, block: int, size: float) -> bool:
        """Starts a product of ``size`` bytes; the clock must stand at now.

        Returns:
            Whether all its weights are there already; else :meth:`advance` tells when they are.
        """
        pump = self._pumps[block]
        self._settle(pump)
        pump.needed += size
        pump.limit += size
        pump.waiting = pump.position < pump.needed - _NOTHING
        self._go_on(block)
        return not pump.waiting

    def _settle(self, pump: _Pump) -> None:
        """Brings a pump's numbers up to now."""
        if pump.way is None:
            return
        moved = pump.way.common - pump.seen
        pump.seen = pump.way.common
        if pump.way is not self._ahead:
            pump.position += moved
        if pump.way is not self._ring:
            pump.ahead += moved if pump.way is self._ahead else -moved

    def _go_on(self, block: int, *, awake: bool = False) -> None:
        """Chooses how a settled pump reads from now on, and where it stops.

        Args:
            block: Whose pump.
            awake: Whether its first bytes are there, if it rested.
        """
        pump = self._pumps[block]
        if pump.waking:
            return
        rested = pump.way is None or pump.way is self._ahead
        if pump.way is not None:
            pump.way.count -= 1
            pump.way = None
        pump.turn += 1
        stop = (pump.needed if pump.waiting else pump.limit) - pump.position
        near = pump.ahead > _NOTHING
        latency = self._near_latency if near else self._latency
        if stop > _NOTHING and rested and not awake and latency:
            pump.waking = True
            heapq.heappush(self._wakes, (self._now + latency, block, pump.turn))
            return
        if stop > _NOTHING and near:
            pump.way, stop = self._near, min(stop, pump.ahead)
        elif stop > _NOTHING:
            pump.way = self._ring
        elif pump.ahead < self._most_ahead - _NOTHING:
            pump.way, stop = self._ahead, self._most_ahead - pump.ahead
        else:
            return
        pump.way.count += 1
        pump.seen = pump.way.common
        heapq.heappush(pump.way.queue, (pump.seen + stop, block, pump.turn))
