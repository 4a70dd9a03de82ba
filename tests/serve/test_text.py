"""Stop strings however they are cut into tokens, and tokens that go out with the text they say."""

from __future__ import annotations

import pytest
from cli.conftest import END, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_mono.serve.text import StopStrings, TextRun, echo_entries, token_text
from jax_mono.stream import Token
from jax_mono.tokenizer import Tokenizer

TOKENIZER = Tokenizer(make_tokenizer(), eos_ids=[END])
LETTERS = st.text(alphabet="abé日", max_size=40)


def tokens_of(text: str) -> list[Token]:
    return [Token(token, -float(index)) for index, token in enumerate(TOKENIZER.encode(text))]


@settings(max_examples=300, deadline=None)
@given(text=LETTERS, stops=st.lists(LETTERS.filter(bool).map(lambda s: s[:4]), max_size=3), cut=st.integers(1, 5))
def test_text_ends_where_the_first_stop_string_begins(text: str, stops: list[str], cut: int) -> None:
    matcher, out = StopStrings(stops), ""
    for start in range(0, len(text), cut):
        out += matcher.feed(text[start : start + cut])
        assert text.startswith(out)
        if matcher.found:
            break
    out += matcher.flush()
    assert matcher.found == any(stop in text for stop in stops)
    # Whichever stop string is complete first ends the text; no other one is in what goes out.
    assert text.startswith(out) and not any(stop in out for stop in stops)
    if not matcher.found:
        assert out == text


@settings(max_examples=200, deadline=None)
@given(text=LETTERS, stop=st.sampled_from(["", "aé", "日b", "ab"]), size=st.integers(1, 7))
def test_entries_match_the_text(text: str, stop: str, size: int) -> None:
    tokens = tokens_of(text)
    run, out, entries = TextRun(TOKENIZER, [END], [stop] if stop else []), "", []
    for start in range(0, len(tokens), size):
        delta = run.feed(tokens[start : start + size])
        out += delta.text
        entries += delta.entries
        if run.stopped:
            break
    rest = run.flush()
    out += rest.text
    entries += rest.entries
    assert out == (text.partition(stop)[0] if stop else text)
    assert [entry.id for entry in entries] == [token.id for token in tokens[: len(entries)]]
    assert [entry.logprob for entry in entries] == [token.logprob for token in tokens[: len(entries)]]
    if not run.stopped:
        assert len(entries) == len(tokens)
    elif entries:
        assert entries[-1].start <= len(out)


def test_a_stop_token_leaves_no_text() -> None:
    run = TextRun(TOKENIZER, [END], [])
    delta = run.feed([*tokens_of("ab"), Token(END, -1.0), *tokens_of("c")])
    assert (delta.text, run.stopped, run.count) == ("ab", True, len(tokens_of("ab")) + 1)


def test_half_a_character_waits() -> None:
    run = TextRun(TOKENIZER, [], [])
    first, *rest = tokens_of("日")
    assert rest
    assert run.feed([first]).text == ""
    assert run.feed(rest).text == "日"


def test_tokens_as_text() -> None:
    (space_a,) = TOKENIZER.encode(" a")[:1]
    assert token_text(TOKENIZER, END) == "<|end|>"
    assert token_text(TOKENIZER, 10_000) == ""
    assert token_text(TOKENIZER, space_a).startswith(" ")
    raw = TOKENIZER.encode("é")[0]
    assert token_text(TOKENIZER, raw) in ("é", "bytes:\\xc3")


@pytest.mark.parametrize("text", ["the quick brown", "déjà vu 日本", "<|user|>hello"])
def test_echo(text: str) -> None:
    tokens = TOKENIZER.encode(text)
    logprobs = [-float(index) for index in range(1, len(tokens))]
    echoed, entries = echo_entries(TOKENIZER, tokens, logprobs, 0)
    assert echoed == text
    assert [entry.id for entry in entries] == tokens
    assert [entry.logprob for entry in entries] == [None, *logprobs]
    assert entries[0].start == 0 and entries[-1].start <= len(text)
