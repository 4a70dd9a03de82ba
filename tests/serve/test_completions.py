"""``/v1/completions`` through the ``openai`` package: the tokens and probabilities are the decoder's own."""

from __future__ import annotations

import math

import numpy as np
import openai
import pytest
from cli.conftest import END
from serve.conftest import CONTEXT, NAME, Served

from jax_mono.decoder import Decoder
from jax_mono.sampling import Sampling

PROMPT = "the quick brown fox"
GREEDY = {"model": NAME, "prompt": PROMPT, "temperature": 0.0, "max_tokens": 24}


def text_of(decoder: Decoder, tokens: list[int]) -> str:
    assert decoder.tokenizer is not None
    return decoder.tokenizer.decode(tokens)


@pytest.fixture(scope="module")
def expected(direct: Decoder) -> list[int]:
    return direct.generate(PROMPT, max_new_tokens=24).tokens


def test_greedy_text_is_the_decoders(client: openai.OpenAI, direct: Decoder, expected: list[int]) -> None:
    answer = client.completions.create(**GREEDY)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, choice.logprobs) == (text_of(direct, expected), "length", None)
    assert answer.model == NAME and answer.object == "text_completion"
    prompt = len(direct.tokenizer.encode(PROMPT))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, 24)
    assert answer.timings["prompt_s"] > 0 and answer.timings["ended_by"] == "length"


def test_a_stream_says_the_same(client: openai.OpenAI, direct: Decoder, expected: list[int]) -> None:
    chunks = list(client.completions.create(**GREEDY, stream=True, stream_options={"include_usage": True}))
    *text, last, usage = chunks
    assert "".join(chunk.choices[0].text for chunk in text) == text_of(direct, expected)
    assert {chunk.id for chunk in chunks} == {usage.id}
    assert last.choices[0].finish_reason == "length" and not usage.choices
    assert (usage.usage.completion_tokens, usage.timings["ended_by"]) == (24, "length")


def test_prompts_as_tokens_and_several_at_once(client: openai.OpenAI, direct: Decoder) -> None:
    one, two = direct.tokenizer.encode(PROMPT), direct.tokenizer.encode("return a + b")
    for prompt in ([one, two], [PROMPT, "return a + b"]):
        answer = client.completions.create(**GREEDY | {"prompt": prompt})
        expected = [text_of(direct, direct.generate(tokens, max_new_tokens=24).tokens) for tokens in (one, two)]
        assert [(choice.index, choice.text) for choice in answer.choices] == list(enumerate(expected))
    assert client.completions.create(**GREEDY | {"prompt": one}).choices[0].text == expected[0]


