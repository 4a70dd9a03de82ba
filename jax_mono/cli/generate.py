"""``jax-mono generate``: a prompt in, text out while it appears."""

from __future__ import annotations

import argparse
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jax_mono.cli import options, prompt
from jax_mono.cli.console import note, print_json, progress

if TYPE_CHECKING:
    from jax_mono.cli.flax_decoder import FlaxDecoder, FlaxOutput, FlaxStream
    from jax_mono.decoder import Decoder
    from jax_mono.models.source import WeightSource
    from jax_mono.output import Output
    from jax_mono.stream import Token, TokenStream
    from jax_mono.tokenizer import Tokenizer

_DESCRIPTION = """\
Generates text and prints it while it appears; a line of timings follows on stderr.

  jax-mono generate --prompt "class Matrix:" --temperature 0.5 --repetition-penalty 1.1
  jax-mono generate -c smollm2-135m-instruct --prompt "Write a haiku about rain."
  git diff | jax-mono generate -c DIR --system "Summarise this change." --temperature 0.7 --top-p 0.95 --seed 1
  jax-mono generate --prompt "import" --json     one JSON object instead: tokens, log-probabilities, timings

The model that comes with jax-mono, mini-coder, goes on with Python code; it does not answer questions.

Without sampling options the most likely token is taken each time. Ctrl-C stops the call within one token; what there
is by then is printed, and the exit code is 130.
"""

