"""Lets a decoder write samples, one line of JSON each, in the format that EvalPlus reads.

A line has ``task_id`` and ``solution`` (a whole program), which EvalPlus needs, and ``sample``, ``tokens``, ``finish``
and ``seconds``. The file grows line by line; what it has is not written again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from jax_mono.evals.problems import Problem
from jax_mono.stream import Token
from jax_mono.tokenizer import Tokenizer

STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n@", "\nimport ", "\nfrom ", "\nassert", "\n```")
"""Where a function has ended. The first five are those of Chen et al. 2021 (arXiv:2107.03374, section 2.1); the rest
are other statements that begin a line, and the end of a block of Markdown."""

_QUESTION = "Complete this Python function. Answer with the whole function in one block of code.\n\n```python\n{}\n```"
_ANSWER = "```python\n{}"

Style = Literal["completion", "chat"]


class SamplesError(ValueError):
    """Samples that do not belong to what is asked for; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How samples are written; kept beside them, so that a file never mixes two ways.

    Attributes:
        model: What the user calls it.
        dtype: Of the weights.
        backend: ``kernel`` or ``flax``.
        style: ``completion`` gives the model the prompt; ``chat`` asks for the function and begins the answer with the
            prompt.
        samples: Per problem.
        temperature: 0 is greedy.
        top_p: Of the likeliest tokens.
        seed: Of the random numbers.
        max_new_tokens: Per sample.
    """

    model: str
    dtype: str
    backend: str = "kernel"
    style: Style = "completion"
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    max_new_tokens: int = 512


class Stream(AbstractContextManager[Any], Iterable[Token], Protocol):
    """What a decoder returns: tokens as they come, and a way to stop."""

    def cancel(self) -> None:
        """Stops within one token."""


Start = Callable[[Sequence[int], int, int], Stream]
"""Starts a generation, given prompt, budget and seed."""


def encode(problem: Problem, tokenizer: Tokenizer, style: Style) -> list[int]:
    """The tokens that a model is given for a problem."""
    if style == "completion":
        return tokenizer.encode(problem.stem)
    question = tokenizer.chat([{"role": "user", "content": _QUESTION.format(problem.stem)}])
    return question + tokenizer.encode(_ANSWER.format(problem.stem), add_special_tokens=False)


def truncate(text: str) -> tuple[str, bool]:
    """Cuts a completion where the function has ended.

    Returns:
        The text up to there, and whether there was an end.
    """
    ends = [found for stop in STOPS if (found := text.find(stop)) >= 0]
    return (text[: min(ends)], True) if ends else (text, False)


def seed_of(settings: Settings, problem: Problem, sample: int) -> int:
    """A seed of 63 bits for one sample, independent of the order in which samples are written."""
    name = f"{settings.seed}/{problem.task_id}/{sample}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


def write(
    problems: Sequence[Problem],
    tokenizer: Tokenizer,
    start: Start,
    settings: Settings,
    directory: Path,
    context: int,
    on_sample: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Writes the samples that are missing.

    Args:
        problems: The problems.
        tokenizer: The model's.
        start: Starts a generation.
        settings: How to write; the same as of the samples that are there.
        directory: Where ``samples.jsonl`` and ``settings.json`` are or will be.
        context: Tokens that prompt and sample may have together.
        on_sample: Called with each line, also with those that were there.

    Returns:
        All lines of these problems, in the order of problems and samples.

    Raises:
        SamplesError: The directory has samples of another model or with other settings.
        ValueError: A prompt is too long for the context.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _keep_settings(directory / "settings.json", settings)
    file = directory / "samples.jsonl"
    done = {(row["task_id"], row["sample"]): row for row in read_lines(file)}
    rows = []
    with file.open("a", encoding="utf-8") as lines:
        for problem in problems:
            for sample in range(settings.samples):
                row = done.get((problem.task_id, sample))
                if row is None:
                    row = _one(problem, sample, tokenizer, start, settings, context)
                    lines.write(json.dumps(row) + "\n")
                    lines.flush()
                rows.append(row)
                on_sample(row)
    return rows


def _one(
    problem: Problem, sample: int, tokenizer: Tokenizer, start: Start, settings: Settings, context: int
) -> dict[str, Any]:
    prompt = encode(problem, tokenizer, settings.style)
    budget = min(settings.max_new_tokens, context - len(prompt))
    if budget < 1:
        raise ValueError(f"{problem.task_id}: the prompt has {len(prompt)} tokens, the context {context}")
    started, tokens, text, ended = time.perf_counter(), [], "", False
    pieces = tokenizer.stream()
    with start(prompt, budget, seed_of(settings, problem, sample)) as stream:
        for token in stream:
            tokens.append(token.id)
            text, ended = truncate(text + pieces.feed(token.id))
            if ended:
                stream.cancel()
                break
    if not ended:
        text, ended = truncate(text + pieces.flush())
    finish = "function" if ended else "length" if len(tokens) >= budget else "stop"
    return {
        "task_id": problem.task_id,
        "sample": sample,
        "solution": problem.stem + text,
        "tokens": tokens,
        "finish": finish,
        "seconds": round(time.perf_counter() - started, 3),
    }


def _keep_settings(file: Path, settings: Settings) -> None:
    now = {name: value for name, value in vars(settings).items() if name != "samples"}  # more may be added
    if not file.exists():
        file.write_text(json.dumps(now, indent=2) + "\n")
        return
    before = json.loads(file.read_text())
    others = [f"{name} {before.get(name)!r}, not {value!r}" for name, value in now.items() if before.get(name) != value]
    if others:
        raise SamplesError(f"{file.parent} has samples with {'; '.join(others)}. Choose another --out")


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Reads lines of JSON; none if there is no file. A last line that was cut off when a run was ended is dropped.

    Raises:
        SamplesError: Another line is damaged.
    """
    if not file.exists():
        return []
    text = file.read_text(encoding="utf-8")
    whole, _, cut = text.rpartition("\n")
    if cut:  # makes room for the next line
        with file.open("r+b") as lines:
            lines.truncate(len(whole.encode()) + (1 if whole else 0))
    try:
        return [json.loads(line) for line in whole.splitlines() if line]
    except ValueError as error:
        raise SamplesError(f"{file}: not readable as lines of JSON ({error}); remove it to begin anew") from error
