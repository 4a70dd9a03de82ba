"""The reference model in Flax as a decoder: what the kernel is compared with, for its numbers and its speed."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jax_mono.config import ModelConfig
from jax_mono.decode import PREFILL_CHUNK, Finish
from jax_mono.models.source import OnTensor, Params, WeightSource, unflatten
from jax_mono.models.transformer import KVCache, Transformer
from jax_mono.stream import Token

FEW = 64
"""Up to here it is quicker to feed tokens one by one than to compile another program that takes many at once."""


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def step(
    config: ModelConfig, params: Params, cache: KVCache, token: jax.Array, position: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, KVCache]:
    """Feeds one token and takes the most likely next one.

    Args:
        config: The model.
        params: Its parameters.
        cache: Keys and values of the positions before; donated.
        token: int32 [].
        position: int32 [], where the token stands.

    Returns:
        The next token, its log-probability, the logits float32 [vocab], and the cache.
    """
    logits, cache = Transformer.from_params(config, params)(token[None], cache, position)
    logprobs = jax.nn.log_softmax(logits[0])
    best = jnp.argmax(logits[0]).astype(jnp.int32)
    return best, logprobs[best], logits[0], cache


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def _feed(config: ModelConfig, params: Params, cache: KVCache, tokens: jax.Array, start: jax.Array) -> KVCache:
    return Transformer.from_params(config, params).residual_streams(tokens, cache, start)[1]


@dataclass
class FlaxOutput:
    """A finished generation; the same names as in :class:`jax_mono.Output`."""

    tokens: list[int]
    logprobs: list[float]
    finish: Finish
    top: list[list[Token]]


class FlaxDecoder:
    """The reference model with all its parameters, one array each.

    Attributes:
        config: The model.
        params: The canonical tree of JAX arrays.
        context: Tokens that a conversation may have.
    """

    def __init__(self, config: ModelConfig, params: Params, context: int) -> None:
        """Wraps parameters.

        Args:
            config: The model.
            params: The canonical tree.
            context: Tokens that a conversation may have.
        """
        self.config, self.params, self.context = config, params, context

    @classmethod
    def from_source(
        cls, source: WeightSource, *, dtype: DTypeLike, context: int, on_tensor: OnTensor | None = None
    ) -> FlaxDecoder:
        """Reads a checkpoint.

        Args:
            source: The checkpoint.
            dtype: float32, bfloat16 or float16, of parameters and KV cache.
            context: Tokens that a conversation may have.
            on_tensor: Progress callback.

        Returns:
            The decoder.
        """
        arrays = {}
        for path in source.paths():
            arrays[path] = jnp.asarray(source.tensor(path, dtype))
            if on_tensor is not None:
                on_tensor(path, arrays[path].nbytes)
        return cls(source.config, unflatten(arrays), context)

    @property
    def dtype(self) -> jnp.dtype:
        """The weight dtype."""
        return self.params["embed"].dtype

    def new_cache(self) -> KVCache:
        """An empty cache."""
        return KVCache.zeros(self.config, self.context, self.dtype)

    def forward(self, tokens: Sequence[int]) -> tuple[np.ndarray, KVCache]:
        """Feeds tokens from position 0 on, one at a time.

        Many at a time would be faster and less exact: XLA's products of two matrices lose about twice as much to
        rounding as its products of a matrix and a vector.

        Args:
            tokens: At most ``context`` of them.

        Returns:
            Logits, float32 [T, vocab], and the cache; positions from T on hold nothing.

        Raises:
            ValueError: There are too many tokens.
        """
        if len(tokens) > self.context:
            raise ValueError(f"{len(tokens)} tokens are beyond the context of {self.context}")
        cache, rows = self.new_cache(), np.empty((len(tokens), self.config.vocab_size), np.float32)
        for position, token in enumerate(tokens):
            _, _, logits, cache = step(self.config, self.params, cache, np.int32(token), np.int32(position))
            rows[position] = logits
        return rows, cache

    def prefill(self, tokens: Sequence[int]) -> KVCache:
        """Feeds a prompt from position 0 on, the fastest way. Positions behind it may hold rubbish until they are fed.

        Args:
            tokens: At most ``context`` of them.

        Returns:
            The cache.
        """
        cache = self.new_cache()
        if len(tokens) <= FEW:
            for position, token in enumerate(tokens):
                *_, cache = step(self.config, self.params, cache, np.int32(token), np.int32(position))
            return cache
        for start in range(0, len(tokens), PREFILL_CHUNK):
            part = list(tokens[start : start + PREFILL_CHUNK])
            padded = np.asarray(part + [0] * (PREFILL_CHUNK - len(part)), np.int32)
            cache = _feed(self.config, self.params, cache, padded, np.int32(start))
        return cache

    def stream(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        stop: Sequence[int] = (),
        top_logprobs: int = 0,
        deadline: float | None = None,
    ) -> FlaxStream:
        """Generates greedily; arguments as for :meth:`jax_mono.Decoder.stream`."""
        ends = None if deadline is None else time.perf_counter() + deadline

        def late() -> bool:
            return ends is not None and time.perf_counter() > ends

        return FlaxStream(self, prompt, max_new_tokens, frozenset(stop), top_logprobs, late)


class FlaxStream(Iterator[Token]):
    """Yields one token per step; the same surface as :class:`jax_mono.TokenStream`."""

    def __init__(
        self,
        decoder: FlaxDecoder,
        prompt: Sequence[int],
        budget: int,
        stops: frozenset[int],
        top_n: int,
        late: Callable[[], bool],
    ) -> None:
        """Feeds the prompt without its last token.

        Args:
            decoder: The model.
            prompt: Token ids, at least one.
            budget: Tokens to generate at most.
            stops: Tokens that end the generation.
            top_n: Alternatives to report per token.
            late: Says whether the deadline has passed.
        """
        self._decoder, self._budget, self._stops, self._top_n, self._late = decoder, budget, stops, top_n, late
        self._position = len(prompt) - 1
        self._cache = decoder.prefill(prompt[:-1])
        self._token = jnp.int32(prompt[-1])
        self._output = FlaxOutput([], [], Finish.LENGTH, [])
        self._ended = False

    def __next__(self) -> Token:
        """Runs one step.

        Raises:
            StopIteration: The generation has ended.
        """
        if self._ended:
            raise StopIteration
        decoder, output = self._decoder, self._output
        best, logprob, logits, self._cache = step(
            decoder.config, decoder.params, self._cache, self._token, np.int32(self._position)
        )
        self._token, self._position = best, self._position + 1
        token = Token(int(best), float(logprob))
        output.tokens.append(token.id)
        output.logprobs.append(token.logprob)
        if self._top_n:
            shift = token.logprob - float(logits[best])
            likeliest = np.argsort(-np.asarray(logits), kind="stable")[: self._top_n].tolist()
            output.top.append([Token(index, float(logits[index]) + shift) for index in likeliest])
        if token.id in self._stops:
            self._end(Finish.STOP)
        elif len(output.tokens) >= self._budget:
            self._end(Finish.LENGTH)
        elif self._late():
            self._end(Finish.DEADLINE)
        return token

    def _end(self, finish: Finish) -> None:
        self._ended, self._output.finish = True, finish

    def cancel(self) -> None:
        """Ends the generation with the tokens so far."""
        if not self._ended:
            self._end(Finish.CANCELLED)

    def result(self) -> FlaxOutput:
        """Runs to the end and returns all tokens."""
        for _ in self:
            pass
        return self._output

    def __enter__(self) -> FlaxStream:
        """Returns itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Ends the generation."""
        self.cancel()
