"""Decoders of these tests by what they are made of, so that their programs can be compiled together and shared."""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu import rehearsal
from gpu.compiling import Program, compile_program
from kernel.common import Form, flax_logits, make_decoder, params_of, some_tokens
from tiny import tiny

from jax_mono import gpus, native
from jax_mono.config import Lanes, ModelConfig
from jax_mono.decoder import Decoder
from jax_mono.models.source import Params
from jax_mono.packing import home
from jax_mono.plan import Plan, make_plan
from jax_mono.record import plan_record
from jax_mono.tape import STORAGE

TEXT = tuple(some_tokens(rehearsal.amount(72, 24)))
"""Longer than the windows, and than a run of positions of one KV split."""


@dataclass(frozen=True)
class Spec:
    """A decoder: the model, its weights' dtype, and how it is shared out."""

    config: ModelConfig
    devices: int = 1
    blocks: int = 4
    dtype: str = "bfloat16"
    kv_splits: int | None = None
    form: Form = "threads"
    context: int | None = None

    def __str__(self) -> str:
        splits = f"-splits{self.kv_splits}" if self.kv_splits else ""
        return f"{self.config.family}-{self.devices}x{self.blocks}-{self.dtype}{splits}-{self.form}"

    @property
    def plan(self) -> Plan:
        """Who owns what, on JAX's default device."""
        return make_plan(
            self.config,
            devices=self.devices,
            blocks=self.blocks,
            kv_splits=self.kv_splits,
            target=rehearsal.target(),
        )


def decoder_of(spec: Spec) -> Decoder:
    """The decoder, made once; the test is skipped where it cannot run."""
    if rehearsal.KIND == "cpu" and spec.dtype == "float16":
        pytest.skip("float16 weights run on GPUs only")
    if spec.form == "mesh" and len(jax.devices()) < spec.devices:
        pytest.skip(f"needs {spec.devices} GPUs, JAX has {len(jax.devices())}")
    blocks = spec.blocks * (1 if spec.form == "mesh" else spec.devices)
    if blocks > (most := most_blocks()):
        pytest.skip(f"needs {blocks} multiprocessors, there are {most}")
    return make(spec)


@functools.cache
def make(spec: Spec) -> Decoder:
    """The decoder, whether or not it can run."""
    return make_decoder(
        spec.config,
        devices=spec.devices,
        blocks=spec.blocks,
        dtype=jnp.dtype(spec.dtype),
        form=spec.form,
        kv_splits=spec.kv_splits,
        context=spec.context,
        target=rehearsal.target(),
    )


def most_blocks() -> int:
    """Blocks that run on one device at once."""
    return rehearsal.MOST_BLOCKS if rehearsal.KIND else gpus.gpu_of(home()).multiprocessors


def compile_together(specs: Iterable[Spec]) -> tuple[int, int]:
    """Fills the cache of programs, on all cores; a program that does not compile is left to its test.

    In processes, because some compilers do one thing at a time. Returns how many programs there are, and how many were
    refused.
    """
    gpu, platform = gpus.gpu_of(home()), native.gpu_platform()
    assert platform is not None
    plans = {(spec.plan, spec.dtype) for spec in specs if spec.dtype in gpus.DTYPES}
    jobs = [
        Program(platform, plan_record(plan), list(STORAGE).index(dtype), gpu.architecture, gpu.shared_memory)
        for plan, dtype in plans
    ]
    if not jobs:
        return 0, 0
    workers = min(len(jobs), len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        done = list(pool.map(compile_program, jobs))
    return len(done), done.count(False)


# The truth ----------------------------------------------------------------------------------------------------------


@functools.cache
def exact_params(config: ModelConfig, dtype: str) -> Params:
    """The parameters of a decoder, rounded as its weights are, in float32."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params_of(config, jnp.dtype(dtype)))


def truth_device() -> jax.Device:
    """Where the truth is computed: on the CPU if JAX has it, because there float32 is float32."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # left out by JAX_PLATFORMS
        return home()


@functools.cache
def exact_logits(config: ModelConfig, dtype: str, text: tuple[int, ...] = TEXT) -> np.ndarray:
    """Logits [T, V] of the Flax model in float32 on the same weights."""
    text = tuple(token % config.vocab_size for token in text)
    device = truth_device()
    with jax.default_device(device):
        return flax_logits(config, jax.device_put(exact_params(config, dtype), device), text)


# Models -------------------------------------------------------------------------------------------------------------

SMOL = {
    "num_heads": 9,
    "num_kv_heads": 3,
    "head_dim": 8,
    "hidden_size": 72,
    "intermediate_size": 100,
    "vocab_size": 130,
}
"""Uneven everywhere."""

WIDE = {"hidden_size": 1056, "intermediate_size": 1320, "num_layers": 3, "vocab_size": 1500}
"""As many tiles of hidden rows as an H100 has multiprocessors."""


def laneformer(*, overrides: dict[str, object] | None = None, **switches: object) -> ModelConfig:
    """A tiny Laneformer of 8 lanes."""
    return tiny("laneformer", lanes=Lanes(**{"count": 8, "delay": 2, **switches}), **(overrides or {}))
