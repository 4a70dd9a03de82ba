"""The limit: the same weights, read where they are by the same blocks, without arithmetic."""

from __future__ import annotations

from typing import Any

from jax_mono.cli.bench_runs import Limit, measure_limit
from jax_mono.limit import bytes_per_token
from peers.kernel import make_decoder
from peers.work import Work


class MemoryLimit:
    def setup(self, work: Work) -> None:
        self.decoder = make_decoder(work)
        self.last: Limit = measure_limit(self.decoder)

    def tokens_per_s(self, tokens: int) -> float:
        self.last = measure_limit(self.decoder)
        return self.last.bytes_per_s / bytes_per_token(self.decoder.plan, self.decoder.tapes)

    def about(self) -> dict[str, Any]:
        return {"limit": self.last.name, "bytes_per_s": self.last.bytes_per_s}
