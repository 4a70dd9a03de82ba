"""Reads what the resident program wrote with the reference model in Flax, and notes every token it disagrees with."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jax_mono.config import ModelConfig
from jax_mono.models.source import Params
from jax_mono.models.transformer import Transformer

_SMALLEST = 64


@dataclass(frozen=True)
class Disagreement:
    """A generated token that is not the reference's most likely one.

    Attributes:
        position: Index into the generated tokens.
        found: The token that was generated.
        expected: The reference's most likely token, given all tokens before.
        margin: By how much the reference prefers its own, in logits. If that is within the rounding errors of the two
            implementations, it is a tie that either may break.
    """

    position: int
    found: int
    expected: int
    margin: float


@functools.partial(jax.jit, static_argnames="config")
def _best(config: ModelConfig, params: Params, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The most likely next token at each position, and by how much it leads the token that follows, in logits."""
    logits, _ = Transformer.from_params(config, params)(tokens)
    best = jnp.argmax(logits, axis=1)
    following = jnp.roll(tokens, -1)
    rows = jnp.arange(len(tokens))
    return best, logits[rows, best] - logits[rows, following]


def disagreements(
    config: ModelConfig, params: Params, prompt: Sequence[int], generated: Sequence[int]
) -> list[Disagreement]:
    """Compares greedy tokens with the reference's, each given all tokens before it.

    The text is padded to a power of two, so few lengths are ever compiled; later tokens cannot be seen by earlier ones.

    Args:
        config: The model.
        params: Its parameters, in the dtype that the program had.
        prompt: What the program was given.
        generated: What it wrote, greedily.

    Returns:
        All disagreements, not only the first: every token is judged after the tokens that were generated.
    """
    if not generated:
        return []
    text = [*prompt, *generated]
    length = min(max(_SMALLEST, 1 << (len(text) - 1).bit_length()), config.max_position_embeddings)
    padded = np.zeros(max(length, len(text)), np.int32)
    padded[: len(text)] = text
    best, margin = (np.asarray(array) for array in _best(config, params, padded))
    found = []
    for position, token in enumerate(generated):
        index = len(prompt) + position - 1
        if best[index] != token:
            found.append(Disagreement(position, token, int(best[index]), float(margin[index])))
    return found
