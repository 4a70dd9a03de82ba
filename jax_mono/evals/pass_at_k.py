"""The unbiased estimator of pass@k."""

from __future__ import annotations

import math


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Estimates the probability that at least one of k samples is right.

    ``1 - C(n - c, k) / C(n, k)``: of all ways to pick k of the n samples, those with a right one. Equation 1 of Chen et
    al., "Evaluating Large Language Models Trained on Code" (https://arxiv.org/abs/2107.03374).

    Args:
        samples: n, samples of a problem.
        correct: c, how many of them are right.
        k: Samples that a user would look at.

    Returns:
        The estimate, exact integers divided once.

    Raises:
        ValueError: Not 0 <= c <= n or not 1 <= k <= n.
    """
    if not 0 <= correct <= samples:
        raise ValueError(f"{correct} correct samples of {samples}")
    if not 1 <= k <= samples:
        raise ValueError(f"k is {k}, must be between 1 and the {samples} samples per problem")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)
