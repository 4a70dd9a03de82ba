"""The decoder object: a model packed for this machine, with checks, buckets and streaming around ``generate``."""

from __future__ import annotations

import functools
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jax_mono import gpus
from jax_mono.call import LostHandoff
from jax_mono.config import ModelConfig
from jax_mono.cut import plans_for
from jax_mono.decode import Cache, empty_cache
from jax_mono.decode import generate as pure_generate
from jax_mono.decode import score as pure_score
from jax_mono.granules import check_alignment
from jax_mono.models.source import OnTensor, WeightSource
from jax_mono.output import Output, Scores, alternatives, output_of
from jax_mono.packing import IncompressibleError, home, mesh_devices, pack
from jax_mono.plan import Plan
from jax_mono.prefill import AXIS
from jax_mono.random_tapes import random_tapes
from jax_mono.sampling import GREEDY, Sampling
from jax_mono.stream import TokenStream
from jax_mono.tape import Tapes
from jax_mono.tokenizer import Tokenizer

SMALLEST_BUCKET = 16
"""Prompts and outputs are padded to powers of two from here, so few shapes are ever compiled."""

_generate = jax.jit(
    pure_generate,
    static_argnames=("plan", "room", "top_n", "mesh", "lost"),
    donate_argnames="cache",
)
_score = jax.jit(pure_score, static_argnames=("plan", "logits", "top_n", "mesh", "lost"))


