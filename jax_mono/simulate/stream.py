"""The tapes of a device as fluids: all pumps that have room share the memory's bandwidth.

A pump runs ahead of its block by what the ring holds and rests when the ring is full. Pumps that run get equal shares
of the device's rate, and no more than one block can take. Progress is kept in a common coordinate, the bytes that a
pump would have read had it never rested (processor sharing: Kleinrock, Queueing systems II, 1976), so that a change of
the number of pumps costs nothing per pump.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass


@dataclass
class _Pump:
    """One block's pump; positions are bytes of its tape since the start.

    Attributes:
        position: Read so far; while it runs, minus the common coordinate.
        needed: End of the product at hand.
        limit: How far it may run.
        running: Whether it does.
        waiting: Whether the block waits for ``needed``.
        turn: Which of its entries in the queue is valid.
    """

    position: float = 0.0
    needed: float = 0.0
    limit: float = 0.0
    running: bool = False
    waiting: bool = False
    turn: int = 0


class Stream:
    """The memory of one device.

    Args:
        blocks: Pumps.
        rate: Bytes per nanosecond of the device.
        block_rate: Bytes per nanosecond of one pump at most.
        ring: Bytes by which a pump may be ahead.
    """

    def __init__(self, blocks: int, rate: float, block_rate: float, ring: float) -> None:
        self._rate, self._block_rate, self._ring = rate, block_rate, ring
        self._pumps = [_Pump() for _ in range(blocks)]
        self._running, self._common, self._now = 0, 0.0, 0.0
        self._queue: list[tuple[float, int, int]] = []
        for block in range(blocks):
            self._extend(block, ring)

    @property
    def rate(self) -> float:
        """Bytes per nanosecond that all pumps read at the moment."""
        return min(self._rate, self._running * self._block_rate)

    def next_event(self) -> float:
        """When a pump comes to the end of a product or of its ring; infinity if none runs."""
        while self._queue and self._pumps[self._queue[0][1]].turn != self._queue[0][2]:
            heapq.heappop(self._queue)
        if not self._queue:
            return math.inf
        return self._now + max(0.0, self._queue[0][0] - self._common) * self._running / self.rate

    def advance(self, now: float) -> list[int]:
        """Goes on to ``now``, which must not lie behind :meth:`next_event`.

        Returns:
            Blocks whose product has all its weights by then.
        """
        if self._running:
            self._common += (now - self._now) * self.rate / self._running
        self._now = now
        ready = []
        while self._queue:
            at, block, turn = self._queue[0]
            pump = self._pumps[block]
            if pump.turn == turn and at > self._common + 1e-6:
                break
            heapq.heappop(self._queue)
            if pump.turn != turn:
                continue
            if pump.waiting:
                pump.waiting = False
                ready.append(block)
            if pump.position + self._common >= pump.limit - 1e-6:
                pump.position += self._common
                pump.running = False
                self._running -= 1
            else:
                self._enqueue(block)
        return ready

    def begin(self, block: int, size: float) -> bool:
        """Starts a product of ``size`` bytes; the clock must stand at now.

        Returns:
            Whether all its weights are there already; else :meth:`advance` tells when they are.
        """
        pump = self._pumps[block]
        pump.needed += size
        position = pump.position + (self._common if pump.running else 0.0)
        pump.waiting = position < pump.needed - 1e-6
        waiting = pump.waiting
        self._extend(block, size)
        return not waiting

    def _extend(self, block: int, size: float) -> None:
        pump = self._pumps[block]
        pump.limit += size
        if not pump.running and size > 0:
            pump.position -= self._common
            pump.running = True
            self._running += 1
        if pump.running:
            self._enqueue(block)

    def _enqueue(self, block: int) -> None:
        pump = self._pumps[block]
        pump.turn += 1
        stop = pump.needed if pump.waiting else pump.limit
        heapq.heappush(self._queue, (stop - pump.position, block, pump.turn))
