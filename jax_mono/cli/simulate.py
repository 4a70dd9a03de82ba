"""``jax-mono simulate``: how fast a model should be on devices that need not be here."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING, Any

from jax_mono.cli import options
from jax_mono.cli.console import note

if TYPE_CHECKING:
    from jax_mono.config import ModelConfig
    from jax_mono.simulate import Timing
    from jax_mono.simulate.predict import Prediction

_DESCRIPTION = """\
Plays a plan against what is known of a device, block by block and hand-off by hand-off, and predicts the time of a
token.

  jax-mono simulate laneformer-2b --device h200
  jax-mono simulate laneformer-2b --device h200 --devices 4 --out trace.json --picture token.svg
  jax-mono simulate laneformer-2b --device mi300x --devices 8 --handoff-us 1 --bandwidth 4.4
  jax-mono simulate laneformer-2b --device mi300x --devices 8 --sensitivity
  jax-mono simulate --device mi300x --growth
  jax-mono simulate --device mi300x --parameters

docs/simulator.md tells what the model leaves out, and how far its predictions were from measurements.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Declares the command."""
    parser = options.command(
        subparsers, "simulate", run, "predict the speed of devices that are not here", _DESCRIPTION
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", default="laneformer-2b", help="a preset or a checkpoint")
    options.add_reading_options(parser)
    parser.add_argument("--device", choices=("h100", "h200", "mi300x"), default="mi300x", help="what it runs on")
    parser.add_argument("--devices", metavar="N", type=options.count, default=1, help="how many share the model")
    parser.add_argument(
        "--groups",
        metavar="N",
        type=options.count,
        help="groups of blocks per device, each with its share of the model; as the program would choose if absent",
    )
    parser.add_argument(
        "--blocks", metavar="N", type=options.count, help="per group; as the program would choose if absent"
    )
    parser.add_argument(
        "--placement",
        choices=("auto", "off"),
        default="auto",
        help="whether tapes lie on the blocks' own sides of a device of several dies",
    )
    parser.add_argument(
        "--program",
        choices=("resident", "skeleton"),
        default="resident",
        help="the resident program, or one that moves the same bytes without arithmetic",
    )
    parser.add_argument("--position", metavar="N", type=options.count, default=48, help="of the tokens in the sequence")
    parser.add_argument(
        "--delay", metavar="N", type=int, help="layers between a lane's sums and the others; not the model's"
    )
    parser.add_argument("--handoff-us", metavar="T", type=float, help="an idle hand-off on one device takes so long")
    parser.add_argument("--code-us", metavar="T", type=float, help="64 instructions take so long; 0 for none")
    parser.add_argument("--bandwidth", metavar="TB/S", type=float, help="of the memory of a device")
    parser.add_argument("--out", metavar="JSON", help="also write the trace for https://ui.perfetto.dev")
    parser.add_argument("--picture", metavar="FILE", help="also draw a token; .svg or .png chooses the format")
    parser.add_argument("--json", action="store_true", help="print the prediction and the parameters as JSON")
    tables = parser.add_mutually_exclusive_group()
    tables.add_argument(
        "--sensitivity", action="store_true", help="instead a table over hand-off and bandwidth; minutes"
    )
    tables.add_argument("--growth", action="store_true", help="instead a table over models and devices; minutes")
    tables.add_argument("--parameters", action="store_true", help="instead what is known of the device, and from where")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Predicts."""
    from jax_mono.simulate import timing
    from jax_mono.simulate.predict import with_code, with_rate

    known = timing(arguments.device, arguments.program)
    if arguments.handoff_us is not None:
        if arguments.handoff_us <= 0:
            raise ValueError(f"--handoff-us is {arguments.handoff_us:g}, must be positive")
        known = known.with_handoff(1e3 * arguments.handoff_us)
    if arguments.code_us is not None:
        if arguments.code_us < 0:
            raise ValueError(f"--code-us is {arguments.code_us:g}, must not be negative")
        known = with_code(known, arguments.code_us)
    if arguments.bandwidth is not None:
        if arguments.bandwidth <= 0:
            raise ValueError(f"--bandwidth is {arguments.bandwidth:g}, must be positive")
        known = with_rate(known, arguments.bandwidth)
    if arguments.parameters:
        print(_parameters(known))
    elif arguments.growth:
        _growth(known, arguments.quiet)
    elif arguments.sensitivity:
        _sensitivity(_config(arguments), arguments.devices, known, arguments.quiet)
    else:
        _one(_config(arguments), known, arguments)
    return 0


