"""Measures what decodes a model of the same dimensions on this machine: ours, its limit, and others.

    python scripts/bench_peers.py --model laneformer-2b --out peers.jsonl
    python scripts/bench_peers.py --model laneformer-2b --peers kernel,limit,torch --deadline 300
    JAX_PLATFORMS=cpu python scripts/bench_peers.py --model tiny-laneformer --runs 2

Weights are random, the batch is 1, decoding is greedy, from --position on behind a KV cache that is taken as filled.
Each peer has a process of its own, which is ended after --deadline seconds at work, weights and compilers included.
One peer does all its runs after the other; with --in-turns all are in memory at once and take turns, run by run, which
compares them where the machine's speed changes within minutes. A run has --new-tokens tokens, or fewer (at least 4)
where they would take longer than --run-seconds. Standard output gets a JSON object per peer as soon as it is known,
then a table; --out writes the objects to a file.

  kernel       the resident program of jax_mono
  limit        the same weights passed through it without arithmetic (GPU), or read by as many threads (CPU)
  flax-step    the reference model, one jitted step per token; over several GPUs by GSPMD
  flax-loop    the reference model, the token loop in one jitted function; likewise
  torch        PyTorch: a plain dense decoder, the whole step compiled and, on a GPU, in one CUDA graph
  torch-layer  the same, one layer compiled and used for all: compiles sooner
  llama.cpp    llama.cpp on a GGUF file of a dense model, which is written for it and removed
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from peers.process import await_turn, measure_in_turns
from peers.work import Missing, Peer, Work

from jax_mono.cli import models, options

PEERS = {
    "kernel": "peers.kernel:Kernel",
    "limit": "peers.memory_limit:MemoryLimit",
    "flax-step": "peers.flax_step:FlaxStep",
    "flax-loop": "peers.flax_loop:FlaxLoop",
    "torch": "peers.torch_compiled:TorchCompiled",
    "torch-layer": "peers.torch_compiled:TorchCompiledByLayer",
    "llama.cpp": "peers.llama_cpp_decoder:LlamaCpp",
}
FEWEST = 4
"""Tokens of a run."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="laneformer-2b", help="a preset or a configuration (laneformer-2b)")
    options.add_dtype_option(parser)
    parser.add_argument("--context", type=options.count, default=512, help="positions of the KV cache (512)")
    parser.add_argument("--position", type=options.count, default=16, help="where decoding starts (16)")
    parser.add_argument("--new-tokens", type=options.count, default=128, help="tokens per run (128)")
    parser.add_argument("--runs", type=options.count, default=3, help="measured runs per peer (3)")
    parser.add_argument("--run-seconds", type=options.seconds, default=10.0, help="how long a run may take (10)")
    parser.add_argument("--deadline", type=options.seconds, default=180.0, help="seconds per peer, all included (180)")
    parser.add_argument(
        "--devices", type=options.count, default=1, help="GPUs that share the model, for JAX's peers (1)"
    )
    parser.add_argument("--blocks", type=options.count, help="of the resident program; if absent what is best")
    parser.add_argument("--peers", type=names, default=list(PEERS), help=f"which ones ({','.join(PEERS)})")
    parser.add_argument("--in-turns", action="store_true", help="peers take turns, run by run, with all in memory")
    parser.add_argument("--out", type=Path, help="file for the JSON objects, one a line")
    parser.add_argument("--child", choices=PEERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    try:
        work = work_of(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.child:
        print(json.dumps(measure(arguments.child, work, arguments, await_turn)), flush=True)
        return 0
    rows = []
    with open(arguments.out, "w") if arguments.out else contextlib.nullcontext() as lines:
        for row in in_processes(arguments, sys.argv[1:] if argv is None else argv):
            rows.append(about(arguments) | row)
            for stream in (sys.stdout, *([lines] if lines else [])):
                print(json.dumps(rows[-1]), file=stream, flush=True)
    print_table(rows)
    return 0


def names(text: str) -> list[str]:
    found = [part.strip() for part in text.split(",")]
    if unknown := set(found) - set(PEERS):
        raise argparse.ArgumentTypeError(
            f"no peer is called {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}"
        )
    return found


def work_of(arguments: argparse.Namespace) -> Work:
    config = models.find_config(arguments.model)
    needed = arguments.position + max(FEWEST, arguments.new_tokens)
    if not needed <= arguments.context <= config.max_position_embeddings:
        raise ValueError(
            f"--context must be from {needed}, which position and new tokens take, to the model's "
            f"{config.max_position_embeddings}, not {arguments.context}"
        )
    sizes = {"context": arguments.context, "position": arguments.position}
    return Work(config, arguments.dtype, devices=arguments.devices, blocks=arguments.blocks, **sizes)


def about(arguments: argparse.Namespace) -> dict[str, Any]:
    fields = ("model", "dtype", "context", "position", "devices", "in_turns")
    return {"batch": 1, **{name: getattr(arguments, name) for name in fields}}


def measure(
    name: str, work: Work, arguments: argparse.Namespace, await_turn: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Measures one peer in this process, which awaits its turn before each run."""
    module, _, kind = PEERS[name].partition(":")
    peer: Peer = getattr(importlib.import_module(module), kind)()
    started = time.perf_counter()
    try:
        with stdout_to_stderr():
            peer.setup(work)
            ready = time.perf_counter() - started
            few = peer.tokens_per_s(FEWEST)
            tokens = max(FEWEST, min(arguments.new_tokens, int(few * arguments.run_seconds)))
        speeds = []
        for _ in range(arguments.runs):
            await_turn()
            with stdout_to_stderr():
                speeds.append(peer.tokens_per_s(tokens))
    except Missing as error:
        return {"peer": name, "missing": str(error)}
    return {
        "peer": name,
        "tokens_per_s": statistics.median(speeds),
        "tokens_per_s_min": min(speeds),
        "tokens_per_s_max": max(speeds),
        "each_tokens_per_s": speeds,
        "new_tokens": tokens,
        "runs": len(speeds),
        "setup_s": ready,
        **peer.about(),
    }


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """What compilers and others print, also from below Python, does not mix with the result."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def in_processes(arguments: argparse.Namespace, argv: list[str]) -> Iterator[dict[str, Any]]:
    """Measures the peers in processes of their own, all at once in turns or one after the other."""
    commands = {
        name: [sys.executable, str(Path(__file__).resolve()), *argv, "--child", name] for name in arguments.peers
    }
    groups = [commands] if arguments.in_turns else [{name: command} for name, command in commands.items()]
    for group in groups:
        yield from measure_in_turns(group, arguments.deadline)


def print_table(rows: list[dict[str, Any]]) -> None:
    first = rows[0]
    print(f"\n{first['model']}, {first['dtype']}, batch 1, context {first['context']}, from {first['position']}")
    limit = next((row for row in rows if row["peer"] == "limit" and "tokens_per_s" in row), None)
    print(f"{'peer':12} {'tokens/s':>10} {'lowest':>10} {'highest':>10} {'of limit':>9}  notes")
    for row in rows:
        if "tokens_per_s" not in row:
            print(f"{row['peer']:12} {'-':>10} {'':>10} {'':>10} {'':>9}  {row.get('missing') or row['failed']}")
            continue
        speeds = " ".join(f"{row[f'tokens_per_s{which}']:10.2f}" for which in ("", "_min", "_max"))
        part = f"{part_of(limit, row):9.1%}" if limit else f"{'':9}"
        notes = "; ".join(str(row[key]) for key in ("loop", "compiled", "model_differs", "limit") if row.get(key))
        print(f"{row['peer']:12} {speeds} {part}  {notes}")


def part_of(limit: dict[str, Any], row: dict[str, Any]) -> float:
    """Which part of the limit a peer reaches, or reaches in the median round where they took turns."""
    if not row["in_turns"]:
        return row["tokens_per_s"] / limit["tokens_per_s"]
    pairs = zip(row["each_tokens_per_s"], limit["each_tokens_per_s"], strict=True)
    return statistics.median(speed / most for speed, most in pairs)


if __name__ == "__main__":
    raise SystemExit(main())
