"""The reference model in Flax: one jitted step per token, tokens stay on the device."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_mono.cli.flax_decoder import step
from peers.flax_params import make_cache, make_params
from peers.work import Work


class FlaxStep:
    def setup(self, work: Work) -> None:
        self.work, self.params, self.cache = work, make_params(work), make_cache(work)
        self.token = jnp.int32(1)
        self.tokens_per_s(3)

    def tokens_per_s(self, tokens: int) -> float:
        started = time.perf_counter()
        for position in self.work.positions(tokens):
            self.token, _, _, self.cache = step(
                self.work.config, self.params, self.cache, self.token, np.int32(position)
            )
        jax.block_until_ready((self.token, self.cache))
        return tokens / (time.perf_counter() - started)

    def about(self) -> dict[str, Any]:
        return {"jax_version": jax.__version__, "loop": "a jitted step per token, from Python"}
