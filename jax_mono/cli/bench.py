"""``jax-mono bench``: tokens per second, beside what the memory of this machine allows."""

from __future__ import annotations

import argparse
import datetime
import gc
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_mono import settings
from jax_mono.cli import options
from jax_mono.cli.console import note, print_json

if TYPE_CHECKING:
    from jax_mono.decoder import Decoder
    from jax_mono.models.source import WeightSource

_DESCRIPTION = """\
Measures decoding of one sequence. Every token reads all weights once, so the time to beat is their size over the rate
at which this machine reads them. That is measured before and after every run, and each run is compared with the better
of the two. On a CPU as many threads as decode read the very arrays that hold the weights; on GPUs the resident program
passes its weights through the same blocks and computes nothing.

  jax-mono bench --model laneformer-2b --random-weights
  jax-mono bench --model DIR --dtype float32 --new-tokens 128 --json
  jax-mono bench --model smollm2-135m --random-weights --baseline flax
  jax-mono bench --model laneformer-2b --random-weights --contexts 128,2048,4096 --plot contexts.svg

Speed counts the tokens after the first; prefill is the tokens of the prompt over the time to the first token. With
--contexts, decoding is also measured behind conversations made up of random keys and values; every run ends where the
context is full.

--baseline flax also times a token loop around one jitted step of the reference model, with a donated cache, in the
same run: as many tokens as the kernel's runs have, but no longer than --baseline-seconds, and at least 3. Peak memory
is read before that starts, and the kernel's weights are freed.
"""

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
    work.add_argument(
        "--contexts", metavar="N,N", type=options.counts, default=[], help="also measure up to these contexts"
    )
    work.add_argument("--plot", metavar="FILE", type=Path, help="draw speed by context: .svg, .png or .pdf")
    work.add_argument("--baseline", choices=("flax",), help="also measure the reference model")
    work.add_argument(
        "--baseline-seconds", metavar="S", type=options.seconds, default=60.0,
        help="time limit of the baseline, after its first token has compiled",
    )  # fmt: skip
    work.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Measures."""
    import numpy as np

    from jax_mono.cli.bench_contexts import check_contexts, plot, sweep
    from jax_mono.cli.bench_runs import against_limit, measure_limit, speed, timed_run
    from jax_mono.cli.machine import set_up_jax
    from jax_mono.cli.models import open_model
    from jax_mono.limit import bytes_per_token

    if arguments.new_tokens < 2:
        raise ValueError("--new-tokens must be at least 2: speed is measured between tokens")
    if arguments.plot and not arguments.contexts:
        raise ValueError("--plot draws speed by context; name some with --contexts, such as 128,512,2048")
    set_up_jax(arguments.form, arguments.devices)
    source = open_model(arguments)
    config = source.config
    needed = arguments.prompt_tokens + arguments.new_tokens
    context = arguments.context or max(needed, *arguments.contexts, 0)
    if not needed <= context <= config.max_position_embeddings:
        raise ValueError(
            f"{arguments.prompt_tokens} prompt tokens and {arguments.new_tokens} new ones need a context from {needed} "
            f"to the model's {config.max_position_embeddings}, not {context}"
        )
    check_contexts(arguments.contexts, context)
    rss_before = _peak_rss()
    started = time.perf_counter()
    decoder = _decoder(source, arguments, context)
    pack_s = time.perf_counter() - started
    tokens = np.random.default_rng(arguments.seed).integers(0, config.vocab_size, arguments.prompt_tokens).tolist()

    first = timed_run(decoder, tokens, arguments.new_tokens)
    limits, timings = [measure_limit(decoder)], []
    for _ in range(arguments.runs):
        timings.append(timed_run(decoder, tokens, arguments.new_tokens))
        limits.append(measure_limit(decoder))
    record = _about(arguments, decoder, context)
    record |= {"pack_s": pack_s, "first_call_s": first.arrivals[-1]}
    record |= speed(timings, arguments.prompt_tokens)
    record |= against_limit(bytes_per_token(decoder.plan, decoder.tapes), limits, timings)
    record |= _memory(decoder, rss_before)
    if arguments.contexts:
        record["contexts"] = sweep(decoder, arguments.contexts, arguments.new_tokens, arguments.runs)
    if arguments.baseline:
        del decoder  # a large model does not fit into memory twice
        gc.collect()  # only now JAX lets go of the memory that packing made
        record |= _baseline(arguments, source, tokens, context, record["tokens_per_s"])
    if arguments.json:
        print_json(record)
    else:
        _print(record)
    if arguments.plot:
        plot(record, arguments.plot)
        note(f"wrote {arguments.plot}", quiet=arguments.quiet)
    return 0


def _decoder(source: WeightSource, arguments: argparse.Namespace, context: int) -> Decoder:
    """Packs weights; on GPUs, random ones are made there, for copying a large model takes minutes."""
    from jax_mono.cli.machine import device_mesh
    from jax_mono.cli.models import pack_decoder
    from jax_mono.decoder import Decoder
    from jax_mono.packing import home

    if not arguments.random_weights or home().platform == "cpu":
        return pack_decoder(source, arguments, devices=arguments.devices, form=arguments.form, context=context)
    return Decoder.random(
        source.config,
        dtype=arguments.dtype,
        devices=arguments.devices if arguments.form == "threads" else None,
        blocks=arguments.blocks,
        context=context,
        mesh=device_mesh(arguments.devices or 1) if arguments.form == "mesh" else None,
        compress=arguments.compress,
        seed=arguments.seed,
    )


def _about(arguments: argparse.Namespace, decoder: Decoder, context: int) -> dict[str, Any]:
    from jax_mono.cli import machine
    from jax_mono.limit import weights_per_token
    from jax_mono.packing import home

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
        "jax_devices": 1 if decoder.mesh is None else decoder.mesh.size,
        "compressed": decoder.plan.tile.compressed,
        "weights_per_token": weights_per_token(decoder.plan),
        "variant": machine.variant(),
        "device": machine.cpu_model() if home().platform == "cpu" else home().device_kind,
        "cpu": machine.cpu_model(),
        "cores": settings.cores(),
        "memory_bytes": machine.memory()[0],
        "huge_pages": machine.huge_pages(),
        **{f"{name.replace('-', '_')}_version": version for name, version in found.items()},
    }


def _memory(decoder: Decoder, rss_before: int) -> dict[str, Any]:
    import jax

    from jax_mono.packing import home

    cache = jax.eval_shape(decoder.new_cache)
    on_device = home().memory_stats() or {}
    peak = on_device.get("peak_bytes_in_use")
    return {
        "weight_bytes": decoder.tapes.nbytes,
        "kv_cache_bytes": sum(part.size * part.dtype.itemsize for part in (cache.k, cache.v)),
        **({} if peak is None else {"peak_device_bytes": peak}),
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

    from jax_mono.cli.bench_runs import Timing
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
    gaps = Timing(tuple(arrivals)).gaps
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

    where = f"{record['devices']} x {record['blocks']} blocks ({record['variant']}) on {record['device']}"
    name = record["limit"]
    how = {"read_bandwidth": "read", "stream_limit": "passed through the resident program"}[name]
    lines = {
        "model": f"{record['model']}, {record['parameters']:,} parameters, {record['dtype']}, "
        f"{record['weights']} weights" + (", compressed to 12 bits without loss" if record["compressed"] else ""),
        "machine": f"{where}, {record['cores']} cores, huge pages {record['huge_pages'] or 'unknown'}",
        "work": f"batch 1, {record['prompt_tokens']} prompt tokens, {record['new_tokens']} new, {record['runs']} runs",
        "speed": f"{record['tokens_per_s']:.2f} tokens/s (median; {record['tokens_per_s_min']:.2f} to "
        f"{record['tokens_per_s_max']:.2f})",
        "latency": f"{1e3 * record['inter_token_p50_s']:.2f} ms between tokens (p99 "
        f"{1e3 * record['inter_token_p99_s']:.2f} ms), first token after {record['first_token_s']:.3f} s",
        "prefill": f"{record['prefill_tokens_per_s']:.1f} tokens/s of the prompt, first token included",
        "stream": f"{gb('bytes_per_token')} per token, "
        f"{8 * record['bytes_per_token'] / record['weights_per_token']:.1f} bits per weight, "
        f"{gb('decode_bytes_per_s')}/s",
        "limit": f"{record['limit_tokens_per_s']:.2f} tokens/s at {gb(f'{name}_bytes_per_s')}/s {how} before or after "
        f"a run (median; {gb(f'{name}_min_bytes_per_s')}/s to {gb(f'{name}_max_bytes_per_s')}/s)",
        "reached": f"{record[f'fraction_of_{name}']:.0%} of the limit around each run (median; "
        f"{record[f'fraction_of_{name}_min']:.0%} to {record[f'fraction_of_{name}_max']:.0%})",
        "memory": f"{gb('weight_bytes')} weights + {gb('kv_cache_bytes')} KV cache; peak {gb('peak_rss_bytes')}, "
        f"{gb('rss_before_packing_bytes')} of it before packing",
        "times": f"packing {record['pack_s']:.1f} s, first call with compiling {record['first_call_s']:.1f} s",
    }
    if "baseline" in record:
        lines["baseline"] = (
            f"{record['baseline_tokens_per_s']:.2f} tokens/s with a jitted Flax step (median of "
            f"{record['baseline_tokens']} tokens); the kernel is {record['times_baseline']:.2f} times as fast"
        )
    for title, text in lines.items():
        print(f"{title:9} {text}")
    for row in record.get("contexts", ()):
        print(
            f"context   {row['context']}: {row['tokens_per_s']:.2f} tokens/s ({row['tokens_per_s_min']:.2f} to "
            f"{row['tokens_per_s_max']:.2f}), {row[f'fraction_of_{name}']:.0%} of the limit"
        )
