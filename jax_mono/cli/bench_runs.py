"""What ``jax-mono bench`` measures: runs, and the limit before and after each of them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jax_mono import limit

if TYPE_CHECKING:
    from jax_mono.decode import Cache
    from jax_mono.decoder import Decoder


@dataclass(frozen=True)
class Timing:
    """One run.

    Attributes:
        arrivals: Seconds from the call to each token.
    """

    arrivals: tuple[float, ...]

    @property
    def tokens_per_s(self) -> float:
        """Speed between the first token and the last."""
        return (len(self.arrivals) - 1) / (self.arrivals[-1] - self.arrivals[0])

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens."""
        return [after - before for before, after in itertools.pairwise(self.arrivals)]


def timed_run(
    decoder: Decoder, tokens: Sequence[int], new_tokens: int, *, cache: Cache | None = None, padded: bool = False
) -> Timing:
    """Generates and notes when each token arrives on the host; arguments as for :meth:`jax_mono.Decoder.stream`."""
    started = time.perf_counter()
    with decoder.stream(tokens, max_new_tokens=new_tokens, stop=[], cache=cache, padded=padded) as stream:
        arrivals = tuple(time.perf_counter() - started for _ in stream)
        stream.result()
    return Timing(arrivals)


@dataclass(frozen=True)
class Limit:
    """One look at what the memory allows.

    Attributes:
        name: ``read_bandwidth`` on a CPU, ``stream_limit`` on GPUs.
        ways: Bytes of weights per second by way of reading; the best of them counts.
    """

    name: str
    ways: dict[str, float]

    @property
    def bytes_per_s(self) -> float:
        """The best way's."""
        return max(self.ways.values())


def measure_limit(decoder: Decoder) -> Limit:
    """Measures how fast the tapes of a decoder can be read where they are."""
    plan, tapes = decoder.plan, decoder.tapes
    if next(iter(tapes.layers.devices())).platform == "cpu":
        found = limit.read_bandwidth(plan, tapes)
        return Limit("read_bandwidth", {f"{streams}_streams": rate for streams, rate in found.items()})
    seconds = limit.stream_seconds(plan, tapes, mesh=decoder.mesh)
    return Limit("stream_limit", {"resident": limit.bytes_per_token(plan, tapes) / seconds})


def speed(timings: Sequence[Timing], prompt_tokens: int) -> dict[str, Any]:
    """Sums up runs: medians, extremes, and percentiles of the time between tokens over all runs."""
    speeds = [timing.tokens_per_s for timing in timings]
    gaps = np.concatenate([timing.gaps for timing in timings])
    first = float(np.median([timing.arrivals[0] for timing in timings]))
    return {
        "tokens_per_s": float(np.median(speeds)),
        "tokens_per_s_min": min(speeds),
        "tokens_per_s_max": max(speeds),
        "inter_token_p50_s": float(np.percentile(gaps, 50)),
        "inter_token_p99_s": float(np.percentile(gaps, 99)),
        "first_token_s": first,
        "prefill_tokens_per_s": prompt_tokens / first,
    }


def against_limit(per_token: int, limits: Sequence[Limit], timings: Sequence[Timing]) -> dict[str, Any]:
    """Compares each run with the better of the limits before and after it.

    Args:
        per_token: Bytes of weights that a token reads.
        limits: One more than there are runs.
        timings: The runs.
    """
    name = limits[0].name
    best = [found.bytes_per_s for found in limits]
    beside = [max(pair) for pair in itertools.pairwise(best)]
    rates = [timing.tokens_per_s * per_token for timing in timings]
    fractions = [rate / most for rate, most in zip(rates, beside, strict=True)]
    ways = limits[0].ways if len(limits[0].ways) > 1 else ()
    return {
        "bytes_per_token": per_token,
        "decode_bytes_per_s": float(np.median(rates)),
        "limit": name,
        f"{name}_bytes_per_s": float(np.median(beside)),
        f"{name}_min_bytes_per_s": min(best),
        f"{name}_max_bytes_per_s": max(best),
        **{f"{name}_{way}_bytes_per_s": max(found.ways[way] for found in limits) for way in ways},
        "limit_tokens_per_s": float(np.median(beside)) / per_token,
        f"fraction_of_{name}": float(np.median(fractions)),
        f"fraction_of_{name}_min": min(fractions),
        f"fraction_of_{name}_max": max(fractions),
    }
