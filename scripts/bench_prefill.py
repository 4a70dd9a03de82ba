"""Measures how fast prompts are taken in, beside the rate of one large matrix product on the same device.

    python scripts/bench_prefill.py --model laneformer-2b --tokens 512,2048
    JAX_PLATFORMS=cpu python scripts/bench_prefill.py --model tiny-laneformer --tokens 32 --context 64

Weights and prompts are random. A JSON object per length:

  prefill_s             keys and values of all tokens, by the Flax layers; the fastest of --runs
  prefill_tokens_per_s  tokens over that time
  flops_per_s           two operations per weight of a layer and token over that time; attention itself is not counted
  matrix_flops_per_s    a product of two square matrices of --side, in the same dtype, in the same process
  fraction              the one over the other
  first_token_s         from a call with that prompt to its first token, the median of --runs: prefill, launch and the
                        resident program's first token
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jax_mono import decode
from jax_mono.cli import models, options
from jax_mono.config import ModelConfig
from jax_mono.decoder import Decoder
from jax_mono.models.rope import rope_table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="laneformer-2b", help="a preset or a configuration (laneformer-2b)")
    options.add_dtype_option(parser)
    parser.add_argument("--tokens", type=lengths, default=[512, 2048], help="lengths of prompts (512,2048)")
    parser.add_argument("--context", type=options.count, default=4096, help="positions of the KV cache (4096)")
    parser.add_argument("--side", type=options.count, default=8192, help="of the matrices of the product (8192)")
    parser.add_argument("--runs", type=options.count, default=5, help="measured runs (5)")
    arguments = parser.parse_args()
    if max(arguments.tokens) >= arguments.context:
        parser.error(f"--context {arguments.context} has no room for {max(arguments.tokens)} tokens and one more")

    config = models.find_config(arguments.model)
    decoder = Decoder.random(config, dtype=arguments.dtype, context=arguments.context)
    device = next(iter(decoder.tapes.layers.devices()))
    matrix = matrix_rate(arguments.side, arguments.dtype, arguments.runs)
    for count in arguments.tokens:
        prompt = np.random.default_rng(0).integers(0, config.vocab_size, count).tolist()
        seconds = prefill_seconds(decoder, prompt, arguments.runs)
        rate = 2 * count * layer_weights(config) / seconds
        record = {
            "model": arguments.model,
            "dtype": arguments.dtype,
            "batch": 1,
            "context": arguments.context,
            "device": device.device_kind,
            "devices": decoder.plan.num_devices,
            "blocks": decoder.plan.num_blocks,
            "tokens": count,
            "prefill_s": seconds,
            "prefill_tokens_per_s": count / seconds,
            "flops_per_s": rate,
            "matrix_flops_per_s": matrix,
            "fraction": rate / matrix,
            "first_token_s": first_token_seconds(decoder, prompt, arguments.runs),
        }
        print(json.dumps(record), flush=True)
    return 0


def lengths(text: str) -> list[int]:
    return [options.count(part) for part in text.split(",")]


def layer_weights(config: ModelConfig) -> int:
    """Weights of all layers' matrices; those of norms hardly count."""
    heads = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
    return config.num_layers * config.hidden_size * (heads + 3 * config.intermediate_size)


def fastest(run: Callable[[], object], runs: int) -> float:
    """Seconds of the fastest run after a first one that compiles."""
    times = []
    for _ in range(runs + 1):
        started = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - started)
    return min(times[1:])


def matrix_rate(side: int, dtype: str, runs: int) -> float:
    """Operations per second of a square product with sums in float32."""
    matrix = jax.random.normal(jax.random.key(0), (side, side), jnp.dtype(dtype))
    product = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32).astype(a.dtype))
    return 2 * side**3 / fastest(lambda: product(matrix, matrix), runs)


def prefill_seconds(decoder: Decoder, prompt: list[int], runs: int) -> float:
    """Time of a whole prompt's keys and values."""
    plan, cache = decoder.plan, decoder.new_cache()
    rope = jnp.asarray(rope_table(plan.config, cache.capacity))
    tokens = jnp.zeros(cache.capacity, jnp.int32).at[: len(prompt)].set(jnp.array(prompt, jnp.int32))
    take_in = jax.jit(
        lambda tapes, cache: decode.prefill(plan, tapes, rope, cache, tokens, len(prompt), len(prompt), decoder.mesh)
    )
    return fastest(lambda: take_in(decoder.tapes, cache), runs)


def first_token_seconds(decoder: Decoder, prompt: list[int], runs: int) -> float:
    """Time until the first token has come, not counting a first call that compiles."""
    times = []
    for _ in range(runs + 1):
        started = time.perf_counter()
        with decoder.stream(prompt, max_new_tokens=2, stop=[]) as stream:
            next(iter(stream))
            times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


if __name__ == "__main__":
    raise SystemExit(main())
