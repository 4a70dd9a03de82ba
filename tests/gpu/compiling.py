"""Compiling one program, in a process of its own: what it imports stays small."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jax_mono import native


@dataclass(frozen=True, eq=False)
class Program:
    """What :func:`jax_mono.native.compile_program` takes."""

    platform: native.GpuPlatform
    record: np.ndarray
    weights: int
    architecture: str
    shared_memory: int


def compile_program(job: Program) -> bool:
    """Puts a program into the cache; whether the compiler made it."""
    try:
        native.compile_program(
            job.platform,
            job.record,
            job.weights,
            architecture=job.architecture,
            shared_memory=job.shared_memory,
        )
    except native.NativeError:
        return False
    return True
