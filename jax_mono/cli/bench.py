"""``jax-mono bench``: tokens per second, beside what the memory of this machine allows."""

from __future__ import annotations

import argparse
import datetime
import gc
import itertools
import resource
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jax_mono import settings
from jax_mono.cli import options
from jax_mono.cli.console import note, print_json

if TYPE_CHECKING:
    from jax_mono.decoder import Decoder
    from jax_mono.models.source import WeightSource

_DESCRIPTION = """\
Measures decoding of one sequence. Every token reads all weights once, so the time to beat is their size over the
bandwidth with which this machine reads memory. Others may share that, so it is measured before and after every run, by
the same number of threads on the very arrays that hold the weights, and each run is compared with the better of the
two.

  jax-mono bench --model laneformer-2b --random-weights
  jax-mono bench --model DIR --dtype float32 --new-tokens 128 --json
  jax-mono bench --model smollm2-135m --random-weights --baseline flax

--baseline flax also times a token loop around one jitted step of the reference model, with a donated cache, in the
same run: as many tokens as the kernel's runs have, but no longer than --baseline-seconds, and at least 3. Peak memory
is read before that starts, and the kernel's weights are freed.
"""

_STREAMS = (1, 2, 4, 8)
_GB = 1e9
_FEWEST = 3
"""Tokens of the baseline that are timed in any case."""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Declares the command."""
    parser = options.command(subparsers, "bench", run, "measure decoding against memory bandwidth", _DESCRIPTION)
    model = parser.add_argument_group("model")
    options.add_model_options(model)
    model.add_argument("--seed", metavar="N", type=options.natural, default=0, help="of random weights and prompt")
    options.add_dtype_option(model)
    options.add_shape_options(model)
    model.add_argument(
        "--context", metavar="N", type=options.count, help="tokens to make room for; prompt and new tokens if absent"
    )
    work = parser.add_argument_group("work")
    work.add_argument("--prompt-tokens", metavar="N", type=options.count, default=32, help="length of the prompt")
    work.add_argument("--new-tokens", metavar="N", type=options.count, default=64, help="tokens per run, at least 2")
    work.add_argument("--runs", metavar="N", type=options.count, default=5, help="runs after a first one that compiles")
    work.add_argument("--baseline", choices=("flax",), help="also measure the reference model")
    work.add_argument(
        "--baseline-seconds", metavar="S", type=options.seconds, default=60.0,
        help="time limit of the baseline, after its first token has compiled",
    )  # fmt: skip
    work.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


@dataclass(frozen=True)
class _Timing:
    """One run: seconds from the call to each token."""

    arrivals: tuple[float, ...]

    @property
    def tokens_per_s(self) -> float:
        return (len(self.arrivals) - 1) / (self.arrivals[-1] - self.arrivals[0])

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in itertools.pairwise(self.arrivals)]


def run(arguments: argparse.Namespace) -> int:
    """Measures."""
    import numpy as np

    from jax_mono.cli.machine import set_up_jax
    from jax_mono.cli.models import open_model, pack_decoder
    from jax_mono.config import ConfigError
    from jax_mono.packing import home

    if arguments.new_tokens < 2:
        raise ValueError("--new-tokens must be at least 2: speed is measured between tokens")
    set_up_jax(arguments.form, arguments.devices)
    if home().platform != "cpu":
        raise ConfigError(
            "bench compares with the read bandwidth of CPUs and cannot measure GPUs; set JAX_PLATFORMS=cpu"
        )
    source = open_model(arguments)
    config = source.config
    needed = arguments.prompt_tokens + arguments.new_tokens
    context = arguments.context or needed
    if not needed <= context <= config.max_position_embeddings:
        raise ValueError(
            f"{arguments.prompt_tokens} prompt tokens and {arguments.new_tokens} new ones need a context from {needed} "
            f"to the model's {config.max_position_embeddings}, not {context}"
        )
    rss_before = _peak_rss()
    started = time.perf_counter()
    decoder = pack_decoder(source, arguments, devices=arguments.devices, form=arguments.form, context=context)
    pack_s = time.perf_counter() - started
    tokens = np.random.default_rng(arguments.seed).integers(0, config.vocab_size, arguments.prompt_tokens).tolist()

    first = _kernel_run(decoder, tokens, arguments.new_tokens)
    bandwidths, timings = [_bandwidth(decoder)], []
    for _ in range(arguments.runs):
        timings.append(_kernel_run(decoder, tokens, arguments.new_tokens))
        bandwidths.append(_bandwidth(decoder))
    record = _about(arguments, decoder, context)
    record |= {"pack_s": pack_s, "first_call_s": first.arrivals[-1]}
    record |= _speed(timings)
    record |= _against_bandwidth(decoder, bandwidths, timings)
    record |= _memory(decoder, rss_before)
    if arguments.baseline:
        del decoder  # a large model does not fit into memory twice
        gc.collect()  # only now JAX lets go of the memory that packing made
        record |= _baseline(arguments, source, tokens, context, record["tokens_per_s"])
    if arguments.json:
        print_json(record)
    else:
        _print(record)
    return 0


def _kernel_run(decoder: Decoder, tokens: Sequence[int], new_tokens: int) -> _Timing:
    started = time.perf_counter()
    with decoder.stream(tokens, max_new_tokens=new_tokens, stop=[]) as stream:
        arrivals = tuple(time.perf_counter() - started for _ in stream)
        stream.result()
    return _Timing(arrivals)


def _bandwidth(decoder: Decoder, repeats: int = 5) -> dict[int, float]:
    """Bytes per second by number of streams per thread, median of a few passes: decoding is no lucky moment either.

    With a mesh all threads read the first device's tapes, which are as large as the others'.
    """
    from jax_mono import native

    threads = decoder.plan.num_devices * decoder.plan.num_blocks
    layers = decoder.tapes.layers.addressable_shards[0].data
    return {
        streams: statistics.median(native.read_bandwidth(layers, threads, streams) for _ in range(repeats))
        for streams in _STREAMS
    }


def _about(arguments: argparse.Namespace, decoder: Decoder, context: int) -> dict[str, Any]:
    from jax_mono import native
    from jax_mono.cli import machine

    found = machine.versions()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": arguments.model,
        "weights": "random" if arguments.random_weights else "checkpoint",
        "parameters": decoder.plan.config.num_parameters,
        "dtype": arguments.dtype,
        "batch": 1,
        "context": context,
        "prompt_tokens": arguments.prompt_tokens,
        "new_tokens": arguments.new_tokens,
        "runs": arguments.runs,
        "devices": decoder.plan.num_devices,
        "blocks": decoder.plan.num_blocks,
        "form": arguments.form,
        "variant": native.cpu_variant(),
        "cpu": machine.cpu_model(),
        "cores": settings.cores(),
        "memory_bytes": machine.memory()[0],
        "huge_pages": machine.huge_pages(),
        **{f"{name.replace('-', '_')}_version": version for name, version in found.items()},
    }


def _speed(timings: Sequence[_Timing]) -> dict[str, Any]:
    import numpy as np

    speeds = [timing.tokens_per_s for timing in timings]
    gaps = np.concatenate([timing.gaps for timing in timings])
    return {
        "tokens_per_s": float(np.median(speeds)),
        "tokens_per_s_min": min(speeds),
        "tokens_per_s_max": max(speeds),
        "inter_token_p50_s": float(np.percentile(gaps, 50)),
        "inter_token_p99_s": float(np.percentile(gaps, 99)),
        "first_token_s": float(np.median([timing.arrivals[0] for timing in timings])),
    }


def _against_bandwidth(
    decoder: Decoder, bandwidths: Sequence[dict[int, float]], timings: Sequence[_Timing]
) -> dict[str, Any]:
    """Compares runs with the bandwidth; there is one more measurement of it than there are runs."""
    import numpy as np

    plan = decoder.plan
    words = sum(
        plan.block_words(device, block) for device in range(plan.num_devices) for block in range(plan.num_blocks)
    )
    bytes_per_token = words * decoder.tapes.dtype.itemsize
    best = [max(by_streams.values()) for by_streams in bandwidths]
    beside = [max(pair) for pair in itertools.pairwise(best)]
    rates = [timing.tokens_per_s * bytes_per_token for timing in timings]
    fractions = [rate / limit for rate, limit in zip(rates, beside, strict=True)]
    return {
        "bytes_per_token": bytes_per_token,
        "decode_bytes_per_s": float(np.median(rates)),
        "read_bandwidth_bytes_per_s": float(np.median(beside)),
        "read_bandwidth_min_bytes_per_s": min(best),
        "read_bandwidth_max_bytes_per_s": max(best),
        **{
            f"read_bandwidth_{streams}_streams_bytes_per_s": max(by_streams[streams] for by_streams in bandwidths)
            for streams in _STREAMS
        },
        "limit_tokens_per_s": float(np.median(beside)) / bytes_per_token,
        "fraction_of_read_bandwidth": float(np.median(fractions)),
        "fraction_of_read_bandwidth_min": min(fractions),
        "fraction_of_read_bandwidth_max": max(fractions),
    }


def _memory(decoder: Decoder, rss_before: int) -> dict[str, Any]:
    cache = decoder.new_cache()
    return {
        "weight_bytes": decoder.tapes.nbytes,
        "kv_cache_bytes": cache.k.nbytes + cache.v.nbytes,
        "rss_before_packing_bytes": rss_before,
        "peak_rss_bytes": _peak_rss(),
    }


def _peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def _baseline(
    arguments: argparse.Namespace, source: WeightSource, tokens: Sequence[int], context: int, speed: float
) -> dict[str, Any]:
    """Times the reference model's token loop, token by token. Tokens stay on the device.

    Its steps attend to the whole cache, whatever is in it. So the prompt, which could take minutes, is not fed, and
    steps stand where the kernel's stand.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jax_mono.cli.flax_decoder import FlaxDecoder, step
    from jax_mono.cli.models import as_dtype

    note("measuring the Flax token loop", quiet=arguments.quiet)
    decoder = FlaxDecoder.from_source(source, dtype=as_dtype(arguments.dtype), context=context)
    cache, token = decoder.new_cache(), jnp.int32(tokens[-1])
    arrivals: list[float] = []  # the first step compiles
    while not _enough(arrivals, arguments):
        position = len(tokens) - 1 + len(arrivals) % arguments.new_tokens
        token, _, _, cache = step(source.config, decoder.params, cache, token, np.int32(position))
        jax.block_until_ready((token, cache))
        arrivals.append(time.perf_counter())
    gaps = _Timing(tuple(arrivals)).gaps
    found = 1.0 / float(np.median(gaps))
    return {
        "baseline": "flax",
        "baseline_tokens": len(gaps),
        "baseline_tokens_per_s": found,
        "baseline_tokens_per_s_min": 1.0 / max(gaps),
        "baseline_tokens_per_s_max": 1.0 / min(gaps),
        "peak_rss_with_baseline_bytes": _peak_rss(),
        "times_baseline": speed / found,
    }


