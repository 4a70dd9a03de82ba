"""Measures how fast a model answers: prompts of several lengths, several numbers of new tokens, one request at a time.

    python scripts/eval_speed.py -c smollm2-135m-instruct --out speed/
    python scripts/eval_speed.py -c DIR --prompt-tokens 16,256 --new-tokens 64 --repeat 5 --out speed/
    python scripts/eval_speed.py -c DIR --prompts prompts.txt --new-tokens 128 --out speed/

Without --prompts, token ids of a fixed text are repeated up to each length; with it, every line of the file is a prompt
of its own length. Every request is made once to compile and then --repeat times. OUT/requests.jsonl gets one line per
request while they are made, OUT/summary.json the medians, OUT/summary.svg a picture.

Seconds are wall time on the host: first_token_s from the call to the first token, prefill included; tokens_per_s counts
the tokens after it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jax_mono.cli import machine, models, options
from jax_mono.cli.console import counter
from jax_mono.tokenizer import Tokenizer

TEXT = '''def binary_search(items, wanted):
    """Returns the index of an item of a sorted list, or -1."""
    low, high = 0, len(items) - 1
    while low <= high:
        middle = (low + high) // 2
        if items[middle] < wanted:
            low = middle + 1
        elif items[middle] > wanted:
            high = middle - 1
        else:
            return middle
    return -1


'''


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_checkpoint_options(parser)
    options.add_dtype_option(parser)
    options.add_shape_options(parser)
    parser.add_argument("--prompts", type=Path, help="text file, a prompt per line")
    parser.add_argument("--prompt-tokens", type=options.counts, default=[16, 64, 256], help="lengths (16,64,256)")
    parser.add_argument("--new-tokens", type=options.counts, default=[32, 128], help="tokens to generate (32,128)")
    parser.add_argument("--repeat", type=options.count, default=3, help="measured requests of each kind (3)")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress")
    arguments = parser.parse_args()
    try:
        measure(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def measure(arguments: argparse.Namespace) -> None:
    if min(arguments.new_tokens) < 2:
        raise ValueError("--new-tokens must be at least 2: speed is measured between tokens")
    machine.set_up_jax(arguments.form, arguments.devices)
    path, source = models.open_weights(arguments)
    tokenizer = Tokenizer.open(path)
    prompts = list(chosen_prompts(arguments, tokenizer))
    context = max(map(len, prompts)) + max(arguments.new_tokens)
    longest = source.config.max_position_embeddings
    if context > longest:
        raise ValueError(f"the longest request needs {context} tokens, the model has {longest}; ask for fewer")
    decoder = models.pack_decoder(
        source, arguments, devices=arguments.devices, form=arguments.form, context=context, tokenizer=tokenizer
    )
    about = {
        "model": arguments.checkpoint,
        "dtype": arguments.dtype,
        "form": arguments.form,
        "devices": decoder.plan.num_devices,
        "blocks": decoder.plan.num_blocks,
        "variant": machine.variant(),
        "context": context,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    kinds = list(itertools.product(prompts, arguments.new_tokens))
    rows = []
    with (
        counter("measuring", len(kinds) * arguments.repeat, quiet=arguments.quiet) as shown,
        (arguments.out / "requests.jsonl").open("w") as lines,
    ):
        for prompt, new in kinds:
            one_request(decoder, prompt, new)  # compiles
            for repeat in range(arguments.repeat):
                rows.append({**about, "repeat": repeat, **one_request(decoder, prompt, new)})
                lines.write(json.dumps(rows[-1]) + "\n")
                lines.flush()
                shown(f"{len(prompt)} + {new}: {rows[-1]['tokens_per_s']:.1f} tokens/s")
    summary = summed_up(rows)
    (arguments.out / "summary.json").write_text(json.dumps({**about, "requests": summary}, indent=2) + "\n")
    plot(summary, arguments.out / "summary.svg", f"{Path(arguments.checkpoint).name}, {arguments.dtype}")
    print("prompt tokens  new tokens  first token s  tokens/s")
    for row in summary:
        print("{prompt_tokens:13}  {new_tokens:10}  {first_token_s:13.3f}  {tokens_per_s:8.1f}".format(**row))


def chosen_prompts(arguments: argparse.Namespace, tokenizer: Tokenizer) -> Iterator[list[int]]:
    if arguments.prompts is not None:
        lines = [line for line in arguments.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"{arguments.prompts}: holds no prompts")
        yield from map(tokenizer.encode, lines)
        return
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    for length in arguments.prompt_tokens:
        yield list(itertools.islice(itertools.cycle(ids), length))


def one_request(decoder: Any, prompt: Sequence[int], new: int) -> dict[str, Any]:
    started = time.perf_counter()
    with decoder.stream(prompt, max_new_tokens=new, stop=[]) as stream:
        arrivals = [time.perf_counter() - started for _ in stream]
    return {
        "prompt_tokens": len(prompt),
        "new_tokens": len(arrivals),
        "first_token_s": arrivals[0],
        "total_s": arrivals[-1],
        "tokens_per_s": (len(arrivals) - 1) / (arrivals[-1] - arrivals[0]),
    }


def summed_up(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    kinds: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for row in rows:
        kinds.setdefault((row["prompt_tokens"], row["new_tokens"]), []).append(row)
    return [
        {"prompt_tokens": prompt, "new_tokens": new, "requests": len(group)}
        | {name: statistics.median(row[name] for row in group) for name in ("first_token_s", "tokens_per_s")}
        for (prompt, new), group in sorted(kinds.items())
    ]


def plot(summary: Sequence[dict[str, Any]], file: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for new in sorted({row["new_tokens"] for row in summary}):
        rows = [row for row in summary if row["new_tokens"] == new]
        lengths = [row["prompt_tokens"] for row in rows]
        left.plot(lengths, [row["tokens_per_s"] for row in rows], marker="o", label=f"{new} new tokens")
        right.plot(lengths, [row["first_token_s"] for row in rows], marker="o", label=f"{new} new tokens")
    for axes, label in ((left, "tokens per second after the first"), (right, "seconds to the first token")):
        axes.set_xlabel("prompt tokens")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    raise SystemExit(main())
