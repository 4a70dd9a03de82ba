"""The decoder as Flax NNX modules: Llama, Qwen2, Qwen3 and Laneformer in one class.

A dense model is a Laneformer with one lane. The modules own parameters; ``layers`` says what they compute.
Their parameters as a pure dict are the canonical tree that checkpoints, plans and tapes speak of::

    embed [V, H], norm [H], lm_head [V, H] unless tied, and for every layer n in layers[n]:
    attention_norm [H], attention.{wq, wk, wv, wo, ...}, ffn_norm [H], feed_forward.{w1, w3, w2}

where matrices are [lanes, out, in] with ``out`` and ``in`` counted per lane.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import deque

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from jax_mono.config import ModelConfig, Module
from jax_mono.models import layers
from jax_mono.models.rope import rope_table
from jax_mono.models.source import Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers by position; a pytree.

    Attributes:
        k: [num_layers, num_kv_heads, S, head_dim] in the weight dtype, heads lane-major, rotated.
        v: The same shape.
    """

    k: jax.Array
    v: jax.Array

    @classmethod
    def zeros(cls, config: ModelConfig, length: int, dtype: DTypeLike) -> KVCache:
        """An empty cache for ``length`` positions."""
        shape = (config.num_layers, config.num_kv_heads, length, config.head_dim)
        return cls(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype))

    @property
    def length(self) -> int:
        """How many positions fit."""
        return self.k.shape[2]


