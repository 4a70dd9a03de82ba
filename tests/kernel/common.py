"""Decoders of tiny models, made quickly, and the Flax model to compare them with."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from tiny import random_params

from jax_mono.call import CallRequest, CallResult, resident_call
from jax_mono.config import ModelConfig
from jax_mono.cut import target_of
from jax_mono.decoder import Decoder
from jax_mono.models.rope import rope_table
from jax_mono.models.source import ArraySource, Params
from jax_mono.models.transformer import Transformer
from jax_mono.packing import home, pack
from jax_mono.plan import Target, make_plan
from jax_mono.prefill import AXIS
from jax_mono.tape import Tapes
from jax_mono.tile import TileFormat
from jax_mono.topology import Topology

Form = Literal["threads", "mesh"]
"""Lane threads (all devices in one call), or one call per JAX device."""


def make_mesh(devices: int) -> Mesh:
    """A mesh over the first ``devices`` JAX devices."""
    return jax.make_mesh((devices,), (AXIS,), devices=jax.devices()[:devices])


@functools.lru_cache(maxsize=64)
def params_of(config: ModelConfig, dtype: DTypeLike = jnp.float32, seed: int = 3) -> Params:
    """Random parameters of a model."""
    return random_params(config, seed, dtype)


def make_decoder(
    config: ModelConfig,
    *,
    devices: int = 1,
    blocks: int = 1,
    dtype: DTypeLike = jnp.float32,
    form: Form = "threads",
    kv_splits: int | None = None,
    context: int | None = None,
    params: Params | None = None,
    target: Target | None = None,
    topology: Topology | None = None,
    pattern: Sequence[int] | None = None,
    tile: TileFormat | None = None,
    mesh_size: int | None = None,
) -> Decoder:
    """A decoder on JAX's default device, or on a mesh, with random parameters unless some are given."""
    target = target or target_of(home())
    places = {"topology": topology, "pattern": pattern, "tile": tile}
    plan = make_plan(config, devices=devices, blocks=blocks, kv_splits=kv_splits, target=target, **places)
    mesh = make_mesh(mesh_size or devices) if form == "mesh" else None
    source = ArraySource(config, params_of(config, dtype) if params is None else params)
    tapes = pack(plan, source, dtype=dtype, mesh=mesh)
    return Decoder(plan, tapes, mesh=mesh, context=context)


def with_exceptions(config: ModelConfig) -> Params:
    """Parameters of which every matrix has weights that are far larger or smaller than the others, and zeros."""

    def change(path: tuple[object, ...], leaf: jax.Array) -> jax.Array:
        if leaf.ndim < 2 or min(leaf.shape[-2:]) < 64:
            return leaf
        leaf = leaf.at[..., 5, 7].set(0.5).at[..., 9, 60].set(-1e-7).at[..., 33, 1].set(0).at[..., 34, 2].set(3e-9)
        return leaf.at[..., 9, 61].set(2e-12)

    return jax.tree_util.tree_map_with_path(change, params_of(config, jnp.bfloat16))


def make_request(**changes: object) -> CallRequest:
    """A greedy request for one token after token 1 at position 0, unless something else is asked for."""
    fields: dict[str, object] = {
        "position": 0,
        "num_forced": 1,
        "budget": 1,
        "session": 0,
        "seed": np.zeros(2, np.uint32),
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "stops": np.full(1, -1, np.int32),
        "history": np.full(1, -1, np.int32),
        "forced": np.ones(1, np.int32),
    }
    floats = ("temperature", "top_p", "min_p", "repetition_penalty")
    typed = {
        name: np.asarray(value, np.float32 if name in floats else None) for name, value in (fields | changes).items()
    }
    return CallRequest(**typed)


def call_kernel(decoder: Decoder, request: CallRequest, tapes: Tapes | None = None, **options: Any) -> CallResult:
    """Runs the resident program alone, on an empty cache: no prefill, no checks in Python."""
    rope = jnp.asarray(rope_table(decoder.plan.config, decoder.context))
    call = functools.partial(resident_call, decoder.plan, mesh=decoder.mesh, **options)
    return jax.block_until_ready(call(decoder.tapes if tapes is None else tapes, rope, None, request))


def some_tokens(length: int, vocab: int = 128, seed: int = 1) -> list[int]:
    """A random text."""
    return np.random.default_rng(seed).integers(0, vocab, length).tolist()


def _forward(config: ModelConfig, params: Params, tokens: jax.Array) -> jax.Array:
    return Transformer.from_params(config, params)(tokens)[0]


_compiled_forward = jax.jit(_forward, static_argnums=0)


def flax_logits(config: ModelConfig, params: Params, tokens: Sequence[int]) -> np.ndarray:
    """Logits of the Flax model, float32 [T, V].

    Laneformers run operation by operation: they differ in switches, not in shapes, so nothing needs compiling anew.
    """
    forward = _compiled_forward if config.lanes is None else _forward
    return np.asarray(forward(config, params, jnp.asarray(tokens, jnp.int32)))


def flax_greedy(config: ModelConfig, params: Params, prompt: Sequence[int], count: int, length: int) -> list[int]:
    """The Flax model's most likely continuation; every step runs a text of ``length`` tokens."""
    text = [*prompt, *[0] * (length - len(prompt))]  # what follows does not matter: attention is causal
    for position in range(len(prompt), len(prompt) + count):
        text[position] = int(np.argmax(flax_logits(config, params, text)[position - 1]))
    return text[len(prompt) : len(prompt) + count]


def assert_same_tokens(
    actual: Sequence[int], expected: Sequence[int], config: ModelConfig, params: Params, prompt: Sequence[int]
) -> None:
    """Compares greedy tokens; where they part, says how close the decision was."""
    if list(actual) == list(expected):
        return
    pairs = list(zip(actual, expected, strict=False))
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    logits = flax_logits(config, params, [*prompt, *expected])[len(prompt) + at - 1]
    best, second = np.argsort(logits)[::-1][:2]
    raise AssertionError(
        f"token {at} is {actual[at : at + 1]}, not {expected[at : at + 1]}; "
        f"Flax: {best} leads {second} by {logits[best] - logits[second]:.2e}"
    )
