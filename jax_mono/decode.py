"""Generation as a pure, traceable function: prompt in, tokens and KV cache out.

``generate`` composes with ``jax.jit``, donation and ``jax.export``. A cache remembers the whole conversation, so the
next call only brings what is new; :class:`jax_mono.Decoder` wraps this with checks, buckets and streaming.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike, DTypeLike

from jax_mono import fused_attention
from jax_mono.call import CallRequest, LostHandoff, Mode, resident_call
from jax_mono.models import layers as reference
from jax_mono.models.rope import rope_table
from jax_mono.plan import Plan
from jax_mono.prefill import AXIS, GROUPS, prefill_chunk
from jax_mono.sampling import GREEDY, Sampling
from jax_mono.tape import Tapes, storage

Array = jax.Array

PREFILL_CHUNK = 128
"""Prompt tokens that the Flax layers take at once; bounds the memory of attention scores."""

FUSED_PREFILL_CHUNK = 2048
"""The same where attention keeps its scores on the chip (:mod:`jax_mono.fused_attention`): every chunk unpacks all
matrices once more."""

SHORT_PROMPT = 20
"""So many new tokens at most are fed through the resident program itself. The Flax layers first unpack every matrix,
which costs as much as some tens of tokens."""


class Finish(enum.IntEnum):
    """Why a generation ended; mirrors ``Finish`` in ffi/kernel/call.h."""

    LENGTH = 0
    STOP = 1
    CANCELLED = 2
    DEADLINE = 3


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """A conversation: its tokens, and their keys and values as far as they were fed.

    Attributes:
        k: [D, num_layers, max_kv_heads, S, head_dim], stored as :data:`jax_mono.tape.STORAGE` says.
        v: The same for values.
        tokens: int32 [S], the conversation; -1 where there is none yet.
        end: int32 [], tokens in the conversation.
        fed: int32 [], tokens whose keys and values are in the cache.
    """

    k: Array
    v: Array
    tokens: Array
    end: Array
    fed: Array

    @property
    def capacity(self) -> int:
        """Positions that fit, S."""
        return self.k.shape[3]

    def keep(self, length: ArrayLike) -> Cache:
        """The conversation's first ``length`` tokens. Keys and values are shared: using one cache consumes both."""
        tokens = jnp.where(jnp.arange(self.capacity) < length, self.tokens, -1)
        return replace(self, tokens=tokens, end=jnp.minimum(self.end, length), fed=jnp.minimum(self.fed, length))

    def copy(self) -> Cache:
        """The same conversation in memory of its own, so that both can go on."""
        return jax.tree.map(jnp.copy, self)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Generation:
    """What a generation gave.

    Attributes:
        tokens: int32 [room]; the first ``count`` are the generated tokens, a stop token included; the rest is -1.
        count: int32 [], 0 if the call was stopped while it fed the prompt.
        finish: int32 [], a :class:`Finish`.
        logprobs: float32 [room], of the chosen tokens, under the model's unmodified distribution.
        top_ids: int32 [room, top_n], the most likely tokens, best first.
        top_logprobs: float32 [room, top_n].
        cache: The conversation, ready for the next call.
    """

    tokens: Array
    count: Array
    finish: Array
    logprobs: Array
    top_ids: Array
    top_logprobs: Array
    cache: Cache


def empty_cache(plan: Plan, capacity: int, dtype: DTypeLike) -> Cache:
    """A cache for ``capacity`` positions of a model with weights of ``dtype``."""
    config = plan.config
    shape = (plan.num_devices, config.num_layers, plan.max_kv_heads, capacity, config.head_dim)
    return Cache(
        k=jnp.zeros(shape, storage(dtype)),
        v=jnp.zeros(shape, storage(dtype)),
        tokens=jnp.full((capacity,), -1, jnp.int32),
        end=jnp.zeros((), jnp.int32),
        fed=jnp.zeros((), jnp.int32),
    )


