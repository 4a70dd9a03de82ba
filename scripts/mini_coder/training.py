"""One step of training, its state, and the evaluation; data parallel over the devices of a mesh."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_mono.config import ModelConfig
from jax_mono.models.source import flatten, unflatten
from jax_mono.models.transformer import Transformer, params
from mini_coder.forward import token_losses
from mini_coder.recipe import Settings
from mini_coder.token_file import in_order
from mini_coder.vocabulary import END_ID

Flat = dict[str, jax.Array]
"""Canonical path to float32 array."""

AXIS = "data"


class State(NamedTuple):
    """What a step changes.

    Attributes:
        params: Master weights.
        optimizer: State of the optimiser.
    """

    params: Flat
    optimizer: Any


def data_mesh(devices: int | None = None) -> Mesh:
    """A mesh of some or all of JAX's devices, each with its own sequences."""
    found = jax.devices()[:devices]
    return jax.make_mesh((len(found),), (AXIS,), (AxisType.Auto,), devices=found)


def learning_rate(settings: Settings, step: int) -> float:
    """The rate of a step: a linear rise, then a cosine down to the floor.

    Computed on the host: asking a device for it would wait for the steps before.
    """
    warmup = min(settings.warmup, max(1, settings.steps // 10))
    if step < warmup:
        return settings.peak * (step + 1) / warmup
    fallen = 0.5 - 0.5 * math.cos(math.pi * (step - warmup) / max(1, settings.steps - warmup))
    return settings.peak * (1.0 - (1.0 - settings.floor) * fallen)


def optimizer(settings: Settings) -> optax.GradientTransformation:
    """AdamW (arXiv:1711.05101) with clipped gradients, for a learning rate of 1; norms do not decay."""
    return optax.chain(
        optax.clip_by_global_norm(settings.clip),
        optax.scale_by_adam(b1=0.9, b2=0.95),
        optax.add_decayed_weights(settings.decay, lambda tree: {path: a.ndim > 1 for path, a in tree.items()}),
    )


def initial_state(config: ModelConfig, settings: Settings, mesh: Mesh) -> State:
    """Draws parameters, the same for every communication, and puts them on all devices.

    The matrices that write to the residual stream are smaller by the root of their number (GPT-2, section 2.3).
    """
    tree = params(Transformer(config, rngs=nnx.Rngs(settings.seed)))
    writes = math.sqrt(2 * config.num_layers)
    flat = {
        path: np.asarray(array) / (writes if path.endswith((".wo", ".w2")) else 1.0) for path, array in flatten(tree)
    }
    placed = jax.device_put({path: array.astype(np.float32) for path, array in flat.items()}, whole(mesh))
    return State(placed, jax.jit(optimizer(settings).init, out_shardings=whole(mesh))(placed))


def whole(mesh: Mesh) -> NamedSharding:
    """Every device has all of it."""
    return NamedSharding(mesh, P())


def place(batch: np.ndarray, settings: Settings, mesh: Mesh) -> jax.Array:
    """Cuts a batch into micro-batches and deals those to the devices.

    Args:
        batch: int32 [batch, T + 1].
        settings: ``micro`` counts.
        mesh: The devices.

    Returns:
        int32 [micro-batches, devices * micro, T + 1], cut along the second axis.
    """
    at_once = mesh.devices.size * settings.micro
    if len(batch) % at_once:
        raise ValueError(
            f"a batch of {len(batch)} sequences cannot be dealt in micro-batches of {settings.micro} to "
            f"{mesh.devices.size} devices; change --micro"
        )
    cut = batch.reshape(-1, at_once, batch.shape[1])
    return jax.device_put(cut, NamedSharding(mesh, P(None, AXIS)))


def options(settings: Settings) -> dict[str, Any]:
    """Settings as arguments of the forward pass."""
    return {
        "dtype": jnp.dtype(settings.compute),
        "implementation": settings.attention,
        "remat": settings.remat,
    }


Step = Callable[[State, jax.Array, np.float32], tuple[State, dict[str, jax.Array]]]
"""From state (donated), batch (see :func:`place`) and learning rate to state and numbers: ``loss`` in nats per token,
and ``norm`` of the gradient before it is clipped."""


def make_step(config: ModelConfig, settings: Settings, mesh: Mesh) -> Step:
    """Compiles a step, once for all runs that differ only in length, learning rate and seed.

    Args:
        config: The model.
        settings: The run.
        mesh: The devices.
    """
    return _make_step(config, _compiled_part(settings), mesh)


def _compiled_part(settings: Settings) -> Settings:
    """The settings without those that no compiled program depends on."""
    return settings.replace(steps=1, peak=1.0, warmup=1, floor=1.0, seed=0)


@functools.lru_cache(maxsize=4)
def _make_step(config: ModelConfig, settings: Settings, mesh: Mesh) -> Step:
    how = optimizer(settings)

    def loss(flat: Flat, tokens: jax.Array) -> jax.Array:
        return jnp.mean(token_losses(config, unflatten(flat), tokens, **options(settings)))

    def step(state: State, batch: jax.Array, rate: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        def add(sums: Any, tokens: jax.Array) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, jax.value_and_grad(loss)(state.params, tokens)), None

        nothing = (jnp.float32(0.0), jax.tree.map(jnp.zeros_like, state.params))
        sums, _ = jax.lax.scan(add, nothing, batch)
        value, gradient = jax.tree.map(lambda total: total / len(batch), sums)
        updates, following = how.update(gradient, state.optimizer, state.params)
        numbers = {"loss": value, "norm": optax.tree.norm(gradient)}
        changed = jax.tree.map(lambda array, update: array - rate * update, state.params, updates)
        return State(changed, following), numbers

    everywhere = whole(mesh)
    return jax.jit(step, donate_argnums=0, out_shardings=(everywhere, everywhere))


def held_out_nats(
    config: ModelConfig, flat: Mapping[str, jax.Array], file: Path, settings: Settings, mesh: Mesh
) -> tuple[float, int]:
    """Scores a token file with weights rounded as they are shipped.

    Sequences are cut from the file one behind the other, so that a token sees between 0 and T - 1 tokens before it,
    possibly of the document before. The tokens that end documents do not count.

    Args:
        config: The model.
        flat: Master weights.
        file: Token ids.
        settings: ``length``, ``micro`` and how products are computed.
        mesh: The devices.

    Returns:
        Negative log-likelihood of all text in nats, and its tokens.
    """
    nats = _make_nats(config, _compiled_part(settings), mesh)
    cut = NamedSharding(mesh, P(AXIS))
    total, tokens = 0.0, 0
    for batch, counts in in_order(file, length=settings.length, size=settings.micro * mesh.devices.size):
        value, count = nats(dict(flat), jax.device_put(batch, cut), jax.device_put(counts, cut))
        total, tokens = total + float(value), tokens + int(count)
    return total, tokens


@functools.lru_cache(maxsize=4)
def _make_nats(config: ModelConfig, settings: Settings, mesh: Mesh) -> Callable[..., tuple[jax.Array, jax.Array]]:
    compute = jnp.dtype(settings.compute)

    def nats(flat: Flat, tokens: jax.Array, counts: jax.Array) -> tuple[jax.Array, jax.Array]:
        rounded = {path: array.astype(compute).astype(jnp.float32) for path, array in flat.items()}
        losses = token_losses(config, unflatten(rounded), tokens, **options(settings))
        counts &= tokens[:, 1:] != END_ID
        return jnp.sum(jnp.where(counts, losses, 0.0)), jnp.sum(counts)

    return jax.jit(nats, out_shardings=whole(mesh))
