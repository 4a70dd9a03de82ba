"""The reference model in Flax: the whole token loop in one jitted function."""

from __future__ import annotations

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_mono.cli.flax_decoder import step
from jax_mono.config import ModelConfig
from jax_mono.models.source import Params
from jax_mono.models.transformer import KVCache
from peers.flax_params import make_cache, make_params
from peers.work import Work


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def generate(
    config: ModelConfig, params: Params, cache: KVCache, token: jax.Array, start: jax.Array, count: jax.Array
) -> tuple[jax.Array, KVCache]:
    def one(index: jax.Array, state: tuple[jax.Array, KVCache]) -> tuple[jax.Array, KVCache]:
        token, _, _, cache = step(config, params, state[1], state[0], start + index)
        return token, cache

    return jax.lax.fori_loop(0, count, one, (token, cache))


class FlaxLoop:
    def setup(self, work: Work) -> None:
        self.work, self.params, self.cache = work, make_params(work), make_cache(work)
        self.token = jnp.int32(1)
        for _ in range(2):  # the first call may return its cache cut differently, and the second compile for that
            self.tokens_per_s(3)

    def tokens_per_s(self, tokens: int) -> float:
        started = time.perf_counter()
        start = np.int32(self.work.positions(tokens).start)
        self.token, self.cache = jax.block_until_ready(
            generate(self.work.config, self.params, self.cache, self.token, start, np.int32(tokens))
        )
        return tokens / (time.perf_counter() - started)

    def about(self) -> dict[str, Any]:
        return {"jax_version": jax.__version__, "loop": "lax.fori_loop in one jitted function"}
