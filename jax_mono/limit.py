"""How fast the memory lets a model decode: every token reads every tape once.

On a GPU the resident program itself can pass its tapes through the same blocks and the same ring without computing
(:attr:`jax_mono.call.Mode.STREAM`); on a CPU as many threads as decode read the same arrays.
"""

from __future__ import annotations

import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike

from jax_mono import native
from jax_mono.call import CallRequest, Mode, resident_call
from jax_mono.config import ConfigError
from jax_mono.models.rope import rope_table
from jax_mono.plan import Plan
from jax_mono.tape import Tapes

Array = jax.Array

STREAMS = (1, 2, 4, 8)
"""Numbers of streams per CPU thread that are tried: which is fastest depends on the processor."""

_SHORT, _LONG = 16, 208
"""Passes of two calls; the difference of their times has no launch in it."""


def bytes_per_token(plan: Plan, tapes: Tapes) -> int:
    """Bytes of weights, padding included, that all devices together read for one token."""
    words = sum(
        plan.block_words(device, block) for device in range(plan.num_devices) for block in range(plan.num_blocks)
    )
    return words * tapes.dtype.itemsize


def weights_per_token(plan: Plan) -> int:
    """Weights, padding included, that all devices together read for one token, however many bytes each takes."""
    total = 0
    for share in plan.devices:
        for name, stage in share.stages.items():
            parts = stage.tiles * (stage.lanes if stage.row_parallel else 1)
            times = 1 if name == "head" else plan.config.num_layers
            total += times * parts * plan.tile.rows * plan.tile.padded_cols(stage.cols)
    return total


def kv_bytes_per_token(plan: Plan, tapes: Tapes, context: int) -> int:
    """Bytes of keys and values that attention reads for one token behind ``context`` others."""
    config = plan.config
    positions = sum(min(window, context) if window else context for window in config.sliding_windows)
    return 2 * positions * config.num_kv_heads * config.head_dim * tapes.dtype.itemsize


def read_bandwidth(plan: Plan, tapes: Tapes, repeats: int = 5) -> dict[int, float]:
    """Reads the layer tapes on a CPU with as many threads as decode; with a mesh, the first device's.

    Args:
        plan: The plan.
        tapes: Its tapes.
        repeats: Passes; the median counts, for decoding is no lucky moment either.

    Returns:
        Bytes per second by number of streams per thread.
    """
    threads = plan.num_devices * plan.num_blocks
    layers = tapes.layers.addressable_shards[0].data
    return {
        streams: statistics.median(native.read_bandwidth(layers, threads, streams) for _ in range(repeats))
        for streams in STREAMS
    }


@functools.partial(jax.jit, static_argnames=("plan", "mesh"))
def _pass_tapes(plan: Plan, tapes: Tapes, passes: ArrayLike, *, mesh: Mesh | None) -> Array:
    request = CallRequest.unsampled(jnp.zeros((1,), jnp.int32), count=1, budget=passes)
    rope = jnp.asarray(rope_table(plan.config, _LONG))
    return resident_call(plan, tapes, rope, None, request, mode=Mode.STREAM, room=_LONG, mesh=mesh).status


def stream_seconds(plan: Plan, tapes: Tapes, *, mesh: Mesh | None = None) -> float:
    """Seconds in which the GPUs pass all tapes once through the resident program, without computing anything.

    Args:
        plan: The plan.
        tapes: Its tapes.
        mesh: The mesh that they are sharded over, if they are.

    Raises:
        ConfigError: The tapes are not on GPUs.
    """
    device = next(iter(tapes.layers.devices()))
    if device.platform == "cpu":
        raise ConfigError("the stream limit is measured on GPUs; on a CPU the read bandwidth is the limit")

    def seconds(passes: int) -> float:
        started = time.perf_counter()
        jax.block_until_ready(_pass_tapes(plan, tapes, np.int32(passes), mesh=mesh))
        return time.perf_counter() - started

    seconds(1)  # compiles and loads at first, and wakes the clocks up
    return (seconds(_LONG) - seconds(_SHORT)) / (_LONG - _SHORT)
