"""Sampling in float64 numpy, one token at a time.

Written from the published algorithms and the order of steps that ``jax_mono.Sampling`` documents; shares no code with
the package.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


def philox4x32(key: tuple[int, int], counter: tuple[int, int, int, int], rounds: int = 10) -> tuple[int, ...]:
    """Philox4x32-10: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011."""
    k0, k1 = key
    x0, x1, x2, x3 = counter
    for _ in range(rounds):
        high0, low0 = divmod(0xD2511F53 * x0, 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * x2, 1 << 32)
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % (1 << 32), (k1 + 0xBB67AE85) % (1 << 32)
    return x0, x1, x2, x3


def gumbel(seed: int, position: int, vocab: int) -> np.ndarray:
    """Standard Gumbel noise of every token at a position.

    Token t takes word t mod 4 of counter (t div 4, position, 0, 0) under the seed's upper and lower half. A word w
    stands for the uniform number u = 1 - (w + 1/2) / 2^32, and the noise is -log(-log(u)).
    """
    key = (seed >> 32, seed % (1 << 32))
    words = [philox4x32(key, (token // 4, position, 0, 0))[token % 4] for token in range(vocab)]
    v = (np.array(words, np.float64) + 0.5) / 2**32
    return -np.log(-np.log1p(-v))


@dataclass(frozen=True)
class Options:
    """The fields of ``jax_mono.Sampling``."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def scores(logits: np.ndarray, seen: Iterable[int], options: Options) -> np.ndarray:
    """Logits after repetition penalty and temperature."""
    adjusted = np.array(logits, np.float64)
    for token in set(seen):
        penalty = options.repetition_penalty
        adjusted[token] = adjusted[token] / penalty if adjusted[token] > 0 else adjusted[token] * penalty
    return adjusted / options.temperature if options.temperature > 0 else adjusted


def kept(values: np.ndarray, options: Options, slack: float = 0.0) -> np.ndarray:
    """Which tokens may be drawn: top-k, then top-p among those, then min-p. Equal scores stay together.

    Args:
        values: Scores.
        options: The filters.
        slack: Moves every limit so that more (or with a negative value fewer) tokens are kept.
    """
    keep = np.ones(len(values), bool)
    if 0 < options.top_k < len(values):
        keep = values >= np.sort(values)[::-1][options.top_k - 1] - slack
    likely = np.where(keep, np.exp(values - values.max()), 0.0)
    likely /= likely.sum()
    if options.top_p < 1.0:
        ranked = np.sort(likely)[::-1]
        before = np.cumsum(ranked) - ranked  # of all more likely tokens
        keep &= likely >= ranked[before < options.top_p + slack].min()
    if options.min_p > 0.0:
        keep &= likely >= options.min_p * likely.max() * (1.0 - slack)
    return keep


def distribution(logits: np.ndarray, seen: Iterable[int], options: Options) -> np.ndarray:
    """The probabilities with which tokens are drawn."""
    values = scores(logits, seen, options)
    weights = np.where(kept(values, options), np.exp(values - values.max()), 0.0)
    return weights / weights.sum()


def noisy_scores(
    logits: np.ndarray, seen: Iterable[int], options: Options, seed: int, position: int
) -> tuple[np.ndarray, np.ndarray]:
    """Scores alone, and scores with noise: the token with the highest of those kept is drawn."""
    values = scores(logits, seen, options)
    if options.temperature == 0:
        return values, values
    return values, values + gumbel(seed, position, len(values))


def draw(logits: np.ndarray, seen: Iterable[int], options: Options, seed: int, position: int) -> int:
    """The token drawn at a position; ties go to the lower token."""
    values, noisy = noisy_scores(logits, seen, options, seed, position)
    allowed = kept(values, options) if options.temperature > 0 else np.ones(len(values), bool)
    return int(np.argmax(np.where(allowed, noisy, -np.inf)))


def is_near_tie(
    token: int, logits: np.ndarray, seen: Iterable[int], options: Options, seed: int, position: int, slack: float
) -> bool:
    """Whether rounding may have led to ``token``: it is kept, and drawn, within ``slack`` of every limit."""
    values, noisy = noisy_scores(logits, seen, options, seed, position)
    if options.temperature == 0:
        return bool(noisy[token] >= noisy.max() - slack)
    surely = kept(values, options, -slack)
    return bool(kept(values, options, slack)[token] and noisy[token] >= noisy[surely].max() - slack)