_CONTEXT_STEP = 64


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Declares the command."""
    parser = options.command(subparsers, "generate", run, "generate text from a prompt", _DESCRIPTION)
    prompt.add_options(parser)
    model = parser.add_argument_group("model")
    options.add_checkpoint_options(model)
    options.add_dtype_option(model)
    options.add_shape_options(model)
    options.add_backend_option(model)
    model.add_argument(
        "--context", metavar="N", type=options.count, help="tokens to make room for; just enough if absent"
    )
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--temperature", metavar="T", type=float, default=0.0, help="0 is greedy")
    sampling.add_argument(
        "--top-k", metavar="K", type=options.natural, default=0, help="keep the K most likely tokens; 0 keeps all"
    )
    sampling.add_argument(
        "--top-p", metavar="P", type=float, default=1.0, help="keep the likeliest tokens that reach this probability"
    )
    sampling.add_argument(
        "--min-p", metavar="P", type=float, default=0.0, help="keep tokens this likely, relative to the likeliest"
    )
    sampling.add_argument(
        "--repetition-penalty", metavar="R", type=float, default=1.0, help="above 1: tokens that occurred become rarer"
    )
    sampling.add_argument("--seed", metavar="N", type=options.natural, help="of the random numbers; drawn if absent")
    end = parser.add_argument_group("end")
    end.add_argument(
        "-n", "--max-new-tokens", metavar="N", type=options.count, default=256, help="at most, and as many as fit"
    )
    end.add_argument(
        "--stop-token",
        metavar="ID,ID",
        type=options.naturals,
        action="extend",
        default=[],
        help="end after one of these tokens too; may be repeated",
    )
    end.add_argument("--ignore-eos", action="store_true", help="do not end at the model's own end-of-text tokens")
    end.add_argument(
        "--deadline", metavar="SECONDS", type=options.seconds, help="end after this time, compiling and prompt included"
    )
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    output.add_argument(
        "--top-logprobs", metavar="N", type=options.natural, default=0, help="likeliest alternatives per token (--json)"
    )
    return parser


@dataclass
class _Run:
    """What is known of a generation so far.

    Attributes:
        text: Text so far.
        fed: How many tokens are in the text.
        first_s: Seconds until the first token, or None before it.
        last_s: Seconds until the last token that came while the call ran.
        total_s: Seconds until the end.
        tokens_per_s: After the first token, or None without a second one.
        interrupted: Whether Ctrl-C ended it.
    """

    text: list[str] = field(default_factory=list)
    fed: int = 0
    first_s: float | None = None
    last_s: float = 0.0
    total_s: float = 0.0
    tokens_per_s: float | None = None
    interrupted: bool = False


def run(arguments: argparse.Namespace) -> int:
    """Generates."""
    from jax_mono.cli.machine import set_up_jax, settle_dtype
    from jax_mono.cli.models import open_weights
    from jax_mono.tokenizer import Tokenizer

    _check(arguments)
    text = prompt.read_text(arguments)
    set_up_jax(arguments.form, arguments.devices)
    settle_dtype(arguments, kernel=arguments.backend == "kernel")
    started = time.perf_counter()
    path, source = open_weights(arguments)
    tokenizer = Tokenizer.open(path)
    load_s = time.perf_counter() - started

    ends = tuple(dict.fromkeys((*source.config.eos_token_ids, *tokenizer.eos_ids)))
    tokens = prompt.encode(arguments, text, tokenizer, ends)
    stops = [*(() if arguments.ignore_eos else ends), *arguments.stop_token]
    budget = _budget(arguments, source, len(tokens))
    started = time.perf_counter()
    decoder = _decoder(arguments, source, arguments.context or _enough(source, len(tokens) + budget))
    pack_s = time.perf_counter() - started

    seed = secrets.randbits(32) if arguments.seed is None else arguments.seed
    started = time.perf_counter()
    with _stream(arguments, decoder, tokens, budget, stops, seed) as stream:
        done, output = _follow(stream, tokenizer, started, show=not arguments.json)
    record = _record(arguments, decoder, tokenizer, tokens, done, output, seed)
    record["timings"] = {"load_s": load_s, "pack_s": pack_s, **record.pop("timings")}
    if arguments.json:
        print_json(record, indent=None)
    else:
        note(_summary(record), quiet=arguments.quiet)
    return 130 if done.interrupted else 0


def _check(arguments: argparse.Namespace) -> None:
    """Refuses what needs no model to be refused."""
    from jax_mono.sampling import Sampling

    Sampling(**_sampling(arguments)).check()
    if arguments.backend == "flax":
        if arguments.temperature or arguments.repetition_penalty != 1.0:
            raise ValueError("--backend flax is greedy only; remove --temperature and --repetition-penalty")
        if arguments.devices or arguments.form != "threads":
            raise ValueError("--backend flax runs on one device; remove --devices and --form")
    elif not arguments.temperature and (arguments.top_k or arguments.top_p < 1.0 or arguments.min_p):
        note("--top-k, --top-p and --min-p change nothing at --temperature 0", quiet=arguments.quiet)


def _sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    return {name: getattr(arguments, name) for name in names}


def _budget(arguments: argparse.Namespace, source: WeightSource, used: int) -> int:
    """Tokens to generate: what was asked for, or what fits."""
    longest = source.config.max_position_embeddings
    context = arguments.context or longest
    if context > longest:
        raise ValueError(f"--context {context} is beyond this model's longest context of {longest}")
    if used >= context:
        raise ValueError(f"the prompt has {used} tokens, which leaves no room in the context of {context}")
    budget = min(arguments.max_new_tokens, context - used)
    if budget < arguments.max_new_tokens:
        note(f"at most {budget} new tokens fit into the context of {context}", quiet=arguments.quiet)
    return budget


def _enough(source: WeightSource, needed: int) -> int:
    """A context for this many tokens, one of few different ones: each is compiled anew."""
    return min(-(-needed // _CONTEXT_STEP) * _CONTEXT_STEP, source.config.max_position_embeddings)


def _decoder(arguments: argparse.Namespace, source: WeightSource, context: int) -> Decoder | FlaxDecoder:
    from jax_mono.cli.models import as_dtype, pack_decoder, weight_bytes

    if arguments.backend == "kernel":
        return pack_decoder(source, arguments, devices=arguments.devices, form=arguments.form, context=context)
    from jax_mono.cli.flax_decoder import FlaxDecoder

    dtype = as_dtype(arguments.dtype)
    with progress("reading", weight_bytes(source.config, dtype), quiet=arguments.quiet) as on_tensor:
        return FlaxDecoder.from_source(source, dtype=dtype, context=context, on_tensor=on_tensor)


def _stream(
    arguments: argparse.Namespace,
    decoder: Decoder | FlaxDecoder,
    tokens: Sequence[int],
    budget: int,
    stops: Sequence[int],
    seed: int,
) -> TokenStream[Output] | FlaxStream:
    from jax_mono.decoder import Decoder
    from jax_mono.sampling import Sampling

    common = {
        "max_new_tokens": budget,
        "stop": stops,
        "top_logprobs": arguments.top_logprobs,
        "deadline": arguments.deadline,
    }
    if isinstance(decoder, Decoder):
        return decoder.stream(tokens, sampling=Sampling(**_sampling(arguments)), seed=seed, **common)
    return decoder.stream(tokens, **common)


def _follow(
    stream: TokenStream[Output] | FlaxStream, tokenizer: Tokenizer, started: float, *, show: bool
) -> tuple[_Run, Output | FlaxOutput]:
    """Takes tokens as they come, and prints their text. Ctrl-C ends the call."""
    done, pieces = _Run(), tokenizer.stream()

    def take(piece: str) -> None:
        done.text.append(piece)
        if show and piece:
            sys.stdout.write(piece)
            sys.stdout.flush()

    def take_token(token: int) -> None:
        done.fed += 1
        take(pieces.feed(token))

    try:
        for token in stream:
            done.last_s = time.perf_counter() - started
            done.first_s = done.last_s if done.first_s is None else done.first_s
            take_token(token.id)
    except KeyboardInterrupt:
        done.interrupted = True
        stream.cancel()
    output = stream.result()
    done.total_s = time.perf_counter() - started
    if done.first_s is not None and done.last_s > done.first_s:
        done.tokens_per_s = (done.fed - 1) / (done.last_s - done.first_s)
    for token in output.tokens[done.fed :]:  # those that came between the interrupt and the end
        take_token(token)
    take(pieces.flush())
    if show:
        print(flush=True)
    return done, output


def _record(
    arguments: argparse.Namespace,
    decoder: Decoder | FlaxDecoder,
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    done: _Run,
    output: Output | FlaxOutput,
    seed: int,
) -> dict[str, Any]:
    from jax_mono.cli.machine import variant
    from jax_mono.decoder import Decoder

    def alternative(token: Token) -> dict[str, Any]:
        text = tokenizer.decode([token.id], skip_special_tokens=False)
        return {"token": token.id, "text": text, "logprob": token.logprob}

    kernel = isinstance(decoder, Decoder)
    return {
        "model": arguments.checkpoint,
        "prompt_tokens": list(tokens),
        "tokens": output.tokens,
        "text": "".join(done.text),
        "finish_reason": "cancelled" if done.interrupted else output.finish.name.lower(),
        "logprobs": output.logprobs,
        "top": [[alternative(token) for token in row] for row in output.top],
        "timings": {
            "first_token_s": done.first_s,
            "total_s": done.total_s,
            "tokens_per_s": done.tokens_per_s,
        },
        "seed": seed,
        "dtype": arguments.dtype,
        "context": decoder.context,
        "backend": arguments.backend,
        "form": arguments.form if kernel else None,
        "devices": decoder.plan.num_devices if kernel else 1,
        "blocks": decoder.plan.num_blocks if kernel else None,
        "variant": variant() if kernel else None,
    }


def _summary(record: dict[str, Any]) -> str:
    timings = record["timings"]
    parts = [f"{len(record['tokens'])} tokens ({record['finish_reason']})"]
    if timings["tokens_per_s"] is not None:
        parts.append(f"{timings['tokens_per_s']:.1f} tokens/s")
    if timings["first_token_s"] is not None:
        parts.append(f"first token after {timings['first_token_s']:.2f} s")
    parts.append(f"load {timings['load_s']:.2f} s, pack {timings['pack_s']:.2f} s")
    where = record["backend"]
    if where == "kernel":
        where = f"{record['variant']}, {record['devices']} x {record['blocks']} blocks"
    parts.append(f"{record['dtype']} on {where}")
    return "; ".join(parts)
