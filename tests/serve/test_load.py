"""Many clients at once, of all kinds: everything is answered or ends, nothing is mixed up, and memory stays flat."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import random
import resource
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest
from cli.conftest import END
from serve.conftest import Served, load, serving

from jax_mono.decoder import Decoder

CLIENTS, REQUESTS = 50, 500
TAG = 12
"""Tokens of a prompt that tell it from the others'."""


def tagged(rng: random.Random) -> list[int]:
    # Some prompts share a beginning, so that caches are continued, cut and copied.
    shared = rng.choice([[], list(range(70, 110)), list(range(80, 100))])
    return [*shared, *(rng.randrange(5, 320) for _ in range(TAG))]


class Expected:
    """What the model says to a prompt, by the decoder itself."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

    def check(self, prompt: list[int], logprobs: dict, text: str) -> None:
        """Teacher forcing: every token must be the best one after this very prompt, and its probability too."""
        tokenizer = self._decoder.tokenizer
        assert tokenizer is not None
        output = self._decoder.generate(prompt, max_new_tokens=8, stop=[END], padded=True)
        tokens = output.tokens[:-1] if output.tokens[-1] == END else output.tokens
        assert text == tokenizer.decode(tokens)
        assert logprobs["token_logprobs"] == pytest.approx(output.logprobs[: len(tokens)], abs=1e-3)


async def one(client: httpx.AsyncClient, rng: random.Random, kept: list[tuple[list[int], dict, str]]) -> str:
    """One request of a random kind; returns what became of it."""
    prompt = tagged(rng)
    body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "logprobs": 0, "user": str(rng.randrange(9))}
    kind = rng.choice(["whole", "whole", "stream", "cancel", "leave", "deadline", "malformed", "score", "sample"])
    if kind == "malformed":
        bad = rng.choice([b"{", b"[]", b'{"prompt": 5}', b'{"prompt":"a","n":-1}', b"\xff\xfe", b'{"prompt":[999]}'])
        response = await client.post("/v1/completions", content=bad, headers={"content-type": "application/json"})
        assert response.status_code == 400 and response.json()["error"]["message"]
        return kind
    if kind == "leave":  # within the line, or early in the answer
        with contextlib.suppress(httpx.TimeoutException):
            await client.post("/v1/completions", json=body | {"max_tokens": 300, "ignore_eos": True}, timeout=0.05)
        return kind
    if kind == "deadline":
        response = await client.post("/v1/completions", json=body | {"deadline": rng.choice([1e-4, 0.05, 0.5])})
        assert response.status_code in (200, 408, 429)
        return f"{kind} {response.status_code}"
    if kind in ("stream", "cancel"):
        return await read_stream(client, rng, kind, body, prompt, kept)
    changes = {"whole": {}, "score": {"echo": True, "max_tokens": 0, "logprobs": 1}, "sample": {"temperature": 1.0}}
    response = await client.post("/v1/completions", json=body | changes[kind])
    if response.status_code == 429:
        assert int(response.headers["retry-after"]) >= 1
        return "429"
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    if kind == "whole":
        kept.append((prompt, choice["logprobs"], choice["text"]))
    elif kind == "score":
        assert len(choice["logprobs"]["token_logprobs"]) == len(prompt)
    return kind


async def read_stream(
    client: httpx.AsyncClient, rng: random.Random, kind: str, body: dict, prompt: list[int], kept: list
) -> str:
    request = body | {"stream": True} | ({"max_tokens": 200, "ignore_eos": True} if kind == "cancel" else {})
    text, logprobs = "", []
    async with client.stream("POST", "/v1/completions", json=request) as response:
        if response.status_code == 429:
            return "429"
        assert response.status_code == 200
        limit = rng.randrange(6) if kind == "cancel" else 10**9
        count = 0
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            choice = json.loads(line[6:])["choices"][0]
            text += choice["text"]
            logprobs += (choice["logprobs"] or {}).get("token_logprobs", [])
            count += 1
            if count > limit:
                return kind
    if kind == "stream":
        kept.append((prompt, {"token_logprobs": logprobs}, text))
    return kind


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


async def storm(served: Served, requests: int, seed: int, kept: list) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    left = iter(range(requests))

    async def client_life(number: int) -> None:
        rng = random.Random(1000 * seed + number)
        async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
            for _ in left:
                outcome = await one(client, rng, kept)
                outcomes[outcome] += 1
                if "429" in outcome:
                    await asyncio.sleep(0.3)

    await asyncio.gather(*(client_life(number) for number in range(CLIENTS)))
    return outcomes


def wait_until_idle(served: Served) -> None:
    end = time.monotonic() + 20
    while served.engine.busy or len(served.engine.queue):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_storm(checkpoint: Path, direct: Decoder) -> None:
    kept: list[tuple[list[int], dict, str]] = []
    with serving(load(checkpoint), queue=40) as served:
        asyncio.run(storm(served, 100, 0, []))  # compiles, and fills what fills up once
        wait_until_idle(served)
        gc.collect()
        before = resident_bytes()
        outcomes = asyncio.run(storm(served, REQUESTS, 1, kept))
        wait_until_idle(served)
        gc.collect()
        grown = resident_bytes() - before
        print(f"{dict(outcomes)}; {grown / 2**20:+.1f} MiB")
        assert sum(outcomes.values()) == REQUESTS
        assert {"whole", "stream", "cancel", "leave", "malformed", "score"} <= set(outcomes)
        assert served.engine.alive
        # The decoder is as good as new.
        assert served.post("completions", prompt="the quick", max_tokens=3).status_code == 200
    assert grown < 40 << 20, f"{grown >> 20} MiB more after {outcomes}"
    assert len(kept) > 30
    expected = Expected(direct)
    for prompt, logprobs, text in kept:
        expected.check(prompt, logprobs, text)