def test_seeds_and_sampling(client: openai.OpenAI, direct: Decoder) -> None:
    options = GREEDY | {"temperature": 0.9, "top_p": 0.9, "seed": 5, "n": 3}
    extra = {"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.1}
    answer = client.completions.create(**options, extra_body=extra)
    sampling = Sampling(temperature=0.9, top_p=0.9, **extra)
    prompt = direct.tokenizer.encode(PROMPT)
    runs = [direct.generate(prompt, max_new_tokens=24, sampling=sampling, seed=5 + index) for index in range(3)]
    texts = [text_of(direct, run.tokens) for run in runs]
    assert [choice.text for choice in answer.choices] == texts and len(set(texts)) == 3
    streamed = ["", "", ""]
    for chunk in client.completions.create(**options, extra_body=extra, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts
    # The likeliest of the three comes first, and only it is wanted.
    best = client.completions.create(**options | {"n": 1}, best_of=3, extra_body=extra)
    means = [float(np.mean(run.logprobs)) for run in runs]
    assert best.choices[0].text == texts[int(np.argmax(means))]
    assert best.usage.completion_tokens == sum(len(run.tokens) for run in runs)
    assert client.completions.create(**GREEDY | {"seed": -1}).choices[0].text


def test_stop_strings(client: openai.OpenAI, direct: Decoder, expected: list[int]) -> None:
    whole = text_of(direct, expected)
    stop = whole[7:9]
    for options in ({"stop": stop}, {"stop": ["never this", stop]}):
        answer = client.completions.create(**GREEDY, **options, logprobs=0)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (whole[: whole.index(stop)], "stop")
        assert len(answer.choices[0].logprobs.tokens) <= answer.usage.completion_tokens < 24
        streamed = client.completions.create(**GREEDY, **options, stream=True)
        assert "".join(chunk.choices[0].text for chunk in streamed) == whole[: whole.index(stop)]


def test_stop_tokens(client: openai.OpenAI, direct: Decoder, expected: list[int]) -> None:
    first = expected.index(expected[5])
    answer = client.completions.create(**GREEDY, extra_body={"stop_token_ids": [expected[5]]})
    assert answer.choices[0].text == text_of(direct, expected[:first])
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("stop", first + 1)
    assert client.completions.create(**GREEDY, extra_body={"ignore_eos": True}).choices[0].text


def test_logprobs(client: openai.OpenAI, direct: Decoder) -> None:
    (choice,) = client.completions.create(**GREEDY, logprobs=3).choices
    output = direct.generate(PROMPT, max_new_tokens=24, top_logprobs=3)
    record = choice.logprobs
    assert record.token_logprobs == pytest.approx(output.logprobs, abs=1e-4)
    for tops, chosen, row in zip(record.top_logprobs, record.token_logprobs, output.top, strict=True):
        assert max(tops.values()) == chosen
        assert sorted(tops.values()) == pytest.approx(sorted(token.logprob for token in row), abs=1e-4)
    assert record.text_offset[0] == 0 and record.text_offset == sorted(record.text_offset)
    streamed = [chunk.choices[0].logprobs for chunk in client.completions.create(**GREEDY, logprobs=0, stream=True)]
    assert [value for part in streamed if part for value in part.token_logprobs] == record.token_logprobs


def test_tokens_and_whether_caches_serve(client: openai.OpenAI, expected: list[int]) -> None:
    extra = {"return_token_ids": True, "ignore_eos": True}
    assert client.completions.create(**GREEDY, extra_body=extra).choices[0].token_ids == expected
    chunks = list(client.completions.create(**GREEDY, extra_body=extra, stream=True))
    assert [token for chunk in chunks for token in getattr(chunk.choices[0], "token_ids", [])] == expected
    turns = [{"role": "user", "content": PROMPT}]
    chat = client.chat.completions.create(model=NAME, messages=turns, max_tokens=4, extra_body=extra)
    assert len(chat.choices[0].token_ids) == 4
    long = GREEDY | {"prompt": PROMPT * 8}
    for cache in (True, False):
        answers = [client.completions.create(**long, extra_body={"cache_prompt": cache}) for _ in range(2)]
        assert bool(answers[1].usage.prompt_tokens_details.cached_tokens) == cache
        assert answers[0].choices[0].text == answers[1].choices[0].text


def test_echo_scores_the_prompt(client: openai.OpenAI, direct: Decoder) -> None:
    tokens = direct.tokenizer.encode(PROMPT)
    scores = direct.score(tokens, top_logprobs=2)
    (choice,) = client.completions.create(**GREEDY | {"max_tokens": 0}, echo=True, logprobs=2).choices
    record = choice.logprobs
    assert (choice.text, choice.finish_reason) == (PROMPT, "length")
    assert record.token_logprobs[0] is None and record.top_logprobs[0] is None
    assert record.token_logprobs[1:] == scores.logprobs.tolist()
    assert [PROMPT[start:] for start in record.text_offset[:2]] == [PROMPT, PROMPT[record.text_offset[1] :]]
    for tops, row in zip(record.top_logprobs[1:], scores.top, strict=False):
        assert set(tops.values()) >= {token.logprob for token in row}


@pytest.mark.parametrize("count", [1, 5])
def test_what_evaluation_harnesses_ask_for(client: openai.OpenAI, direct: Decoder, count: int) -> None:
    context, continuation = direct.tokenizer.encode(PROMPT), direct.tokenizer.encode(" jumps over")
    both = [*context, *continuation]
    request = GREEDY | {"prompt": [both, both[:-1]], "max_tokens": count, "echo": True, "logprobs": 1, "seed": 1234}
    answer = client.completions.create(**request)
    for choice, tokens in zip(answer.choices, (both, both[:-1]), strict=True):
        scores = direct.score(tokens, top_logprobs=1)
        logprobs, tops = choice.logprobs.token_logprobs, choice.logprobs.top_logprobs
        assert logprobs[len(context) : -count] == scores.logprobs[len(context) - 1 :].tolist()
        greedy = [row[0].id == token for row, token in zip(scores.top, tokens[1:], strict=False)]
        assert [
            chosen == max(row.values()) for chosen, row in zip(logprobs[1:-count], tops[1:-count], strict=True)
        ] == greedy
        output = direct.generate(tokens, max_new_tokens=count)
        assert logprobs[-count:] == pytest.approx(output.logprobs, abs=1e-4)
        assert choice.text == direct.tokenizer.decode(tokens) + text_of(direct, output.tokens)
        assert len(choice.logprobs.tokens) == len(choice.logprobs.text_offset) == len(tokens) + count
    assert answer.usage.completion_tokens == 2 * count


def test_echo_without_logprobs(client: openai.OpenAI, direct: Decoder, expected: list[int]) -> None:
    whole = PROMPT + text_of(direct, expected)
    assert client.completions.create(**GREEDY, echo=True).choices[0].text == whole
    streamed = client.completions.create(**GREEDY, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == whole
    assert client.completions.create(**GREEDY | {"max_tokens": 0}, echo=True).choices[0].text == PROMPT
    one = client.completions.create(**GREEDY | {"prompt": [70], "max_tokens": 1}, echo=True, logprobs=1).choices[0]
    assert one.logprobs.token_logprobs[0] is None and math.isfinite(one.logprobs.token_logprobs[1])


def test_the_context_can_be_filled(client: openai.OpenAI) -> None:
    prompt = [70] * (CONTEXT - 3)
    answer = client.completions.create(model=NAME, prompt=prompt, temperature=0, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 3  # 16 is only the default


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": [1, "a"]}, "prompt", "must be a string"),
        ({"prompt": [[1], []]}, "prompt", "must be a string"),
        ({"prompt": [320]}, "prompt", "token 320 is outside"),
        ({"prompt": [-1]}, "prompt", "token -1 is outside"),
        ({"prompt": ["a"] * 200}, "prompt", "200 prompts"),
        ({"prompt": [70] * (CONTEXT - 3)}, "prompt", "context is 512"),
        ({"prompt": [70] * (CONTEXT + 3)}, "prompt", "context is 512"),
        ({"max_tokens": 0}, "max_tokens", "without echo"),
        ({"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 3, "best_of": 2}, "best_of", "at least n"),
        ({"best_of": 2, "stream": True}, "best_of", "cannot stream"),
        ({"logprobs": 6}, "logprobs", "less than or equal to 5"),
        ({"logprobs": 1, "stream": True}, "logprobs", "stream"),
        ({"logprobs": 0, "echo": True, "stream": True}, "stream", "cannot stream"),
        ({"stop": [""]}, "stop", "up to 16 strings"),
        ({"stop": 7}, "stop", "up to 16 strings"),
        ({"stop_token_ids": [400]}, "stop_token_ids", "token 400"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
        ({"suffix": "end"}, "suffix", "not supported"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
        ({"grammar": "x"}, "grammar", "does not know"),
        ({"deadline": 0}, "deadline", "greater than 0"),
        ({"seed": 2**63}, "seed", "less than"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(served: Served, change: dict, param: str, words: str) -> None:
    answer = served.post("completions", **GREEDY | change)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert words in error["message"]


def test_errors_as_the_client_sees_them(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'"):
        client.completions.create(model="gpt", prompt="a")
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model=NAME, prompt=[1] * 600)
    assert error.value.code == "context_length_exceeded"
    assert END == 1
