"""The shapes and the settings of mini-coder and its twins: the only place where their numbers are chosen."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from jax_mono.config import Lanes, ModelConfig

Communication = Literal["delay-2", "delay-0", "none"]
COMMUNICATIONS: tuple[Communication, ...] = ("delay-2", "delay-0", "none")
_LANES = {
    "delay-2": Lanes(count=8, delay=2),
    "delay-0": Lanes(count=8, delay=0),
    "none": Lanes(count=8, delay=2, attention_comm=False, mlp_comm=False),
}

LARGEST = 48_000_000
"""Bytes that the shipped weights may have."""


def mini_coder(communication: Communication = "delay-2") -> ModelConfig:
    """A Laneformer of 23,684,800 parameters, in its proportions a small copy of the 2B: 15 layers, 10 with a window.

    Hidden size, neurons and heads per lane are multiples of what tiles on GPUs need.
    """
    return ModelConfig(
        family="laneformer",
        vocab_size=16384,
        hidden_size=320,
        intermediate_size=768,
        num_layers=15,
        num_heads=16,
        num_kv_heads=8,
        head_dim=32,
        max_position_embeddings=1024,
        rope_interleaved=True,
        sliding_windows=(256,) * 10 + (0,) * 5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_ids=(0,),
        lanes=_LANES[communication],
    )


def toy(communication: Communication = "delay-2") -> ModelConfig:
    """The same for tests: every part is there, and small."""
    return mini_coder(communication).replace(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_layers=3,
        num_heads=16,
        num_kv_heads=8,
        head_dim=8,
        max_position_embeddings=64,
        sliding_windows=(16, 16, 0),
    )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One training run.

    Attributes:
        steps: Optimiser steps.
        batch: Sequences per step, over all devices.
        micro: Sequences per device at a time; gradients of a step are added up.
        length: Tokens of a sequence.
        peak: Largest learning rate.
        warmup: Steps in which it rises.
        floor: Last learning rate as a share of the largest; it falls along a cosine.
        decay: Weight decay of matrices.
        clip: Largest norm of a gradient.
        seed: Of parameters and of the order of the data.
        compute: Dtype of matrix products; master weights, residual streams, norms and losses are float32.
        attention: ``cudnn`` on GPUs with bfloat16, ``xla`` anywhere.
        remat: Whether modules are computed again for their gradients instead of being kept.
    """

    steps: int
    batch: int = 64
    micro: int = 16
    length: int = 1024
    peak: float = 2e-3
    warmup: int = 100
    floor: float = 0.05
    decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    compute: Literal["bfloat16", "float32"] = "bfloat16"
    attention: Literal["cudnn", "xla"] = "xla"
    remat: bool = False

    @property
    def tokens(self) -> int:
        """Tokens that the run sees."""
        return self.steps * self.batch * self.length

    def replace(self, **changes: object) -> Settings:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


def flops_per_token(config: ModelConfig, length: int) -> float:
    """Floating-point operations of training, per token: three times the forward pass, a product counting two.

    Attention counts what causality and windows leave visible.
    """
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    per_layer = config.hidden_size * (2 * q + 2 * kv + 3 * config.intermediate_size)
    weights = config.num_layers * per_layer + config.vocab_size * config.hidden_size
    visible = 0.0
    for window in config.sliding_windows:
        reach = min(window or length, length)
        visible += reach - reach * (reach - 1) / (2 * length)  # mean over the positions of a sequence
    return 3.0 * (2.0 * weights + 4.0 * q * visible)
