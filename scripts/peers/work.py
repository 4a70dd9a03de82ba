"""What every peer is asked to do, and what it has to offer."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Protocol

from jax_mono import native
from jax_mono.config import ModelConfig


class Missing(Exception):
    """A package, program or device that a peer needs is not here; the message says which, and how to get it."""


@dataclass(frozen=True)
class Work:
    """One sequence of a model with random weights.

    Attributes:
        config: The model.
        dtype: bfloat16, float32 or float16.
        context: Positions of the KV cache.
        position: Where decoding starts; positions before it are taken as filled.
        devices: JAX devices that share the model.
        blocks: Of the resident program per device, or None.
        seed: Of weights.
    """

    config: ModelConfig
    dtype: str
    context: int
    position: int
    devices: int = 1
    blocks: int | None = None
    seed: int = 0

    def positions(self, tokens: int) -> range:
        """Where some tokens stand."""
        if self.position + tokens > self.context:
            raise ValueError(f"{tokens} tokens from position {self.position} do not fit {self.context}")
        return range(self.position, self.position + tokens)


class Peer(Protocol):
    """Something that decodes."""

    def setup(self, work: Work) -> None:
        """Makes weights, compiles and decodes a few tokens.

        Raises:
            Missing: It cannot run here.
        """

    def tokens_per_s(self, tokens: int) -> float:
        """Decodes so many tokens greedily, from ``work.position`` on, and says how fast."""

    def about(self) -> dict[str, Any]:
        """What a reader of the number has to know: versions, options, how the model differs."""


def dense_twin(config: ModelConfig) -> ModelConfig:
    """The model without lanes: the same matrices and sizes, one residual stream, sums that arrive at once.

    It reads as many weights, and has less to do besides. For programs that do not know lanes.
    """
    return config if config.lanes is None else config.replace(family="llama", lanes=None)


def on_gpu() -> bool:
    """Whether programs other than JAX are to use a GPU: where there is one, and JAX may use it.

    JAX itself is not asked: it would take most of the GPU's memory for itself.
    """
    return os.environ.get("JAX_PLATFORMS") != "cpu" and bool(native.gpu_report("cuda").gpus)
