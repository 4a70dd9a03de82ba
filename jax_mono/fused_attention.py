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
from jax_mono.models.layers import Attend, visible
from jax_mono.packing import home

Array = jax.Array

_WIDEST = 256
"""Largest ``head_dim`` that cuDNN's kernels take on Hopper."""
_LENGTHS = 4
"""Lengths of the cache that are compiled for, each half of the one before."""


def available(config: ModelConfig, dtype: DTypeLike, mesh: Mesh | None) -> bool:
    """Whether :func:`attend_within` works for heads of this model where a call with this mesh, or none, runs."""
    device = home() if mesh is None else mesh.devices.flat[0]
    on_cuda = device.platform != "cpu" and native.gpu_platform() == "cuda"
    fits = config.head_dim % 8 == 0 and config.head_dim <= _WIDEST
    return on_cuda and fits and jnp.dtype(dtype).itemsize == 2


@functools.cache
def attend_within(windows: tuple[int, ...]) -> Attend:
    """Makes a function that computes what :func:`jax_mono.models.layers.attend` does, for models of given windows.

    Probabilities are rounded to the dtype of the values, bfloat16 or float16. Positions must follow each other; those
    at or beyond the end of the cache are padding.

    Args:
        windows: All windows that it will be called with, 0 for none.
    """

    @jax.custom_batching.custom_vmap
    def attend(q: Array, k: Array, v: Array, positions: Array, window: int | Array) -> Array:
        return _attend(q, k, v, positions, window, windows)

    @attend.def_vmap
    def _together(
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

    return attend


def _attend(q: Array, k: Array, v: Array, positions: Array, window: int | Array, windows: tuple[int, ...]) -> Array:
    tokens, capacity = q.shape[0], k.shape[1]
    q, k, v = q[None].astype(k.dtype), k.swapaxes(0, 1)[None], v.swapaxes(0, 1)[None]
    attention = functools.partial(jax.nn.dot_product_attention, q, implementation="cudnn")

    def attend_to(length: int) -> Array:
        seen = visible(positions, length, window)[None, None]
        return attention(k[:, :length], v[:, :length], mask=seen)

    # The kernel takes time for keys that the mask hides, too, so it gets a part of the cache that holds all keys
    # that are seen.
    lengths = [capacity]
    while len(lengths) < _LENGTHS and lengths[-1] % 2 == 0 and lengths[-1] // 2 >= tokens:
        lengths.append(lengths[-1] // 2)
    last = jnp.max(jnp.where(positions < capacity, positions, 0))
    fitting = sum((last < length).astype(jnp.int32) for length in lengths[1:])
    ways = [functools.partial(attend_to, length) for length in lengths]

    def attend_from_start(within: int) -> Array:
        window = (within - 1, 0) if within else None
        return attention(k[:, :tokens], v[:, :tokens], is_causal=True, local_window_size=window)

    # What begins a conversation sees itself alone; then the kernel knows what is hidden, and leaves it out.
    shorter = sorted({within if 0 < within < tokens else 0 for within in windows})
    chosen = sum((jnp.asarray(window) == within) * place for place, within in enumerate(shorter))
    ways += [functools.partial(attend_from_start, within) for within in shorter]
    way = jnp.where(positions[0] == 0, len(lengths) + chosen, fitting)
    return jax.lax.switch(way, ways)[0].astype(jnp.float32)
