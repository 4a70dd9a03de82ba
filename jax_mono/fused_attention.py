"""Attention of a prompt in one kernel that keeps scores on the chip, where JAX has one: cuDNN's, on NVIDIA GPUs.

Without it scores take heads x tokens x context values of memory, and their float32 products no tensor core.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jax_mono import native
from jax_mono.config import ModelConfig
from jax_mono.models.layers import visible
from jax_mono.packing import home

Array = jax.Array

_WIDEST = 256
"""Largest ``head_dim`` that cuDNN's kernels take on Hopper."""
_LENGTHS = 4
"""Lengths of the cache that are compiled for, each half of the one before."""


def available(config: ModelConfig, dtype: DTypeLike, mesh: Mesh | None) -> bool:
    """Whether :func:`attend` works for heads of this model where a call with this mesh, or none, runs."""
    device = home() if mesh is None else mesh.devices.flat[0]
    on_cuda = device.platform != "cpu" and native.gpu_platform() == "cuda"
    fits = config.head_dim % 8 == 0 and config.head_dim <= _WIDEST
    return on_cuda and fits and jnp.dtype(dtype).itemsize == 2


@jax.custom_batching.custom_vmap
def attend(q: Array, k: Array, v: Array, positions: Array, window: int | Array) -> Array:
    """What :func:`jax_mono.models.layers.attend` computes, with probabilities rounded to the dtype of the values.

    Args:
        q: [T, Hq, hd].
        k: bfloat16 or float16 [Hkv, S, hd].
        v: Like ``k``.
        positions: int32 [T].
        window: Visible positions, 0 for all.

    Returns:
        float32 [T, Hq, hd].
    """
    tokens, capacity = q.shape[0], k.shape[1]
    q, k, v = q[None].astype(k.dtype), k.swapaxes(0, 1)[None], v.swapaxes(0, 1)[None]

    def attend_to(length: int) -> Array:
        seen = visible(positions, length, window)[None, None]
        return jax.nn.dot_product_attention(q, k[:, :length], v[:, :length], mask=seen, implementation="cudnn")

    # The kernel takes time for keys that the mask hides, too, so it gets a part of the cache that holds all keys
    # that are seen. Tokens beyond the cache are padding.
    lengths = [capacity]
    while len(lengths) < _LENGTHS and lengths[-1] % 2 == 0 and lengths[-1] // 2 >= tokens:
        lengths.append(lengths[-1] // 2)
    last = jnp.max(jnp.where(positions < capacity, positions, 0))
    fitting = sum((last < length).astype(jnp.int32) for length in lengths[1:])
    out = jax.lax.switch(fitting, [functools.partial(attend_to, length) for length in lengths])
    return out[0].astype(jnp.float32)


@attend.def_vmap
def _attend_together(
    size: int, batched: list[bool], q: Array, k: Array, v: Array, positions: Array, window: int | Array
) -> tuple[Array, bool]:
    """Heads of several devices side by side: JAX's own rule would copy the mask for each head."""
    if batched != [True, True, True, False, False]:
        raise NotImplementedError(f"only queries, keys and values may differ from device to device, not {batched}")
    tokens, heads, head_dim = q.shape[1:]
    joined = attend(
        q.swapaxes(0, 1).reshape(tokens, size * heads, head_dim),
        k.reshape(-1, *k.shape[2:]),
        v.reshape(-1, *v.shape[2:]),
        positions,
        window,
    )
    return joined.reshape(tokens, size, heads, head_dim).swapaxes(0, 1), True
