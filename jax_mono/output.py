"""What a finished call gave, on the host."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np

from jax_mono.decode import Cache, Finish, Generation
from jax_mono.stream import Token


@dataclass(frozen=True)
class Output:
    """A finished generation.

    Attributes:
        tokens: Generated tokens; a stop token is the last of them.
        logprobs: Per token, under the model's unmodified distribution.
        finish: Why it ended.
        top: Per token the most likely alternatives, best first, if asked for.
        cache: The conversation; pass it on to continue. It is consumed by the next call.
        seconds: Wall time from the call to its last token.
    """

    tokens: list[int]
    logprobs: list[float]
    finish: Finish
    top: list[list[Token]]
    cache: Cache
    seconds: float


@dataclass(frozen=True)
class Scores:
    """Teacher-forced scores.

    Attributes:
        logprobs: float32 [T - 1], of every token but the first, given those before it.
        logits: float32 [T, vocab], or None if not asked for.
        top: Per position the most likely next tokens, best first, if asked for.
    """

    logprobs: np.ndarray
    logits: np.ndarray | None
    top: list[list[Token]]


def output_of(generation: Generation, seconds: float) -> Output:
    """Takes a generation to the host; ``seconds`` is how long it took."""
    count = int(generation.count)
    return Output(
        tokens=np.asarray(generation.tokens)[:count].tolist(),
        logprobs=np.asarray(generation.logprobs)[:count].tolist(),
        finish=Finish(int(generation.finish)),
        top=alternatives(generation.top_ids, generation.top_logprobs, count),
        cache=generation.cache,
        seconds=seconds,
    )


def alternatives(ids: jax.Array, logprobs: jax.Array, count: int) -> list[list[Token]]:
    """The first ``count`` of [T, n] alternatives, a list each; none if nobody asked for any."""
    if ids.shape[1] == 0:
        return []
    rows = zip(np.asarray(ids)[:count].tolist(), np.asarray(logprobs)[:count].tolist(), strict=True)
    return [[Token(*pair) for pair in zip(*row, strict=True)] for row in rows]
