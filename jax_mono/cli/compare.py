"""How far two runs of a model are apart: logits, greedy tokens, keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from jax_mono.tape import as_weights

if TYPE_CHECKING:
    from jax_mono.decode import Cache
    from jax_mono.models.transformer import KVCache
    from jax_mono.plan import Plan
    from jax_mono.stream import Token

_ROWS = 64


@dataclass(frozen=True)
class Divergence:
    """The first position where two runs prefer different tokens.

    Attributes:
        position: Index into the compared sequence.
        expected: The reference's token.
        found: The other run's.
        margin: By how much the reference preferred its token over the second best, in logits. A margin within the
            error of both logits is a tie that either may break.
    """

    position: int
    expected: int
    found: int
    margin: float


@dataclass(frozen=True)
class LayerError:
    """Keys and values of one layer, over some positions.

    Attributes:
        layer: The layer.
        keys: Largest absolute difference.
        values: Largest absolute difference.
        relative: The larger of the two, each relative to the largest absolute reference of its kind.
    """

    layer: int
    keys: float
    values: float
    relative: float


def max_error(expected: np.ndarray, found: np.ndarray) -> float:
    """Largest absolute difference; NaN if anything is."""
    return float(max((np.abs(a - b).max() for a, b in _pairs(expected, found)), key=lambda x: (x != x, x)))


def mean_kl(expected: np.ndarray, found: np.ndarray) -> float:
    """Mean over positions of the Kullback-Leibler divergence of the found from the expected distribution, in nats.

    Args:
        expected: Logits [T, vocab].
        found: The same.
    """
    total = 0.0
    for a, b in _pairs(expected, found):
        p, q = _log_softmax(a), _log_softmax(b)
        total += float(np.sum(np.exp(p) * (p - q)))
    return total / len(expected)


def forced_divergence(expected: np.ndarray, found: np.ndarray) -> Divergence | None:
    """Compares the most likely token after every position of a given text.

    Args:
        expected: Logits [T, vocab].
        found: The same.
    """
    best, other = expected.argmax(axis=1), found.argmax(axis=1)
    if not (best != other).any():
        return None
    position = int((best != other).argmax())
    second, first = np.partition(expected[position], -2)[-2:]
    return Divergence(position, int(best[position]), int(other[position]), float(first - second))


def generated_divergence(
    expected: Sequence[int], found: Sequence[int], alternatives: Sequence[Sequence[Token]]
) -> Divergence | None:
    """Compares generated tokens up to the first difference; behind it the texts are different anyway.

    Args:
        expected: The reference's tokens.
        found: The other run's.
        alternatives: The reference's two most likely tokens at each step.
    """
    for position, (one, other) in enumerate(zip(expected, found, strict=True)):
        if one != other:
            first, second = alternatives[position][:2]
            return Divergence(position, one, other, first.logprob - second.logprob)
    return None


def layer_errors(plan: Plan, cache: Cache, reference: KVCache, first: int, stop: int) -> list[LayerError]:
    """Compares keys and values layer by layer: the first layer that is off is where to look.

    Args:
        plan: The plan that the cache belongs to.
        cache: The kernel's.
        reference: The reference's, of the same tokens.
        first: First position to compare.
        stop: One past the last.
    """
    found = []
    arrays = [
        (np.asarray(as_weights(ours, theirs.dtype)), np.asarray(theirs))
        for ours, theirs in ((cache.k, reference.k), (cache.v, reference.v))
    ]
    for layer in range(plan.config.num_layers):
        errors, relative = [], []
        for ours, theirs in arrays:
            heads = [ours[index, layer, : share.kv_heads.count] for index, share in enumerate(plan.devices)]
            one = np.concatenate(heads)[:, first:stop].astype(np.float32)
            other = theirs[layer, :, first:stop].astype(np.float32)
            errors.append(float(np.abs(one - other).max()))
            relative.append(errors[-1] / max(float(np.abs(other).max()), 1e-30))
        found.append(LayerError(layer, *errors, relative=max(relative, key=lambda x: (x != x, x))))
    return found


def _pairs(expected: np.ndarray, found: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Some rows at a time: whole arrays of logits are large."""
    return [(expected[i : i + _ROWS], found[i : i + _ROWS]) for i in range(0, len(expected), _ROWS)]


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits = logits - logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
