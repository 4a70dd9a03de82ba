"""Whether these tests run on a GPU or are rehearsed without one, and how much of everything that allows."""

from __future__ import annotations

import os
from typing import Literal

import jax

from jax_mono.cut import target_of
from jax_mono.packing import home
from jax_mono.plan import GPU, Target

KIND: Literal["", "cpu", "fibers"] = ""
"""``cpu``: the CPU's programs; ``fibers``: the GPUs' stage code on a CPU. Empty on a GPU."""

if os.environ.get("JAX_MONO_TEST_GPU") == "fibers":
    KIND = "fibers"
elif os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
    KIND = "cpu"

MOST_BLOCKS = 8 if KIND == "fibers" else 16
"""Of the plans that are rehearsed."""


KernelError: tuple[type[Exception], ...] = (jax.errors.JaxRuntimeError,)
"""What a call that fails raises."""
if KIND == "fibers":
    KernelError += (ValueError,)  # JAX's callbacks, which take the place of the call, now and then


def amount(usual: int, on_fibers: int) -> int:
    """How many tokens or repetitions: fibers are slow, and show that a test is right, not that it never fails."""
    return on_fibers if KIND == "fibers" else usual


def target() -> Target:
    """The kind of plan that the decoders of these tests need."""
    return GPU if KIND == "fibers" else target_of(home())
