"""Facts about a served model: its size, how it is cut, and the speed that this machine's memory allows."""

from __future__ import annotations

import time
from typing import Any

import jax

from jax_mono import gpus, native
from jax_mono.decoder import Decoder
from jax_mono.packing import home

_STREAMS = (1, 2, 4, 8)
_SECONDS = 0.7


def facts(decoder: Decoder) -> dict[str, Any]:
    """What ``/v1/models`` and the playground tell.

    On the CPU this reads the weights a few times, for the bandwidth with which that can be done.

    Args:
        decoder: The model, at rest.

    Returns:
        A JSON object; figures that are not known here are null.
    """
    plan = decoder.plan
    device = home()
    blocks = [(owner, block) for owner in range(plan.num_devices) for block in range(plan.num_blocks)]
    words = sum(plan.block_words(owner, block) for owner, block in blocks)
    bytes_per_token = words * decoder.tapes.dtype.itemsize
    bandwidth = _read_bandwidth(decoder) if device.platform == "cpu" else None
    return {
        "parameters": plan.config.num_parameters,
        "family": plan.config.family,
        "dtype": decoder.tapes.dtype.name,
        "batch": 1,
        "devices": plan.num_devices,
        "blocks": plan.num_blocks,
        "platform": device.platform,
        "program": native.cpu_variant() if device.platform == "cpu" else gpus.gpu_of(device).architecture,
        "jax": jax.__version__,
        "bytes_per_token": bytes_per_token,
        "read_bytes_per_s": bandwidth,
        "limit_tokens_per_s": None if bandwidth is None else bandwidth / bytes_per_token,
    }


def _read_bandwidth(decoder: Decoder) -> float:
    """The best of as many passes as fit into a moment: what others do on this machine only ever makes one slower."""
    threads = decoder.plan.num_devices * decoder.plan.num_blocks
    layers = decoder.tapes.layers.addressable_shards[0].data
    end, best = time.monotonic() + _SECONDS, 0.0
    while time.monotonic() < end:
        best = max(best, *(native.read_bandwidth(layers, threads, streams) for streams in _STREAMS))
    return best
