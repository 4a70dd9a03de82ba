"""The line: bounded, fair, and easy to leave."""

from __future__ import annotations

import threading

import pytest

from jax_mono.serve.fair import FairQueue, Group, QueueFullError


def test_clients_take_turns() -> None:
    queue: FairQueue[str] = FairQueue(10)
    queue.put(Group("greedy", ["g1", "g2", "g3"]))
    queue.put(Group("greedy", ["g4"]))
    queue.put(Group("modest", ["m1"]))
    queue.put(Group("other", ["o1", "o2"]))
    assert [queue.get() for _ in range(7)] == ["g1", "m1", "o1", "g2", "o2", "g3", "g4"]
    assert len(queue) == 0


def test_there_is_an_end_to_the_line() -> None:
    queue: FairQueue[int] = FairQueue(2)
    first, second = Group("a", [1, 2]), Group("a", [3])
    queue.put(first)
    queue.put(second)
    with pytest.raises(QueueFullError):
        queue.put(Group("b", [4]))
    queue.get()
    with pytest.raises(QueueFullError):  # the first request still waits in part
        queue.put(Group("b", [4]))
    queue.discard(first)
    queue.put(Group("b", [4]))
    queue.discard(first)  # twice is fine
    assert [queue.get(), queue.get()] == [3, 4]


def test_closing_wakes_who_waits_and_names_who_waited() -> None:
    queue: FairQueue[int] = FairQueue(2)
    found: list[int | None] = []
    thread = threading.Thread(target=lambda: found.append(queue.get()))
    thread.start()
    assert list(queue.close()) == []
    thread.join(10)
    assert found == [None]
    with pytest.raises(QueueFullError):
        queue.put(Group("a", [1]))
    queue = FairQueue(2)
    queue.put(Group("a", [1, 2]))
    assert list(queue.close()) == [1, 2]