def _matrix(shape: tuple[int, ...], fan_in: int, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Param:
    # Unit variance in, unit variance out: scores and logits are of order 1 at any size, and the standard
    # deviation is the customary 0.02 at a width of 2500.
    values = jax.random.normal(rngs.params(), shape, jnp.float32) * fan_in**-0.5
    return nnx.Param(values.astype(dtype))


def _arrays(module: nnx.Module) -> dict[str, jax.Array]:
    return {name: value[...] for name, value in vars(module).items() if isinstance(value, nnx.Param)}


class Attention(nnx.Module):
    """Parameters of one attention module; called like ``layers.attention``."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Draws random matrices; biases are zero and norms one."""
        lanes, hidden, head_dim = config.num_lanes, config.hidden_size, config.head_dim
        q = config.num_heads // lanes * head_dim
        kv = config.num_kv_heads // lanes * head_dim
        self.wq = _matrix((lanes, q, hidden), hidden, dtype, rngs)
        self.wk = _matrix((lanes, kv, hidden), hidden, dtype, rngs)
        self.wv = _matrix((lanes, kv, hidden), hidden, dtype, rngs)
        self.wo = _matrix((lanes, hidden, q), lanes * q, dtype, rngs)
        if config.qkv_bias:
            self.bq = nnx.Param(jnp.zeros((lanes, q), dtype))
            self.bk = nnx.Param(jnp.zeros((lanes, kv), dtype))
            self.bv = nnx.Param(jnp.zeros((lanes, kv), dtype))
        if config.qk_norm:
            self.q_norm = nnx.Param(jnp.ones((head_dim,), dtype))
            self.k_norm = nnx.Param(jnp.ones((head_dim,), dtype))

    def __call__(
        self,
        config: ModelConfig,
        x: jax.Array,
        cache: tuple[jax.Array, jax.Array],
        positions: jax.Array,
        rope: jax.Array,
        window: int,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """See :func:`jax_mono.models.layers.attention`."""
        return layers.attention(_arrays(self), config, x, cache, positions, rope, window)


class FeedForward(nnx.Module):
    """Parameters of one SwiGLU module; called like ``layers.feed_forward``."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Draws random matrices."""
        lanes, hidden = config.num_lanes, config.hidden_size
        width = config.intermediate_size // lanes
        self.w1 = _matrix((lanes, width, hidden), hidden, dtype, rngs)
        self.w3 = _matrix((lanes, width, hidden), hidden, dtype, rngs)
        self.w2 = _matrix((lanes, hidden, width), lanes * width, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """See :func:`jax_mono.models.layers.feed_forward`."""
        return layers.feed_forward(_arrays(self), x)


class Layer(nnx.Module):
    """Parameters of one layer. The model runs it, because outputs of earlier layers are mixed in."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Draws random matrices; norms are one."""
        self.attention_norm = nnx.Param(jnp.ones((config.hidden_size,), dtype))
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.ffn_norm = nnx.Param(jnp.ones((config.hidden_size,), dtype))
        self.feed_forward = FeedForward(config, dtype=dtype, rngs=rngs)


class Transformer(nnx.Module):
    """A decoder-only language model for one sequence.

    Prefill and decode are the same call: tokens go to the positions ``start, start + 1, ...`` of a cache::

        cache = KVCache.zeros(config, 128, jnp.bfloat16)
        logits, cache = model(prompt, cache)
        logits, cache = model(next_token[None], cache, start=len(prompt))

    Attributes:
        config: The model's configuration.
    """

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs | None = None) -> None:
        """Draws random parameters.

        Args:
            config: The model.
            dtype: float32, bfloat16 or float16, of all parameters.
            rngs: Source of randomness (stream ``params``); by default seed 0.
        """
        rngs = nnx.Rngs(0) if rngs is None else rngs
        vocabulary, hidden = config.vocab_size, config.hidden_size
        self.config = config
        self.embed = _matrix((vocabulary, hidden), hidden, dtype, rngs)
        self.layers = nnx.List([Layer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_layers)])
        self.norm = nnx.Param(jnp.ones((hidden,), dtype))
        if not config.tie_word_embeddings:
            self.lm_head = _matrix((vocabulary, hidden), hidden, dtype, rngs)

    @classmethod
    def from_params(cls, config: ModelConfig, params: Params) -> Transformer:
        """Wraps given parameters, allocating none; also inside a traced function.

        Args:
            config: The model.
            params: The canonical tree of arrays (or of tracers, or of ``jax.ShapeDtypeStruct``).

        Returns:
            A model that shares the arrays of ``params``.

        Raises:
            ValueError: If arrays are missing, superfluous or of another shape; names the first few.
        """
        graph, expected = _skeleton(config)
        _check_shapes(params, expected)
        return nnx.merge(graph, params)

    def __call__(
        self, tokens: jax.Array, cache: KVCache | None = None, start: ArrayLike = 0
    ) -> tuple[jax.Array, KVCache]:
        """Runs the model.

        Args:
            tokens: int32 [T].
            cache: Keys and values of the positions before ``start``; None makes a fresh cache of T positions.
            start: Position of the first token, may be traced. Positions that do not fit into the cache are
                not stored, and their logits mean nothing.

        Returns:
            Logits, float32 [T, V], and the updated cache.

        Raises:
            ValueError: If ``tokens`` or ``cache`` has a shape that does not fit.
        """
        streams, cache = self.residual_streams(tokens, cache, start)
        return self.head(streams[-1]), cache

    def residual_streams(
        self, tokens: jax.Array, cache: KVCache | None = None, start: ArrayLike = 0
    ) -> tuple[list[jax.Array], KVCache]:
        """Runs all layers and shows what happened in between.

        Args:
            tokens: As for calling the model.
            cache: As for calling the model.
            start: As for calling the model.

        Returns:
            float32 [lanes, T, H] after the embedding and after every layer (``num_layers + 1`` arrays; under
            ``jax.jit`` those that are not used cost nothing), and the updated cache.

        Raises:
            ValueError: If ``tokens`` or ``cache`` has a shape that does not fit.
        """
        config = self.config
        cache = self._checked_cache(tokens, cache)
        positions = jnp.asarray(start, jnp.int32) + jnp.arange(tokens.shape[0], dtype=jnp.int32)
        rope = jnp.asarray(rope_table(config, cache.length)).at[positions].get(mode="clip")
        delay = 0 if config.lanes is None else config.lanes.delay
        past: dict[Module, deque[jax.Array]] = {name: deque(maxlen=delay + 1) for name in ("attention", "mlp")}

        def mix(x: jax.Array, own: jax.Array, module: Module, layer: int) -> jax.Array:
            mixing = config.mixing(module, layer)
            past[module].append(own)
            arriving = None if mixing.source is None else past[module][mixing.source - layer - 1]
            return layers.mix(x, own, arriving, mixing.own_scale)

        embedded = jnp.asarray(self.embed[...])[tokens].astype(jnp.float32)
        x = jnp.broadcast_to(embedded, (config.num_lanes, *embedded.shape))
        streams, k, v = [x], cache.k, cache.v
        for index, layer in enumerate(self.layers):
            normed = layers.rms_norm(x, layer.attention_norm[...], config.norm_eps)
            own, (keys, values) = layer.attention(
                config, normed, (k[index], v[index]), positions, rope, config.sliding_windows[index]
            )
            k, v = k.at[index].set(keys), v.at[index].set(values)
            x = mix(x, own, "attention", index)
            normed = layers.rms_norm(x, layer.ffn_norm[...], config.norm_eps)
            x = mix(x, layer.feed_forward(normed), "mlp", index)
            streams.append(x)
        return streams, KVCache(k=k, v=v)

    def head(self, x: jax.Array) -> jax.Array:
        """Turns the residual streams after the last layer into logits.

        A prefill that needs only the next token calls this with ``streams[-1][:, -1:]`` and saves T - 1 rows.

        Args:
            x: float32 [lanes, T, H].

        Returns:
            float32 [T, V].
        """
        table = self.embed if self.config.tie_word_embeddings else self.lm_head
        return layers.logits(self.config, self.norm[...], table[...], x)

    def _checked_cache(self, tokens: jax.Array, cache: KVCache | None) -> KVCache:
        if tokens.ndim != 1:
            raise ValueError(f"tokens has shape {tokens.shape}, must be one sequence [T]; for a batch use jax.vmap")
        if cache is None:
            return KVCache.zeros(self.config, tokens.shape[0], self.embed.dtype)
        config = self.config
        expected = (config.num_layers, config.num_kv_heads, cache.length, config.head_dim)
        for name, array in (("k", cache.k), ("v", cache.v)):
            if array.shape != expected:
                raise ValueError(
                    f"cache.{name} has shape {array.shape}, this model needs {expected}; "
                    "make the cache with KVCache.zeros(config, length, dtype)"
                )
        return cache


def params(model: Transformer) -> Params:
    """The parameters of a model as the canonical tree; shares the arrays."""
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def abstract_params(config: ModelConfig, dtype: DTypeLike = jnp.float32) -> Params:
    """The canonical tree of a model with ``jax.ShapeDtypeStruct`` leaves; allocates nothing."""
    _, tree = _skeleton(config)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), tree)


@functools.lru_cache(maxsize=32)
def _skeleton(config: ModelConfig) -> tuple[nnx.GraphDef[Transformer], Params]:
    """The structure of a model and the shapes of its parameters; cached, because building modules is slow."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Transformer(config)))
    return graph, nnx.to_pure_dict(state)


def _check_shapes(given: Params, expected: Params) -> None:
    def shapes(tree: Params) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
        return {jax.tree_util.keystr(path): tuple(leaf.shape) for path, leaf in leaves}

    has, needs = shapes(given), shapes(expected)
    problems = [f"{path} is missing" for path in needs if path not in has]
    problems += [f"{path} is not part of this model" for path in has if path not in needs]
    problems += [
        f"{path} has shape {has[path]}, must be {needs[path]}"
        for path in needs
        if path in has and has[path] != needs[path]
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"params do not fit the configuration: {'; '.join(problems[:5])}{more}")
