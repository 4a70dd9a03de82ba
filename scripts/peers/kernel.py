"""Our own: the resident program."""

from __future__ import annotations

from typing import Any

from jax_mono.cli import machine
from jax_mono.cli.bench_runs import timed_run
from jax_mono.decoder import Decoder
from jax_mono.limit import bytes_per_token
from jax_mono.models.random_source import RandomSource
from jax_mono.packing import home
from jax_mono.random_cache import random_cache
from peers.work import Work


def make_decoder(work: Work) -> Decoder:
    mesh = machine.device_mesh(work.devices) if work.devices > 1 else None
    options: dict[str, Any] = {"dtype": work.dtype, "blocks": work.blocks, "context": work.context, "mesh": mesh}
    if home().platform == "cpu":  # packed into huge pages
        return Decoder.from_source(RandomSource(work.config, work.seed), **options)
    return Decoder.random(work.config, seed=work.seed, **options)


class Kernel:
    def setup(self, work: Work) -> None:
        self.work, self.decoder = work, make_decoder(work)
        self._decode(4)

    def tokens_per_s(self, tokens: int) -> float:
        return self._decode(tokens)

    def _decode(self, tokens: int) -> float:
        # The first of the tokens answers the prompt, one token, and is not counted.
        cache = random_cache(self.decoder, max(0, self.work.position - 1))
        return timed_run(self.decoder, [1], tokens, cache=cache, padded=True).tokens_per_s

    def about(self) -> dict[str, Any]:
        plan = self.decoder.plan
        per_token = bytes_per_token(plan, self.decoder.tapes)
        return {
            "plan_devices": plan.num_devices,
            "blocks": plan.num_blocks,
            "compressed": plan.tile.compressed,
            "variant": machine.variant(),
            "bytes_per_token": per_token,
        }