def _enough(arrivals: Sequence[float], arguments: argparse.Namespace) -> bool:
    """Whether the baseline has been measured, given when its tokens arrived; the first one is not counted."""
    timed = len(arrivals) - 1
    if timed < _FEWEST:
        return False
    late = arrivals[-1] - arrivals[0] >= arguments.baseline_seconds
    return late or timed >= arguments.new_tokens * arguments.runs


def _print(record: dict[str, Any]) -> None:
    def gb(name: str) -> str:
        return f"{record[name] / _GB:.2f} GB"

    where = f"{record['devices']} x {record['blocks']} blocks ({record['variant']}) on {record['cpu']}"
    lines = {
        "model": f"{record['model']}, {record['parameters']:,} parameters, {record['dtype']}, "
        f"{record['weights']} weights",
        "machine": f"{where}, {record['cores']} cores, huge pages {record['huge_pages'] or 'unknown'}",
        "work": f"batch 1, {record['prompt_tokens']} prompt tokens, {record['new_tokens']} new, {record['runs']} runs",
        "speed": f"{record['tokens_per_s']:.2f} tokens/s (median; {record['tokens_per_s_min']:.2f} to "
        f"{record['tokens_per_s_max']:.2f})",
        "latency": f"{1e3 * record['inter_token_p50_s']:.2f} ms between tokens (p99 "
        f"{1e3 * record['inter_token_p99_s']:.2f} ms), first token after {record['first_token_s']:.3f} s",
        "stream": f"{gb('bytes_per_token')} per token, {gb('decode_bytes_per_s')}/s",
        "limit": f"{record['limit_tokens_per_s']:.2f} tokens/s at {gb('read_bandwidth_bytes_per_s')}/s read before or "
        f"after a run (median; {gb('read_bandwidth_min_bytes_per_s')}/s to {gb('read_bandwidth_max_bytes_per_s')}/s)",
        "reached": f"{record['fraction_of_read_bandwidth']:.0%} of the bandwidth around each run (median; "
        f"{record['fraction_of_read_bandwidth_min']:.0%} to {record['fraction_of_read_bandwidth_max']:.0%})",
        "memory": f"{gb('weight_bytes')} weights + {gb('kv_cache_bytes')} KV cache; peak {gb('peak_rss_bytes')}, "
        f"{gb('rss_before_packing_bytes')} of it before packing",
        "times": f"packing {record['pack_s']:.1f} s, first call with compiling {record['first_call_s']:.1f} s",
    }
    if "baseline" in record:
        lines["baseline"] = (
            f"{record['baseline_tokens_per_s']:.2f} tokens/s with a jitted Flax step (median of "
            f"{record['baseline_tokens']} tokens); the kernel is {record['times_baseline']:.2f} times as fast"
        )
    for name, text in lines.items():
        print(f"{name:9} {text}")