def generate(
    plan: Plan,
    tapes: Tapes,
    cache: Cache,
    prompt: Array,
    key: Array,
    *,
    room: int,
    length: ArrayLike | None = None,
    budget: ArrayLike | None = None,
    sampling: Sampling = GREEDY,
    stops: Array | None = None,
    session: ArrayLike = 0,
    top_n: int = 0,
    mesh: Mesh | None = None,
    lost: LostHandoff | None = None,
) -> Generation:
    """Appends a prompt to a conversation and generates what follows.

    Under ``jax.jit`` make ``plan``, ``room``, ``top_n`` and ``mesh`` static and donate ``cache``; everything else
    may change without recompiling, except the shapes of ``prompt`` and ``stops``.

    Args:
        plan: The plan that the tapes were packed for.
        tapes: The weights.
        cache: The conversation so far.
        prompt: int32 [P], new tokens; entries from ``length`` on are padding.
        key: A JAX random key; its last 64 bits seed the sampling.
        room: Tokens that the outputs have room for.
        length: Tokens in ``prompt``, at least 1 if nothing waits in the cache; None means all of P.
        budget: Tokens to generate at most, between 1 and ``room``; None means ``room``.
        sampling: How to draw tokens.
        stops: int32 [any], tokens that end the generation; negative entries are padding.
        session: Number of an open :class:`jax_mono.native.Session`, 0 for none.
        top_n: Alternatives to report per token.
        mesh: See :func:`jax_mono.call.resident_call`.
        lost: Fault injection for tests.

    Returns:
        The generation.

    Raises:
        jax.errors.JaxRuntimeError: When the call runs: a token outside the vocabulary, a conversation longer than the
            cache, or a hand-off that got lost.
    """
    rope = jnp.asarray(rope_table(plan.config, cache.capacity))
    count = jnp.asarray(prompt.shape[0] if length is None else length, jnp.int32)
    places = jnp.arange(prompt.shape[0], dtype=jnp.int32)
    where = jnp.where(places < count, cache.end + places, cache.capacity)
    tokens = cache.tokens.at[where].set(prompt, mode="drop")
    end = cache.end + count

    start = jnp.where(end - cache.fed <= SHORT_PROMPT, cache.fed, end - 1)
    k, v = prefill(plan, tapes, rope, cache, tokens, start, prompt.shape[0], mesh)
    last = start + jnp.arange(min(SHORT_PROMPT, cache.capacity), dtype=jnp.int32)
    request = CallRequest(
        position=start,
        num_forced=end - start,
        budget=jnp.asarray(room if budget is None else budget, jnp.int32),
        session=jnp.asarray(session, jnp.int32),
        seed=_seed(key),
        temperature=jnp.asarray(sampling.temperature, jnp.float32),
        top_k=jnp.asarray(sampling.top_k, jnp.int32),
        top_p=jnp.asarray(sampling.top_p, jnp.float32),
        min_p=jnp.asarray(sampling.min_p, jnp.float32),
        repetition_penalty=jnp.asarray(sampling.repetition_penalty, jnp.float32),
        stops=jnp.full((1,), -1, jnp.int32) if stops is None else jnp.asarray(stops, jnp.int32),
        history=tokens,
        forced=tokens.at[last].get(mode="fill", fill_value=-1),
    )
    result = resident_call(
        plan, tapes, rope, (k, v), request, mode=Mode.GENERATE, room=room, top_n=top_n, mesh=mesh, lost=lost
    )
    steps = result.status[0]
    # Stopped within the prompt, the call does not say how far it came: the next one feeds those tokens again.
    fed = jnp.where(steps > 0, end - 1 + steps, start)
    places = jnp.arange(room, dtype=jnp.int32)
    generated = jnp.where(places < steps, result.tokens, -1)
    tokens = tokens.at[jnp.where(places < steps, end + places, cache.capacity)].set(generated, mode="drop")
    return Generation(
        tokens=generated,
        count=steps,
        finish=result.status[1],
        logprobs=jnp.where(places < steps, result.logprobs, 0.0),
        top_ids=result.top_ids,
        top_logprobs=result.top_logprobs,
        cache=Cache(result.k_cache, result.v_cache, tokens, end=end + steps, fed=fed),
    )


