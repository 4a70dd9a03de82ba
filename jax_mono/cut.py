"""How a model is cut for the processor at hand, unless asked otherwise."""

from __future__ import annotations

import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jax_mono import gpus, native, settings
from jax_mono.config import ConfigError, ModelConfig
from jax_mono.plan import CPU, GPU, Plan, Target, make_plan
from jax_mono.tape import tape_storage
from jax_mono.tile import TileFormat

_ENOUGH = 0.9
"""Of the processors; with fewer the memory would not be busy."""


def target_of(device: jax.Device) -> Target:
    """The kind of plan that a JAX device runs."""
    return CPU if device.platform == "cpu" else GPU


def default_devices(config: ModelConfig, on_cpu: bool = True) -> int:
    """Logical devices on this CPU or one GPU unless asked otherwise.

    Blocks of one device wait for one another several times per layer, and every time for the slowest. Devices of a
    Laneformer with a delay are layers apart before one waits for another. So such a model gets, on a CPU, as many
    devices as evenly share its lanes and the cores of this process; on a GPU, one for every two lanes: more devices
    exchange more sums, fewer have longer hand-offs (docs/performance.md). Any other model gets one.
    """
    lanes = config.lanes
    if not lanes or not lanes.delay:
        return 1
    if not on_cpu:
        return lanes.count // 2 if lanes.count % 2 == 0 else 1
    return math.gcd(lanes.count, settings.cores()) if settings.blocks() is None else 1


_MOST_GROUPS = 4
"""Of a GPU in a mesh: with more, sums between them outweigh shorter hand-offs."""


def devices_in_mesh(config: ModelConfig, mesh: Mesh, on_cpu: bool) -> int:
    """Devices of the plan over a mesh unless asked otherwise; each JAX device gets equally many.

    One on a CPU device. A GPU gets groups of blocks as it does alone, as far as there are lanes.
    """
    lanes = config.lanes
    if on_cpu or not lanes or not lanes.delay or lanes.count % mesh.size:
        return mesh.size
    return mesh.size * math.gcd(lanes.count // mesh.size, _MOST_GROUPS)


def default_blocks(config: ModelConfig, devices: int, multiprocessors: int | None = None) -> int:
    """Blocks per device unless asked otherwise: one per core or multiprocessor, at most what the model can employ.

    Every stage waits for the block that has most of it. If a few blocks less would have no more hidden rows each, they
    are as fast, and have fewer words to exchange.

    Args:
        config: The model.
        devices: Devices of the plan that share the cores of this process, or one GPU.
        multiprocessors: Of that GPU; None means the CPU.
    """
    asked = settings.blocks() if multiprocessors is None else None
    tiles = TileFormat().row_tiles(config.hidden_size)
    blocks = min(asked or max(1, (multiprocessors or settings.cores()) // devices), tiles)
    fewer = -(-tiles // -(-tiles // blocks))
    return fewer if asked is None and fewer >= _ENOUGH * blocks else blocks


def compresses(device: jax.Device, dtype: DTypeLike) -> bool:
    """Whether compressed tapes decode faster than plain ones on a JAX device (docs/performance.md)."""
    if jnp.dtype(dtype) != jnp.bfloat16:
        return False
    if device.platform == "cpu":
        return native.cpu_variant() != "portable"
    return gpus.gpu_of(device).architecture in gpus.COMPRESSED


def plans_for(
    config: ModelConfig,
    device: jax.Device,
    dtype: DTypeLike,
    *,
    devices: int | None,
    blocks: int | None,
    mesh: Mesh | None,
    compress: bool | None,
) -> Iterator[Plan]:
    """Plans a model for the processor at hand.

    Args:
        config: The model.
        device: Where it is to run; with a mesh, the first device of that.
        dtype: Of the weights.
        devices: As for :func:`plan_for`.
        blocks: As for :func:`plan_for`.
        mesh: As for :func:`plan_for`.
        compress: Whether tapes are to be compressed; None where that is faster and possible.

    Yields:
        The plan; and if the weights turn out not to be compressible, and need not be compressed, another one.

    Raises:
        ConfigError: The model cannot be cut like this, or not with compressed tapes.
        NativeError: The GPU cannot be used, or has no program for this plan.
    """
    cut, tile = {"devices": devices, "blocks": blocks, "mesh": mesh}, TileFormat(compressed=True)
    if compress or (compress is None and compresses(device, dtype)):
        try:
            tape_storage(tile, dtype)
            plan = plan_for(config, device, **cut, tile=tile)
            gpus.check_plan(device, plan, dtype)
        except (ConfigError, native.NativeError):
            if compress:
                raise
        else:
            yield plan
    if not compress:
        yield plan_for(config, device, **cut)


def plan_for(
    config: ModelConfig,
    device: jax.Device,
    *,
    devices: int | None,
    blocks: int | None,
    mesh: Mesh | None,
    tile: TileFormat | None = None,
) -> Plan:
    """Plans a model for the processor at hand.

    Args:
        config: The model.
        device: Where it is to run; with a mesh, the first device of that.
        devices: Devices that share the model, or None for what is best; over a mesh a multiple of its size.
        blocks: Blocks per device, or None for what is best.
        mesh: For one call per JAX device, or None.
        tile: How tiles lie on tapes; None for plain ones.

    Returns:
        The plan.

    Raises:
        ConfigError: The model cannot be cut like this.
        NativeError: The GPU cannot be used.
    """
    on_cpu = device.platform == "cpu"
    if devices is None:
        if mesh is not None:
            devices = devices_in_mesh(config, mesh, on_cpu) if blocks is None else mesh.size
        else:
            devices = default_devices(config, on_cpu) if blocks is None else 1
    if mesh is not None and devices % mesh.size:
        raise ConfigError(f"{devices} devices do not divide over the {mesh.size} of the mesh; use a multiple of that")
    gpu = None if on_cpu else gpus.gpu_of(device)
    if blocks is None:
        sharing = devices if mesh is None or on_cpu else devices // mesh.size
        blocks = default_blocks(config, sharing, None if gpu is None else gpu.multiprocessors)
    topology = None if gpu is None else gpus.topology_of(gpu)
    target = target_of(device)
    return make_plan(config, devices=devices, blocks=blocks, tile=tile, target=target, topology=topology)