class Decoder:
    """A model packed for this machine.

    Attributes:
        plan: Who owns what.
        tapes: The weights, as ordinary (possibly sharded) arrays.
        context: Tokens that a conversation may have.
        tokenizer: Text in and out, or None.
        mesh: The devices of the per-device form, or None for lane threads.
    """

    def __init__(
        self,
        plan: Plan,
        tapes: Tapes,
        *,
        context: int | None = None,
        tokenizer: Tokenizer | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        """Wraps packed weights; see :func:`jax_mono.load` for the usual way.

        Args:
            plan: The plan.
            tapes: Its tapes.
            context: Tokens that a conversation may have; None takes the model's longest context.
            tokenizer: For prompts given as text.
            mesh: The mesh that the tapes are sharded over, if they are.

        Raises:
            ValueError: The context is longer than the model's.
        """
        longest = plan.config.max_position_embeddings
        context = longest if context is None else context
        if not 1 <= context <= longest:
            raise ValueError(f"context is {context}, must be between 1 and the model's {longest}")
        if mesh is not None:
            mesh_devices(mesh, plan.num_devices)
        check_alignment(plan, [tapes.layers, tapes.head])
        self.plan, self.tapes, self.context, self.tokenizer, self.mesh = plan, tapes, context, tokenizer, mesh

    @classmethod
    def from_source(
        cls,
        source: WeightSource,
        *,
        dtype: DTypeLike = jnp.bfloat16,
        devices: int | None = None,
        blocks: int | None = None,
        context: int | None = None,
        tokenizer: Tokenizer | None = None,
        mesh: Mesh | None = None,
        compress: bool | None = None,
        on_tensor: OnTensor | None = None,
    ) -> Decoder:
        """Plans and packs a checkpoint.

        Args:
            source: The checkpoint.
            dtype: Of weights and KV cache: bfloat16 anywhere, float32 on the CPU, float16 on GPUs.
            devices: Devices that share the model. Without a mesh they are logical: groups of threads of one call on
                the CPU, groups of blocks of one GPU. None takes what is best there; see ``jax_mono/cut.py``.
            blocks: Blocks per device; None takes this process's cores or the GPU's multiprocessors, as far as the model
                has work for them.
            context: See :class:`Decoder`.
            tokenizer: See :class:`Decoder`.
            mesh: A 1-D mesh with axis ``devices`` for one call per JAX device; ``devices`` is then a multiple of its
                size, and None takes what is best there. Without one, all runs on JAX's default device.
            compress: Whether bfloat16 weights take 12 bits each on the tapes, without loss; see
                :mod:`jax_mono.compression`. None compresses where that is faster and these weights allow it; if they
                turn out not to, they are read twice.
            on_tensor: Progress callback.

        Returns:
            The decoder.

        Raises:
            ConfigError: The model cannot be cut like this, does not run with such weights there, or not compressed.
            CheckpointError: The checkpoint cannot be read.
            NativeError: There is no program for this GPU.
        """
        device = home() if mesh is None else mesh.devices.flat[0]
        gpus.check(device, dtype)
        cut = {"devices": devices, "blocks": blocks, "mesh": mesh}
        for plan in plans_for(source.config, device, dtype, **cut, compress=compress):
            try:
                tapes = pack(plan, source, dtype=dtype, mesh=mesh, on_tensor=on_tensor)
                break
            except IncompressibleError:
                if compress:
                    raise
        return cls(plan, tapes, context=context, tokenizer=tokenizer, mesh=mesh)

    @classmethod
    def random(
        cls,
        config: ModelConfig,
        *,
        dtype: DTypeLike = jnp.bfloat16,
        devices: int | None = None,
        blocks: int | None = None,
        context: int | None = None,
        mesh: Mesh | None = None,
        compress: bool | None = None,
        seed: int = 0,
    ) -> Decoder:
        """Plans a model and draws its weights where they will be, which takes moments; for measuring speed.

        Args:
            config: The model.
            seed: Of the weights.
            dtype: See :meth:`from_source`, also for the others.
            devices: As there.
            blocks: As there.
            context: As there.
            mesh: As there.
            compress: As there.

        Returns:
            The decoder.

        Raises:
            ConfigError: The model cannot be cut like this, or does not run with such weights there.
            NativeError: There is no program for this GPU.
        """
        device = home() if mesh is None else mesh.devices.flat[0]
        gpus.check(device, dtype)
        cut = {"devices": devices, "blocks": blocks, "mesh": mesh}
        plan = next(plans_for(config, device, dtype, **cut, compress=compress))
        return cls(plan, random_tapes(plan, dtype=dtype, mesh=mesh, seed=seed), context=context, mesh=mesh)

    def new_cache(self) -> Cache:
        """An empty conversation."""
        return self._make_cache()

    @functools.cached_property
    def _make_cache(self) -> Callable[[], Cache]:
        """Committed to where the tapes are, like the caches that calls return: else a second turn compiles anew."""
        make = functools.partial(empty_cache, self.plan, self.context, self.tapes.dtype)
        if self.mesh is None:
            return jax.jit(make, out_shardings=self.tapes.layers.sharding)
        cut, whole = NamedSharding(self.mesh, P(AXIS)), NamedSharding(self.mesh, P())
        return jax.jit(make, out_shardings=Cache(cut, cut, whole, whole, whole))

    def generate(self, prompt: str | Sequence[int], **options: object) -> Output:
        """Generates to the end; takes the arguments of :meth:`stream`. Ctrl-C stops the call."""
        with self.stream(prompt, **options) as stream:  # type: ignore[arg-type]
            return stream.result()

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int | None = None,
        sampling: Sampling = GREEDY,
        seed: int | None = None,
        stop: Sequence[int] | None = None,
        top_logprobs: int = 0,
        cache: Cache | None = None,
        deadline: float | None = None,
        padded: bool = False,
        lost: LostHandoff | None = None,
    ) -> TokenStream[Output]:
        """Generates and yields tokens while the call runs.

        Args:
            prompt: Text (needs a tokenizer), or token ids. With a cache: only what is new.
            max_new_tokens: At most this many; None generates until the context is full.
            sampling: How to draw tokens.
            seed: Of the random numbers; None draws one.
            stop: Tokens that end the generation; None takes the model's, an empty list none.
            top_logprobs: Alternatives to report per token.
            cache: A conversation to continue, from an earlier :class:`Output`. It is consumed: donated to the call.
            deadline: Seconds after which the call ends with what it has.
            padded: Whether to pad prompt and outputs to the whole context: all lengths then share one compiled
                program, and a prompt too long for the resident program takes at least a full chunk of prefill.
            lost: Fault injection for tests.

        Returns:
            The stream; its ``result()`` is an :class:`Output`.

        Raises:
            ValueError: A token, an option or a length makes no sense; nothing was launched.
        """
        started = time.perf_counter()
        tokens = self._tokens(prompt)
        if cache is not None and cache.k.is_deleted():
            raise ValueError("this cache was consumed by an earlier call; use the one in that call's output")
        used = 0 if cache is None else int(cache.end)
        budget = self._budget(len(tokens), used, max_new_tokens)
        sampling.check()
        if not 0 <= top_logprobs <= self.plan.config.vocab_size:
            raise ValueError(f"top_logprobs is {top_logprobs}, must be between 0 and the vocabulary's size")
        if deadline is not None and deadline <= 0:
            raise ValueError(f"deadline is {deadline} s, must be positive")
        stops = self.plan.config.eos_token_ids if stop is None else tuple(stop)
        self._check_tokens(stops, "stop token")
        if cache is None:
            cache = self.new_cache()
        padded_stops = _padded(stops, -1, _bucket(len(stops), 8))
        smallest = self.context if padded else SMALLEST_BUCKET
        room = min(_bucket(budget, smallest), self.context)
        launch = functools.partial(
            _generate,
            self.plan,
            self.tapes,
            cache,
            _padded(tokens, 0, _bucket(len(tokens), smallest)),
            _key(secrets.randbits(64) if seed is None else seed),
            room=room,
            length=len(tokens),
            budget=budget,
            sampling=_as_arrays(sampling),
            stops=padded_stops,
            top_n=top_logprobs,
            mesh=self.mesh,
            lost=lost,
        )

        def run(session: int) -> Output:
            generation = jax.block_until_ready(launch(session=session))
            return output_of(generation, time.perf_counter() - started)

        return TokenStream(run, budget, deadline)

    def score(self, tokens: str | Sequence[int], **options: object) -> Scores:
        """Scores to the end; takes the arguments of :meth:`score_stream`. Ctrl-C stops the call."""
        with self.score_stream(tokens, **options) as stream:  # type: ignore[arg-type]
            return stream.result()

    def score_stream(
        self,
        tokens: str | Sequence[int],
        *,
        logits: bool = False,
        top_logprobs: int = 0,
        deadline: float | None = None,
        padded: bool = False,
        lost: LostHandoff | None = None,
    ) -> TokenStream[Scores]:
        """Feeds given tokens through the resident program and reports how likely they were.

        Args:
            tokens: Text or token ids, at least two.
            logits: Whether to return all logits.
            top_logprobs: Alternatives to report per position.
            deadline: Seconds after which the call ends early.
            padded: Whether to pad the tokens to the whole context, so that all lengths share one compiled program.
            lost: Fault injection for tests.

        Returns:
            A stream that yields one token per position; its ``result()`` is a :class:`Scores`. If it yields fewer, the
            call ended early, and the scores from there on mean nothing.

        Raises:
            ValueError: A token is outside the vocabulary, or there are too few or too many of them.
        """
        ids = self._tokens(tokens)
        if not 2 <= len(ids) <= self.context:
            raise ValueError(f"{len(ids)} tokens to score, must be between 2 and the context of {self.context}")
        launch = functools.partial(
            _score,
            self.plan,
            self.tapes,
            _padded(ids, 0, self.context if padded else len(ids)),
            length=len(ids),
            logits=logits,
            top_n=top_logprobs,
            mesh=self.mesh,
            lost=lost,
        )

        def run(session: int) -> Scores:
            all_logits, logprobs, top_ids, top_logits = jax.block_until_ready(launch(session=session))
            return Scores(
                logprobs=np.asarray(logprobs)[: len(ids) - 1],
                logits=np.asarray(all_logits)[: len(ids)] if logits else None,
                top=alternatives(top_ids, top_logits, len(ids)),
            )

        return TokenStream(run, len(ids), deadline)

    def _tokens(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("this decoder has no tokenizer; pass token ids, or load a checkpoint with one")
            prompt = self.tokenizer.encode(prompt)
        tokens = [int(token) for token in prompt]
        self._check_tokens(tokens, "token")
        return tokens

    def _check_tokens(self, tokens: Sequence[int], what: str) -> None:
        vocab = self.plan.config.vocab_size
        for index, token in enumerate(tokens):
            if not 0 <= token < vocab:
                raise ValueError(f"{what} {token} at index {index} is outside the vocabulary of {vocab}")

    def _budget(self, new: int, used: int, wanted: int | None) -> int:
        if new + used == 0:
            raise ValueError("the prompt is empty; it needs at least one token")
        left = self.context - used - new
        if wanted is None:
            wanted = left
        if wanted < 1 and wanted != left:
            raise ValueError(f"max_new_tokens is {wanted}, must be at least 1")
        if left < max(1, wanted):
            before = f"{used} tokens so far + " if used else ""
            raise ValueError(
                f"{before}{new} prompt tokens + {max(1, wanted)} new tokens are beyond the context of {self.context}; "
                "shorten the prompt, ask for fewer tokens or load with a longer context"
            )
        return wanted


def _bucket(length: int, smallest: int) -> int:
    return max(smallest, 1 << (length - 1).bit_length()) if length else smallest


def _padded(values: Sequence[int], filler: int, length: int) -> np.ndarray:
    return np.asarray([*values, *[filler] * (length - len(values))], np.int32)


def _key(seed: int) -> np.ndarray:
    """A raw key of 64 bits; ``jax.random.key`` would drop the upper half."""
    return np.array([seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32)


def _as_arrays(sampling: Sampling) -> Sampling:
    """Fixed dtypes, so that a whole number is not a new type to compile for."""
    top_k = np.int32(min(sampling.top_k, np.iinfo(np.int32).max))
    return replace(jax.tree.map(np.float32, sampling), top_k=top_k)
