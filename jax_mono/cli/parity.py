"""``jax-mono parity``: the kernel's numbers beside those of the reference model in Flax."""

from __future__ import annotations

import argparse
import gc
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from jax_mono.cli import options
from jax_mono.cli.console import note, print_json, progress
from jax_mono.config import ConfigError

if TYPE_CHECKING:
    import numpy as np

    from jax_mono.cli.compare import Divergence, LayerError
    from jax_mono.cli.flax_decoder import FlaxDecoder, FlaxOutput
    from jax_mono.models.source import WeightSource

_DESCRIPTION = """\
Runs the same tokens through the kernel and through the reference model in Flax, with the same weights of the same
dtype, and compares logits and greedy tokens. Exit code 1 if they are further apart than --tolerance.

  jax-mono parity -c DIR --dtype float32
  jax-mono parity --model tiny-laneformer --random-weights --devices 1,2,4,8 --form both
  jax-mono parity -c DIR --tokens-file t.npy --per-layer --json

Forced: both read the same given tokens. Generated: both continue the first half of them on their own, greedily. Where
they first disagree, margin says by how much the reference preferred its token; up to twice the tolerance it is a tie
that rounding may break, beyond it the comparison fails.

--per-layer compares the keys and values that both wrote, for the prompt (computed by Flax layers from the kernel's
tapes) and for generated tokens (computed by the kernel): an error shows from the layer after the one that made it.
"""

MAX_ERROR = 1e-4
"""Largest difference of two float32 logits: two orders of summation differ by 3e-6 on tiny models and by 6e-5 on
SmolLM2-135M, whose logits reach 37."""

MAX_ERROR_BFLOAT16 = 1 / 32
"""The same for bfloat16, as a share of the largest logit.

Another order of summation now and then rounds an activation to its neighbour, 2**-8 away, and that spreads. On
SmolLM2-135M the reference differs from itself (one token at a time, or 64) by 0.015 of the largest logit, the kernel
from the reference by 0.012 to 0.021, and all of them by as much from float32."""

MAX_KL_BFLOAT16 = 2e-3
"""Largest mean divergence for bfloat16, in nats; 2e-4 to 4e-4 in the same comparisons. It tells many small differences
from the one large that the maximum finds among millions of logits."""

