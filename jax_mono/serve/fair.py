"""The line in front of the decoder: bounded, and fair between clients."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class QueueFullError(Exception):
    """There is no room for another request."""


class Group(Generic[Item]):
    """The parts of one request that need the decoder, in order."""

    def __init__(self, client: str, items: Iterable[Item]) -> None:
        self.client = client
        self.waiting = deque(items)


class FairQueue(Generic[Item]):
    """Requests of several clients, who take turns: each turn is one part of one's oldest request.

    Args:
        capacity: Requests that may wait.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._lanes: OrderedDict[str, deque[Group[Item]]] = OrderedDict()
        self._groups = 0
        self._closed = False
        self._changed = threading.Condition()

    def __len__(self) -> int:
        """Requests that wait, wholly or in part."""
        return self._groups

    def put(self, group: Group[Item]) -> None:
        """Lets a request wait.

        Raises:
            QueueFullError: As many as may wait are waiting, or the queue is closed.
        """
        with self._changed:
            if self._closed or self._groups >= self.capacity:
                raise QueueFullError
            self._lanes.setdefault(group.client, deque()).append(group)
            self._groups += 1
            self._changed.notify()

    def get(self) -> Item | None:
        """Waits for the next part of a request; None once the queue is closed."""
        with self._changed:
            while not self._lanes and not self._closed:
                self._changed.wait()
            if self._closed:
                return None
            client, lane = next(iter(self._lanes.items()))
            group = lane[0]
            item = group.waiting.popleft()
            if not group.waiting:
                lane.popleft()
                self._groups -= 1
            if lane:
                self._lanes.move_to_end(client)
            else:
                del self._lanes[client]
            return item

    def discard(self, group: Group[Item]) -> None:
        """Forgets what still waits of a request."""
        with self._changed:
            lane = self._lanes.get(group.client, deque())
            if group in lane:
                lane.remove(group)
                self._groups -= 1
                if not lane:
                    del self._lanes[group.client]
            group.waiting.clear()

    def close(self) -> Iterator[Item]:
        """Lets nobody wait any more, and returns those who did."""
        with self._changed:
            self._closed = True
            left = [item for lane in self._lanes.values() for group in lane for item in group.waiting]
            self._lanes.clear()
            self._groups = 0
            self._changed.notify_all()
        return iter(left)