def _config(arguments: argparse.Namespace) -> ModelConfig:
    from jax_mono.cli.models import find_config

    config = find_config(arguments.model, revision=arguments.revision, ignore_keys=arguments.ignore_key)
    if arguments.delay is None:
        return config
    if config.lanes is None:
        raise ValueError("--delay needs a model with lanes; the sums of others are never delayed")
    return dataclasses.replace(config, lanes=dataclasses.replace(config.lanes, delay=arguments.delay))


def _one(config: ModelConfig, known: Timing, arguments: argparse.Namespace) -> None:
    from jax_mono.simulate import simulate
    from jax_mono.simulate.predict import plan_on
    from jax_mono.trace import draw_token, trace_text, write_perfetto

    plan, groups = plan_on(
        config,
        known,
        gpus=arguments.devices,
        groups=arguments.groups,
        blocks=arguments.blocks,
        placed=arguments.placement == "auto",
    )
    made = simulate(plan, known, groups=groups, position=arguments.position)
    if arguments.json:
        numbers = {
            "device": known.topology.name,
            "devices": arguments.devices,
            "groups": groups,
            "blocks": plan.num_blocks,
            "placed": plan.placement.interleaved,
            "program": known.program.name,
            "tokens_per_second": made.tokens_per_second,
            "token_us": made.token_ns / 1e3,
            "stream_us": made.stream_ns / 1e3,
            "parameters": {name: dataclasses.asdict(parameter) for name, parameter in known.parameters().items()},
        }
        print(json.dumps(numbers, indent=2))
    else:
        print(
            f"{arguments.devices} × {known.topology.name}, {known.program.name}: {made.tokens_per_second:,.0f} tok/s "
            f"predicted, {1e9 / made.stream_ns:,.0f} if only the tapes counted\n"
        )
        print(trace_text(made.trace))
    if arguments.out:
        write_perfetto(made.trace, arguments.out)
        note(f"wrote {arguments.out}", quiet=arguments.quiet)
    if arguments.picture:
        draw_token(made.trace, arguments.picture)
        note(f"wrote {arguments.picture}", quiet=arguments.quiet)


def _parameters(known: Timing) -> str:
    lines = [f"{known.topology.name}, {known.program.name}; bytes, nanoseconds, GB/s", ""]
    for name, parameter in known.parameters().items():
        lines.append(f"  {name:<14}{parameter.value:>12,.4g}  {parameter.origin:<9} {parameter.note}")
    return "\n".join(lines)


def _sensitivity(config: ModelConfig, devices: int, known: Timing, quiet: bool) -> None:
    from jax_mono.simulate.predict import needed_handoff, sensitivity

    table = sensitivity(config, devices, known, report=lambda what: note(what, quiet=quiet))
    handoffs, rates = sorted({key[0] for key in table}), sorted({key[1] for key in table})
    print(f"{devices} × {known.topology.name}, {known.program.name}: tok/s by idle hand-off and bandwidth per device\n")
    print("  hand-off, µs" + "".join(f"{rate:>7.1f} TB/s" for rate in rates))
    for handoff in handoffs:
        print(f"  {handoff:>12.1f}" + "".join(_cell(table[handoff, rate]) for rate in rates))
    print("  tapes' limit" + "".join(f"{table[handoffs[0], rate].floor:>12,.0f}" for rate in rates))
    needed = [needed_handoff(table, rate, 3300) for rate in rates]
    print(" for 3,300, µs" + "".join(f"{'none' if at is None else f'{at:.2f}':>12}" for at in needed))


def _growth(known: Timing, quiet: bool) -> None:
    from jax_mono.simulate.predict import grow

    table = grow(known, report=lambda what: note(what, quiet=quiet))
    names, counts = list(dict.fromkeys(key[0] for key in table)), sorted({key[1] for key in table})
    print(f"{known.topology.name}, {known.program.name}: tok/s, and in brackets if only the tapes counted\n")
    print(" " * 24 + "".join(f"{f'{count} devices':>20}" for count in counts))
    for name in names:
        row = f"  {name:<22}"
        for count in counts:
            made = table[name, count]
            row += f"{'–' if made is None else f'{made.tokens_per_second:,.0f} ({made.floor:,.0f})':>20}"
        print(row)


def _cell(made: Prediction) -> str:
    return f"{made.tokens_per_second:>12,.0f}"