MAX_ERROR_FLOAT16, MAX_KL_FLOAT16 = MAX_ERROR_BFLOAT16 / 4, MAX_KL_BFLOAT16 / 16
"""The same for float16, whose rounding is eight times as fine; the divergence goes with its square. Both bounds leave
twice that."""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Declares the command."""
    parser = options.command(subparsers, "parity", run, "compare the kernel with the reference model", _DESCRIPTION)
    model = parser.add_argument_group("model")
    options.add_model_options(model)
    options.add_dtype_option(model, exact=True)
    options.add_shape_options(model, several=True)
    tokens = parser.add_argument_group("tokens")
    tokens.add_argument("--tokens-file", metavar="T.npy", help="token ids to read; random ones if absent")
    tokens.add_argument("--tokens", metavar="N", type=options.count, default=64, help="how many random tokens")
    tokens.add_argument("--new-tokens", metavar="N", type=options.count, default=32, help="tokens to generate")
    tokens.add_argument("--seed", metavar="N", type=options.natural, default=0, help="of random tokens and weights")
    report = parser.add_argument_group("report")
    report.add_argument(
        "--tolerance",
        metavar="E",
        type=float,
        help=f"largest difference of two logits. If absent: {MAX_ERROR:g} for float32; for bfloat16 1/32 of the "
        f"largest logit, and a mean divergence of at most {MAX_KL_BFLOAT16:g}; for float16 1/128 and "
        f"{MAX_KL_FLOAT16:g}",
    )
    report.add_argument("--per-layer", action="store_true", help="also compare keys and values, layer by layer")
    report.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser


@dataclass(frozen=True)
class _Reference:
    """What Flax says, computed once."""

    decoder: FlaxDecoder
    logits: np.ndarray
    generated: FlaxOutput


@dataclass(frozen=True)
class Result:
    """One comparison.

    Attributes:
        devices: Devices that shared the model.
        blocks: Blocks per device.
        form: ``threads`` or ``mesh``.
        max_logit_error: Largest absolute difference of two logits.
        tolerance: What that may be.
        mean_kl: Mean Kullback-Leibler divergence, in nats.
        forced: Where the most likely next token first differs on given text, or None.
        generated: Where generated tokens first differ, or None.
        ok: Whether all of that is within the tolerance.
        prompt_layers: Differences of keys and values at prompt positions, if asked for.
        decode_layers: The same at positions that the kernel fed.
    """

    devices: int
    blocks: int
    form: str
    max_logit_error: float
    tolerance: float
    mean_kl: float
    forced: Divergence | None
    generated: Divergence | None
    ok: bool
    prompt_layers: list[LayerError] | None = None
    decode_layers: list[LayerError] | None = None


def run(arguments: argparse.Namespace) -> int:
    """Compares."""
    from jax_mono.cli.machine import set_up_jax, settle_dtype
    from jax_mono.cli.models import open_model

    if arguments.tolerance is not None and not arguments.tolerance >= 0.0:
        raise ValueError(f"--tolerance is {arguments.tolerance}, must not be negative")
    forms = ("threads", "mesh") if arguments.form == "both" else (arguments.form,)
    set_up_jax(arguments.form, max(arguments.devices))
    settle_dtype(arguments)
    source = open_model(arguments)
    tokens = _tokens(arguments, source)
    prompt = tokens[: max(1, len(tokens) // 2)]
    context = max(len(tokens), len(prompt) + arguments.new_tokens)
    longest = source.config.max_position_embeddings
    if context > longest:
        raise ValueError(
            f"{len(tokens)} tokens, or {len(prompt)} of them and {arguments.new_tokens} new ones, are beyond the "
            f"model's context of {longest}; ask for fewer"
        )
    reference = _reference(arguments, source, tokens, prompt, context)
    results = []
    for devices in arguments.devices:
        for form in forms:
            try:
                result = _compare(arguments, source, reference, tokens, prompt, devices, form)
            except ConfigError as error:
                raise ConfigError(f"{devices} devices: {error}") from error
            results.append(result)
            if not arguments.json:
                _print(result, header=len(results) == 1)
            gc.collect()  # of the tapes, before the next ones are packed
    ok = all(result.ok for result in results)
    if arguments.json:
        print_json(_record(arguments, tokens, results))
    elif not ok:
        note("the difference is beyond the tolerance")
    return 0 if ok else 1


def _tokens(arguments: argparse.Namespace, source: WeightSource) -> list[int]:
    import numpy as np

    from jax_mono.cli.models import read_tokens

    vocabulary = source.config.vocab_size
    if arguments.tokens_file:
        tokens = read_tokens(arguments.tokens_file, vocabulary)
    else:
        tokens = np.random.default_rng(arguments.seed).integers(0, vocabulary, arguments.tokens).tolist()
    if len(tokens) < 2:
        raise ValueError("a comparison needs at least two tokens")
    return tokens


def _reference(
    arguments: argparse.Namespace, source: WeightSource, tokens: list[int], prompt: list[int], context: int
) -> _Reference:
    from jax_mono.cli.flax_decoder import FlaxDecoder
    from jax_mono.cli.models import as_dtype, weight_bytes

    dtype = as_dtype(arguments.dtype)
    with progress("reading", weight_bytes(source.config, dtype), quiet=arguments.quiet) as on_tensor:
        decoder = FlaxDecoder.from_source(source, dtype=dtype, context=context, on_tensor=on_tensor)
    logits, _ = decoder.forward(tokens)
    generated = decoder.stream(prompt, max_new_tokens=arguments.new_tokens, top_logprobs=2).result()
    return _Reference(decoder, logits, generated)


def _compare(
    arguments: argparse.Namespace,
    source: WeightSource,
    reference: _Reference,
    tokens: list[int],
    prompt: list[int],
    devices: int,
    form: str,
) -> Result:
    from jax_mono.cli import compare
    from jax_mono.cli.models import pack_decoder

    decoder = pack_decoder(source, arguments, devices=devices, form=form, context=reference.decoder.context)
    logits = decoder.score(tokens, logits=True).logits
    output = decoder.generate(prompt, max_new_tokens=arguments.new_tokens, stop=[])
    forced = compare.forced_divergence(reference.logits, logits)
    expected = reference.generated
    generated = compare.generated_divergence(expected.tokens, output.tokens, expected.top)
    error, kl = compare.max_error(reference.logits, logits), compare.mean_kl(reference.logits, logits)
    tolerance, max_kl = _tolerance(arguments, reference.logits)
    prompt_layers = decode_layers = None
    if arguments.per_layer:
        # The cache holds all tokens but the last. Flax reads those that the kernel chose.
        fed = [*prompt, *output.tokens][:-1]
        _, cache = reference.decoder.forward(fed)
        decode_layers = compare.layer_errors(decoder.plan, output.cache, cache, len(prompt) - 1, len(fed))
        if len(prompt) > 1:
            prompt_layers = compare.layer_errors(decoder.plan, output.cache, cache, 0, len(prompt) - 1)
    ties = all(found is None or found.margin <= 2.0 * tolerance for found in (forced, generated))
    return Result(
        devices=devices,
        blocks=decoder.plan.num_blocks,
        form=form,
        max_logit_error=error,
        tolerance=tolerance,
        mean_kl=kl,
        forced=forced,
        generated=generated,
        ok=error <= tolerance and kl <= max_kl and ties,
        prompt_layers=prompt_layers,
        decode_layers=decode_layers,
    )


def _tolerance(arguments: argparse.Namespace, logits: np.ndarray) -> tuple[float, float]:
    """What the largest difference and the mean divergence may be."""
    if arguments.tolerance is not None:
        return arguments.tolerance, float("inf")
    if arguments.dtype == "float32":
        return MAX_ERROR, float("inf")
    largest = max(1.0, float(abs(logits).max()))
    if arguments.dtype == "float16":
        return MAX_ERROR_FLOAT16 * largest, MAX_KL_FLOAT16
    return MAX_ERROR_BFLOAT16 * largest, MAX_KL_BFLOAT16


def _record(arguments: argparse.Namespace, tokens: list[int], results: list[Result]) -> dict[str, Any]:
    from jax_mono.cli.machine import variant

    return {
        "model": arguments.model,
        "weights": "random" if arguments.random_weights else "checkpoint",
        "dtype": arguments.dtype,
        "variant": variant(),
        "tokens": len(tokens),
        "new_tokens": arguments.new_tokens,
        "ok": all(result.ok for result in results),
        "results": [asdict(result) for result in results],
    }


def _print(result: Result, *, header: bool) -> None:
    if header:
        print("devices blocks form     max error  allowed   mean KL  first difference, verdict")
    differences = [
        f"{name} {found.position} (margin {found.margin:.2g})"
        for name, found in (("forced", result.forced), ("generated", result.generated))
        if found is not None
    ]
    cells = (
        f"{result.devices:7}",
        f"{result.blocks:6}",
        f"{result.form:7}",
        f"{result.max_logit_error:10.2e}",
        f"{result.tolerance:8.2g}",
        f"{result.mean_kl:9.2e}",
    )
    verdict = "ok" if result.ok else "NOT OK"
    print(*cells, "", f"{', '.join(differences) or 'none'}, {verdict}", flush=True)
    for name, layers in (("prompt", result.prompt_layers), ("decoded", result.decode_layers)):
        for error in layers or ():
            print(
                f"        {name:8} layer {error.layer:3}: keys {error.keys:.2e}, values {error.values:.2e}, "
                f"relative {error.relative:.2e}"
            )
