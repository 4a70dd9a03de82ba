"""The custom call: one traced operation that runs the whole token loop.

This is the only place that knows the operand order of ``ffi/host/handlers.cc``.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from jax_mono import native, settings
from jax_mono.plan import Plan
from jax_mono.prefill import AXIS
from jax_mono.record import plan_record
from jax_mono.tape import STORAGE, Tapes

Array = jax.Array


class Mode(enum.IntEnum):
    """What the call does; mirrors ``Mode`` in ffi/kernel/call.h and ``kStreamBenchmark`` in ffi/host/operands.h.

    ``STREAM`` passes the tapes as decoding does, ``budget`` times, and computes nothing: the limit of decoding. GPUs
    only.
    """

    GENERATE = 0
    SCORE = 1
    STREAM = 2


@dataclass(frozen=True)
class LostHandoff:
    """Fault injection for tests: one block's share of one hand-off never arrives.

    Attributes:
        device: The device that should have published.
        block: Its block.
        layer: The layer.
        channel: A name from :data:`jax_mono.native.CHANNELS`.
    """

    device: int
    block: int
    layer: int
    channel: str


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CallRequest:
    """Operands that say what to do; all may be traced.

    Attributes:
        position: int32 [], position of the first token fed.
        num_forced: int32 [], tokens of ``forced`` to feed, at least 1.
        budget: int32 [], steps at most.
        session: int32 [], number of a streaming session, 0 for none.
        seed: uint32 [2].
        temperature: float32 [], 0 for greedy.
        top_k: int32 [], 0 for all.
        top_p: float32 [].
        min_p: float32 [].
        repetition_penalty: float32 [].
        stops: int32 [any], negative entries are padding.
        history: int32 [any], what the repetition penalty has seen; negative entries are padding.
        forced: int32 [any], the tokens to feed before sampling starts, or [room] to score; entries from
            ``num_forced`` on are padding.
    """

    position: Array
    num_forced: Array
    budget: Array
    session: Array
    seed: Array
    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    repetition_penalty: Array
    stops: Array
    history: Array
    forced: Array

    @classmethod
    def unsampled(
        cls, forced: ArrayLike, *, count: ArrayLike, budget: ArrayLike, session: ArrayLike = 0
    ) -> CallRequest:
        """A request that leaves nothing to sampling: it scores given tokens, or only passes tapes.

        Args:
            forced: int32 [any], the tokens.
            count: Of them, the others are padding.
            budget: Steps at most.
            session: See :class:`CallRequest`.
        """
        nothing = jnp.full((1,), -1, jnp.int32)
        return cls(
            position=jnp.int32(0),
            num_forced=jnp.asarray(count, jnp.int32),
            budget=jnp.asarray(budget, jnp.int32),
            session=jnp.asarray(session, jnp.int32),
            seed=jnp.zeros((2,), jnp.uint32),
            temperature=jnp.float32(0.0),
            top_k=jnp.int32(0),
            top_p=jnp.float32(1.0),
            min_p=jnp.float32(0.0),
            repetition_penalty=jnp.float32(1.0),
            stops=nothing,
            history=nothing,
            forced=jnp.asarray(forced, jnp.int32),
        )

    def words(self) -> tuple[Array, Array]:
        """The scalar operands in the order of ``IntWord`` and ``FloatWord`` in ffi/host/handlers.cc."""
        seed = jax.lax.bitcast_convert_type(jnp.asarray(self.seed, jnp.uint32), jnp.int32)
        ints = [self.position, self.num_forced, self.budget, self.top_k, self.session, seed[0], seed[1]]
        floats = [self.temperature, self.top_p, self.min_p, self.repetition_penalty]
        return (
            jnp.stack([jnp.asarray(value, jnp.int32) for value in ints]),
            jnp.stack([jnp.asarray(value, jnp.float32) for value in floats]),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CallResult:
    """What the call returns. D devices; all of them report the same tokens, so those have no device axis.

    Attributes:
        tokens: int32 [room]; entries beyond ``status[0]`` are undefined.
        logprobs: float32 [room], natural logarithms under the unmodified distribution.
        top_ids: int32 [room, top_n].
        top_logprobs: float32 [room, top_n].
        status: int32 [2], steps done and why it ended.
        logits: float32 [D, room or 0, max_vocab], each device's rows; only when scoring.
        k_cache: [D, num_layers, max_kv_heads, S, head_dim], updated in place.
        v_cache: The same for values.
    """

    tokens: Array
    logprobs: Array
    top_ids: Array
    top_logprobs: Array
    status: Array
    logits: Array
    k_cache: Array
    v_cache: Array


def resident_call(
    plan: Plan,
    tapes: Tapes,
    rope: Array,
    cache: tuple[Array, Array] | None,
    request: CallRequest,
    *,
    mode: Mode,
    room: int,
    top_n: int = 0,
    want_logits: bool = False,
    mesh: Mesh | None = None,
    lost: LostHandoff | None = None,
) -> CallResult:
    """Runs the resident program.

    Args:
        plan: The plan that the tapes were packed for.
        tapes: The weights.
        rope: float32 [S, head_dim / 2, 2].
        cache: Keys and values, each [D, num_layers, max_kv_heads, S, head_dim]; donate them to have them updated in
            place. None starts empty.
        request: What to do.
        mode: Generate, or score given tokens.
        room: Length of the token outputs.
        top_n: Alternatives to report per token.
        want_logits: Whether scoring returns all logits.
        mesh: None runs all devices of the plan in one call on one JAX device (lane threads); a 1-D mesh with axis
            ``devices`` runs one call per JAX device, each with its share of the plan's devices.
        lost: Fault injection for tests.

    Returns:
        The outputs.
    """
    native.register()
    ints, floats = request.words()
    cut, whole = P(AXIS), P()
    shared = (tapes.embed, rope, ints, floats, request.stops, request.history, request.forced)
    per_device = (tapes.layers, tapes.head, tapes.constants, *(cache or ()))
    call = functools.partial(
        _local_call,
        dtype=tapes.dtype,
        plan=plan,
        mode=mode,
        room=room,
        top_n=top_n,
        want_logits=want_logits,
        lost=lost,
    )
    if mesh is None:
        *same, logits, k_cache, v_cache = call(jnp.zeros((1,), jnp.int32), per_device, shared)
        return CallResult(*(value[0] for value in same), logits, k_cache, v_cache)

    def on_device(per_device: tuple[Array, ...], shared: tuple[Array, ...]) -> tuple[Array, ...]:
        first = (jax.lax.axis_index(AXIS) * per_device[0].shape[0]).astype(jnp.int32)[None]
        *same, logits, k_cache, v_cache = call(first, per_device, shared)
        return *(value[0] for value in same), jax.lax.all_gather(logits, AXIS, tiled=True), k_cache, v_cache

    specs = {"in_specs": (cut, whole), "out_specs": (*[whole] * 6, cut, cut)}
    return CallResult(*jax.shard_map(on_device, mesh=mesh, **specs, check_vma=False)(per_device, shared))


def _local_call(
    first: Array,
    per_device: tuple[Array, ...],
    shared: tuple[Array, ...],
    dtype: jnp.dtype,
    plan: Plan,
    mode: Mode,
    room: int,
    top_n: int,
    want_logits: bool,
    lost: LostHandoff | None,
) -> Sequence[Array]:
    layers, head, constants, *cache = per_device
    embed, rope, *request = shared
    devices = layers.shape[0]
    if not cache:
        config = plan.config
        shape = (devices, config.num_layers, plan.max_kv_heads, rope.shape[0], config.head_dim)
        cache = [jnp.zeros(shape, layers.dtype)] * 2
    k_cache, v_cache = cache

    def out(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((devices, *shape), dtype)

    fault = [] if lost is None else [lost.device, lost.block, lost.layer, native.CHANNELS.index(lost.channel)]
    call = jax.ffi.ffi_call(
        native.TARGET,
        (
            out(jnp.int32, room),
            out(jnp.float32, room),
            out(jnp.int32, room, top_n),
            out(jnp.float32, room, top_n),
            out(jnp.int32, 2),
            out(jnp.float32, room if want_logits else 0, plan.max_vocab),
            jax.ShapeDtypeStruct(k_cache.shape, k_cache.dtype),
            jax.ShapeDtypeStruct(v_cache.shape, v_cache.dtype),
        ),
        has_side_effect=True,  # a session sees tokens while the call runs
        input_output_aliases={5: 6, 6: 7},
    )
    return call(
        *(layers, head, constants, embed, rope, k_cache, v_cache, *request, first),
        plan=plan_record(plan),
        mode=np.int32(mode),
        weights=np.int32(list(STORAGE).index(dtype.name)),
        wait_limit_ms=np.int32(settings.wait_limit_ms()),
        meeting_limit_ms=np.int32(settings.meeting_limit_ms()),
        fault=np.asarray(fault, np.int32),
    )