def score(
    plan: Plan,
    tapes: Tapes,
    tokens: Array,
    *,
    length: ArrayLike | None = None,
    logits: bool = True,
    session: ArrayLike = 0,
    top_n: int = 0,
    mesh: Mesh | None = None,
    lost: LostHandoff | None = None,
) -> tuple[Array, Array, Array, Array]:
    """Feeds given tokens from position 0 through the resident program (teacher forcing).

    Args:
        plan: The plan that the tapes were packed for.
        tapes: The weights.
        tokens: int32 [T]; entries from ``length`` on are padding, and so are results from there on.
        length: Tokens to feed, at least 1; None means all of T.
        logits: Whether to return all logits; they take 4 T vocab bytes.
        session: Number of an open :class:`jax_mono.native.Session`, 0 for none.
        top_n: Alternatives to report per token.
        mesh: See :func:`jax_mono.call.resident_call`.
        lost: Fault injection for tests.

    Returns:
        Logits, float32 [T, vocab] (or [0, vocab]); log-probabilities of ``tokens[1:]``, float32 [T - 1]; and the
        alternatives at every position, int32 and float32 [T, top_n].
    """
    room = tokens.shape[0]
    count = jnp.asarray(room if length is None else length, jnp.int32)
    rope = jnp.asarray(rope_table(plan.config, room))
    request = CallRequest.unsampled(tokens, count=count, budget=count, session=session)
    result = resident_call(
        plan,
        tapes,
        rope,
        None,
        request,
        mode=Mode.SCORE,
        room=room,
        top_n=top_n,
        want_logits=logits,
        mesh=mesh,
        lost=lost,
    )
    rows = [result.logits[index, :, : share.vocab.count] for index, share in enumerate(plan.devices)]
    return jnp.concatenate(rows, axis=1), result.logprobs[: room - 1], result.top_ids, result.top_logprobs


def prefill(
    plan: Plan,
    tapes: Tapes,
    rope: Array,
    cache: Cache,
    tokens: Array,
    stop: ArrayLike,
    most: int,
    mesh: Mesh | None = None,
) -> tuple[Array, Array]:
    """Writes keys and values of ``tokens[cache.fed : stop]`` by the Flax layers.

    Args:
        plan: The plan that the tapes were packed for.
        tapes: The weights.
        rope: float32 [S, head_dim / 2, 2], rotations by position.
        cache: The conversation so far, with room for S tokens.
        tokens: int32 [S].
        stop: End of the tokens to take in, may be traced.
        most: How many tokens that usually are at most.
        mesh: See :func:`jax_mono.call.resident_call`.

    Returns:
        The updated keys and values, shaped as in the cache.
    """
    fused = fused_attention.available(plan.config, tapes.dtype, mesh)
    attend = fused_attention.attend_within(plan.config.sliding_windows) if fused else reference.attend
    chunk = min(most, FUSED_PREFILL_CHUNK if fused else PREFILL_CHUNK)

    axes = (GROUPS,) if mesh is None else (AXIS, GROUPS)

    def on_device(shares: tuple[Array, ...], first: Array, whole: tuple[Array, ...]) -> tuple[Array, Array]:
        layers, constants, k, v = shares
        embed, rope, tokens, fed, stop = whole
        place = {"axes": axes, "index": first + jax.lax.axis_index(GROUPS)}

        def run(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            start, k, v = state
            positions = start + jnp.arange(chunk, dtype=jnp.int32)
            some = jnp.clip(tokens.at[positions].get(mode="clip"), 0, plan.config.vocab_size - 1)
            positions = jnp.where(positions < stop, positions, cache.capacity)
            k, v = prefill_chunk(
                plan, layers, constants, embed, rope, k, v, some, positions, tapes.dtype, attend, unroll=fused, **place
            )
            return start + chunk, k, v

        _, k, v = jax.lax.while_loop(lambda state: state[0] < stop, run, (fed, k, v))
        return k, v

    shares = (tapes.layers, tapes.constants, cache.k, cache.v)
    whole = (tapes.embed, rope, tokens, cache.fed, jnp.asarray(stop, jnp.int32))
    groups = jax.vmap(on_device, in_axes=(0, None, None), axis_name=GROUPS)
    if mesh is None:
        return groups(shares, jnp.int32(0), whole)

    def on_jax_device(shares: tuple[Array, ...], whole: tuple[Array, ...]) -> tuple[Array, ...]:
        return groups(shares, jax.lax.axis_index(AXIS) * len(shares[0]), whole)

    specs = {"in_specs": (P(AXIS), P()), "out_specs": P(AXIS)}
    return jax.shard_map(on_jax_device, mesh=mesh, **specs, check_vma=False)(shares, whole)


def _seed(key: Array) -> Array:
    data = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    return jnp.asarray(data, jnp.uint32).reshape(-1)[-2:]
