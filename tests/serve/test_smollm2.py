"""Real weights behind the server: SmolLM2-135M-Instruct writes a function through the ``openai`` package."""

from __future__ import annotations

from pathlib import Path

import pytest
from serve.conftest import NAME, serving

import jax_mono

pytestmark = [pytest.mark.smollm2, pytest.mark.slow]


def test_it_writes_code(smollm2_gguf: Path) -> None:
    turns = [{"role": "user", "content": "Write a Python function that checks whether a string is a palindrome."}]
    options = {"model": NAME, "messages": turns, "temperature": 0, "max_tokens": 40}
    with serving(jax_mono.load(smollm2_gguf, context=256)) as served:
        chunks = served.client.chat.completions.create(**options, stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        again = served.client.chat.completions.create(**options)
    assert "def is_palindrome(" in text and "return" in text
    assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens - 1
