"""Sampling options."""

from __future__ import annotations

from dataclasses import dataclass, fields

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn. A pytree of scalars: changing a value never recompiles.

    The order is that of Hugging Face transformers: repetition penalty, temperature, top-k, top-p, min-p. Draws are
    exact and depend only on the key, the position and the logits, never on how the model is cut.

    Attributes:
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Keeps this many most likely tokens (and those as likely as the last); 0 keeps all.
        top_p: Keeps the fewest most likely tokens whose probabilities reach this sum.
        min_p: Keeps tokens at least this fraction as likely as the most likely one.
        repetition_penalty: Divides positive and multiplies negative logits of tokens that occurred (CTRL, 2019).
    """

    temperature: float | jax.Array = 0.0
    top_k: int | jax.Array = 0
    top_p: float | jax.Array = 1.0
    min_p: float | jax.Array = 0.0
    repetition_penalty: float | jax.Array = 1.0

    def check(self) -> None:
        """Refuses values that make no sense; traced values are checked when the call runs.

        Raises:
            ValueError: Names the option, its value and its range.
        """
        ranges = {
            "temperature": (lambda v: 0.0 <= v < float("inf"), ">= 0"),
            "top_k": (lambda v: v >= 0 and v == int(v), "a whole number >= 0"),
            "top_p": (lambda v: 0.0 < v <= 1.0, "above 0 and at most 1"),
            "min_p": (lambda v: 0.0 <= v <= 1.0, "between 0 and 1"),
            "repetition_penalty": (lambda v: 0.0 < v < float("inf"), "above 0"),
        }
        for field in fields(self):
            value = getattr(self, field.name)
            holds, words = ranges[field.name]
            if not isinstance(value, jax.core.Tracer) and not holds(value):
                raise ValueError(f"{field.name} is {value}, must be {words}")


GREEDY = Sampling()
"""Always the most likely token."""
