"""Which conversation a prompt goes on in, and what is remembered of it."""

from __future__ import annotations

from typing import Any

from serve.synthetic import Cache, SyntheticDecoder

from jax_mono.serve.prefixes import Prefixes, common


def make(capacity: int, *conversations: list[int]) -> Prefixes:
    prefixes = Prefixes(SyntheticDecoder(), capacity)  # type: ignore[arg-type]
    for tokens in conversations:
        prefixes.put(tokens, Cache(tuple(tokens)))
    return prefixes


def take(prefixes: Prefixes, prompt: list[int]) -> tuple[tuple[int, ...], int]:
    cache: Any
    cache, known = prefixes.take(prompt)
    return cache.tokens, known


def test_common() -> None:
    assert common([1, 2, 3], [1, 2, 4]) == 2
    assert common([], [1]) == 0
    assert common([1, 2], [1, 2, 3]) == 2


def test_a_continued_conversation_goes_on_in_its_cache() -> None:
    prefixes = make(2, [1, 2, 3, 4], [5, 6])
    assert take(prefixes, [1, 2, 3, 4, 9]) == ((1, 2, 3, 4), 4)
    assert len(prefixes) == 1
    # One token must be fed, even if all are known.
    assert take(make(2, [1, 2, 3]), [1, 2, 3]) == ((1, 2), 2)


def test_a_shared_beginning_is_copied_if_there_is_much_else() -> None:
    system = list(range(40))
    prefixes = make(2, [*system, *[7] * 100])
    assert take(prefixes, [*system, 8, 9]) == (tuple(system), 40)
    assert len(prefixes) == 1
    assert take(prefixes, [*system, *[7] * 100, 1])[1] == 140
    full = make(2, [5, 6], [*system, *[7] * 100])
    assert take(full, [*system, 8])[1] == 40
    assert len(full) == 1  # what is not alike made room
    # With room for one conversation only, it is cut instead.
    assert take(make(1, [*system, *[7] * 100]), [*system, 8]) == (tuple(system), 40)


def test_the_oldest_makes_room_for_something_new() -> None:
    prefixes = make(2, [1, 2], [3, 4])
    assert take(prefixes, [9, 9]) == ((), 0)
    assert take(prefixes, [3, 4, 5])[1] == 2


def test_only_what_was_fed_is_known() -> None:
    prefixes = make(2)
    prefixes.put([1, 2, 3, 4], Cache((1, 2)))
    assert take(prefixes, [1, 2, 3, 4, 5])[1] == 2
