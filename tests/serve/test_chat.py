"""``/v1/chat/completions`` through the ``openai`` package."""

from __future__ import annotations

import openai
import pytest
from serve.conftest import NAME, Served

from jax_mono.decoder import Decoder

TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the quick brown fox?"}]
GREEDY = {"model": NAME, "messages": TURNS, "temperature": 0.0, "max_tokens": 20}


@pytest.fixture(scope="module")
def expected(direct: Decoder) -> str:
    output = direct.generate(direct.tokenizer.chat(TURNS), max_new_tokens=20)
    return direct.tokenizer.decode(output.tokens)


def test_an_answer_is_the_decoders(client: openai.OpenAI, direct: Decoder, expected: str) -> None:
    answer = client.chat.completions.create(**GREEDY)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", expected, "length")
    assert answer.usage.prompt_tokens == len(direct.tokenizer.chat(TURNS))


def test_a_stream_says_the_same(client: openai.OpenAI, expected: str) -> None:
    chunks = list(client.chat.completions.create(**GREEDY, stream=True, stream_options={"include_usage": True}))
    first, *rest, last, usage = chunks
    assert (first.choices[0].delta.role, last.choices[0].finish_reason) == ("assistant", "length")
    assert "".join(chunk.choices[0].delta.content for chunk in rest) == expected
    assert usage.usage.completion_tokens == 20
    with client.chat.completions.stream(**GREEDY) as stream:
        assert "".join(event.delta for event in stream if event.type == "content.delta") == expected


def test_newer_spellings(client: openai.OpenAI, expected: str) -> None:
    parts = [{"type": "text", "text": "the quick "}, {"type": "text", "text": "brown fox?"}]
    turns = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    options = {"messages": turns, "max_completion_tokens": 20, "response_format": {"type": "text"}, "store": False}
    answer = client.chat.completions.create(model=NAME, temperature=0.0, tool_choice="none", **options)
    assert answer.choices[0].message.content == expected


def test_several_choices_and_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**GREEDY, n=2, logprobs=True, top_logprobs=7)
    one, two = answer.choices
    assert one.message.content == two.message.content
    assert one.logprobs.content == two.logprobs.content and len(one.logprobs.content) == 20
    for token in one.logprobs.content:
        assert len(token.top_logprobs) == 7
        assert token.top_logprobs[0].token == token.token
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob, abs=1e-5)
        assert bytes(token.bytes).decode(errors="replace")
    chunks = list(client.chat.completions.create(**GREEDY, logprobs=True, stream=True))
    streamed = [entry for chunk in chunks if (part := chunk.choices[0].logprobs) for entry in part.content]
    assert [entry.logprob for entry in streamed] == [entry.logprob for entry in one.logprobs.content]


def test_a_conversation_is_not_computed_again(client: openai.OpenAI) -> None:
    turns = [{"role": "user", "content": "a rather long question, so that there is something to remember " * 3}]
    first = client.chat.completions.create(**GREEDY | {"messages": turns})
    turns += [{"role": "assistant", "content": first.choices[0].message.content}, {"role": "user", "content": "more"}]
    second = client.chat.completions.create(**GREEDY | {"messages": turns})
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens - 1
    # What was cached makes no difference to the answer.
    again = client.chat.completions.create(**GREEDY | {"messages": [*TURNS, *turns]})
    assert again.usage.prompt_tokens_details.cached_tokens < 30
    third = client.chat.completions.create(**GREEDY | {"messages": turns})
    assert third.choices[0].message.content == second.choices[0].message.content


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages", "'user' or 'assistant'"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "missing"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "text": ""}]}]}, "messages", "text only"),
        ({"messages": [{"role": "user", "content": "a", "name": "bob"}]}, "messages", "not supported"),
        ({"messages": [{"role": "user", "content": "a " * 600}]}, "messages", "context is 512"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"tool_choice": "auto"}, "tool_choice", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 2, "stream": True}, "top_logprobs", "stream"),
        ({"store": True}, "store", "not supported"),
        ({"echo": True}, "echo", "does not know"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(served: Served, change: dict, param: str, words: str) -> None:
    answer = served.post("chat/completions", **GREEDY | change)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert words in error["message"]
