"""Trains mini-coder and its twins, evaluates them on the held-out text, and exports the model that ships.

    python scripts/prepare_mini_coder.py --out data/mini-coder      # once; minutes
    python scripts/train_mini_coder.py --data data/mini-coder --out runs --minutes 20
    python scripts/train_mini_coder.py --estimate

The twins are three models of the same size, with the same data, seed and steps, whose lanes add each other's outputs
two layers later, at once, or never. mini-coder is the first of them, trained longer. With --minutes, a few steps are
timed first, and the numbers of steps follow from that; they are kept in OUT/steps.json. Without, --twin-steps and
--ship-steps say them. The same command again goes on where it was ended.

    OUT/delay-2, OUT/delay-0, OUT/none, OUT/mini-coder    settings.json, log.jsonl, checkpoints/, result.json
    OUT/twins.json, twins.md, twins.svg                   held-out bits per byte and training losses
    OUT/mini-coder/loss.svg, OUT/mini-coder/model/        safetensors in bfloat16, config.json, tokenizer

JAX's devices share a batch. Needs pip install 'jax-mono[train]' and, for GPUs, 'jax[cuda13]'.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from mini_coder import results
from mini_coder.recipe import COMMUNICATIONS, Settings, flops_per_token, mini_coder, toy
from mini_coder.run import RunError, evaluate, read_log, speed, train

from jax_mono.cli.console import counter

SHIPPED = "mini-coder"
PROBE_STEPS = 12
SHARE = {"twin": 0.15, "ship": 0.55}
"""Of the time for steps: each of the three twins, and the model that ships."""
OVERHEAD = 20.0
"""Seconds per run beside compiling and steps: the last checkpoint and the evaluation. An estimate."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="directory that prepare_mini_coder.py has written")
    parser.add_argument("--out", type=Path, help="directory of the runs")
    parser.add_argument("--only", choices=(*COMMUNICATIONS, SHIPPED), help="one run instead of all")
    parser.add_argument("--estimate", action="store_true", help="print sizes and operations, and stop")
    parser.add_argument("--minutes", type=float, help="time for everything; sets the numbers of steps")
    parser.add_argument("--twin-steps", type=int, default=600, help="steps of each twin (600)")
    parser.add_argument("--ship-steps", type=int, default=2400, help="steps of mini-coder (2400)")
    parser.add_argument("--batch", type=int, default=64, help="sequences of 1024 tokens per step (64)")
    parser.add_argument("--micro", type=int, default=16, help="sequences per device at a time (16)")
    parser.add_argument("--peak", type=float, default=2e-3, help="largest learning rate (0.002)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compute", choices=("bfloat16", "float32"), default="bfloat16", help="of matrix products")
    parser.add_argument("--attention", choices=("cudnn", "xla"), help="if absent cudnn on GPUs, else xla")
    parser.add_argument("--remat", action="store_true", help="less memory, a third more work")
    parser.add_argument("--devices", type=int, help="how many of JAX's devices to use; all if absent")
    parser.add_argument("--save-every", type=int, default=500, help="steps between checkpoints (500)")
    parser.add_argument("--toy", action="store_true", help="tiny models and sequences, to try this out")
    arguments = parser.parse_args()
    if arguments.estimate:
        estimate()
        return 0
    if arguments.data is None or arguments.out is None:
        parser.error("--data and --out are needed")
    try:
        everything(arguments)
    except (RunError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def estimate() -> None:
    config = mini_coder()
    flops = flops_per_token(config, config.max_position_embeddings)
    print(f"{config.num_parameters:,} parameters, {2 * config.num_parameters / 1e6:.2f} MB in bfloat16")
    print(f"{flops / 1e6:.1f} MFLOP per token of training; twins alike")
    for twin, ship in ((600, 2400), (1000, 4000)):
        tokens = 65536 * (3 * twin + ship)
        print(
            f"{twin} steps per twin and {ship} of mini-coder: {tokens / 1e6:.0f} M tokens, {tokens * flops / 1e15:.1f} "
            f"PFLOP; at 50 TFLOP/s {tokens * flops / 50e12 / 60:.0f} min, at 100 {tokens * flops / 100e12 / 60:.0f} min"
        )


def base_settings(arguments: argparse.Namespace) -> Settings:
    gpu = jax.default_backend() == "gpu"
    attention = arguments.attention or ("cudnn" if gpu and arguments.compute == "bfloat16" else "xla")
    return Settings(
        steps=1,
        batch=arguments.batch,
        micro=arguments.micro,
        length=64 if arguments.toy else 1024,
        peak=arguments.peak,
        seed=arguments.seed,
        compute=arguments.compute,
        attention=attention,
        remat=arguments.remat,
    )


def model(arguments: argparse.Namespace, communication: Any) -> Any:
    config = (toy if arguments.toy else mini_coder)(communication)
    manifest = json.loads((arguments.data / "manifest.json").read_text())
    if manifest["vocabulary"] != config.vocab_size:
        if not arguments.toy:
            raise ValueError(f"the data has {manifest['vocabulary']} tokens, the model {config.vocab_size}")
        config = config.replace(vocab_size=manifest["vocabulary"])
    return config


def everything(arguments: argparse.Namespace) -> None:
    arguments.out.mkdir(parents=True, exist_ok=True)
    steps = chosen_steps(arguments)
    names = (arguments.only,) if arguments.only else (*COMMUNICATIONS, SHIPPED)
    for name in names:
        one_run(arguments, name, steps["ship" if name == SHIPPED else "twin"])
    done = {name: arguments.out / name / "result.json" for name in COMMUNICATIONS}
    if all(file.exists() for file in done.values()):
        records = {name: json.loads(file.read_text()) for name, file in done.items()}
        results.write_json(arguments.out / "twins.json", records)
        (arguments.out / "twins.md").write_text(results.twin_table(records))
        logs = {name: read_log(arguments.out / name) for name in COMMUNICATIONS}
        results.plot_losses(logs, arguments.out / "twins.svg", "The twins: same size, data, seed and steps")
        print(results.twin_table(records), end="")


def one_run(arguments: argparse.Namespace, name: str, steps: int) -> None:
    config = model(arguments, "delay-2" if name == SHIPPED else name)
    settings, directory = base_settings(arguments).replace(steps=steps), arguments.out / name
    with counter(name, steps, quiet=False) as shown:
        state = train(
            config,
            settings,
            arguments.data,
            directory,
            devices=arguments.devices,
            save_every=arguments.save_every,
            report=lambda row: shown(f"loss {row['loss']:.3f}"),
        )
    record = evaluate(config, settings, state, arguments.data, directory, devices=arguments.devices)
    print(f"{name}: {json.dumps(record)}", flush=True)
    results.plot_losses({name: read_log(directory)}, directory / "loss.svg", name)
    if name == SHIPPED:
        size = results.export(config, state.params, arguments.data / "tokenizer", directory / "model")
        print(f"{directory / 'model'}: {size / 1e6:.2f} MB of weights", flush=True)


def chosen_steps(arguments: argparse.Namespace) -> dict[str, int]:
    """Steps of a twin and of mini-coder; from a short run if there is a time limit."""
    if arguments.minutes is None:
        return {"twin": arguments.twin_steps, "ship": arguments.ship_steps}
    file = arguments.out / "steps.json"
    if file.exists():
        return json.loads(file.read_text())
    config, settings = model(arguments, "delay-2"), base_settings(arguments).replace(steps=PROBE_STEPS)
    started = time.time()
    with tempfile.TemporaryDirectory() as scratch:
        train(config, settings, arguments.data, Path(scratch), devices=arguments.devices)
        rows = read_log(Path(scratch))
    probe = time.time() - started
    per_s = speed(config, settings, rows)["tokens_per_s"]
    step = settings.batch * settings.length / per_s
    compiling = max(0.0, probe - PROBE_STEPS * step)
    left = 60.0 * arguments.minutes - probe - 4 * (compiling + OVERHEAD)
    if left * SHARE["twin"] < PROBE_STEPS * step:
        raise ValueError(
            f"{arguments.minutes} minutes are too few: a run compiles for {compiling:.0f} s, a step takes {step:.2f} s"
        )
    steps = {name: int(left * share / step) for name, share in SHARE.items()}
    results.write_json(file, steps)
    print(f"{per_s / 1e3:.0f} k tokens/s, compiling {compiling:.0f} s: {steps}", flush=True)
    return steps


if __name__ == "__main__":
    raise SystemExit(main())
