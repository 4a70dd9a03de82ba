"""``jax-mono plan``: what every block will do, as a table and as a picture."""

from __future__ import annotations

import argparse
from typing import Any

from jax_mono.cli import options
from jax_mono.cli.console import note

_DESCRIPTION = """\
Shows how a model is shared among devices and their blocks: heads, neurons, vocabulary, bytes per token.

  jax-mono plan laneformer-2b --devices 8 --blocks 4
  jax-mono plan smollm2-135m --blocks 2 --out plan.svg
  jax-mono plan DIR --devices 2

MODEL is a preset, tiny, tiny-laneformer, or a checkpoint, of which only the configuration is read.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Declares the command."""
    parser = options.command(subparsers, "plan", run, "show which block owns what", _DESCRIPTION)
    parser.add_argument("model", metavar="MODEL", help="a preset or a checkpoint")
    options.add_reading_options(parser)
    parser.add_argument("--devices", metavar="N", type=options.count, default=1, help="devices that share the model")
    parser.add_argument(
        "--blocks", metavar="N", type=options.count, help="blocks per device; this process's cores if absent"
    )
    parser.add_argument("--out", metavar="FILE", help="also draw it; the suffix chooses the format: .svg or .png")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Shows a plan."""
    from jax_mono.cli.machine import set_up_jax
    from jax_mono.cli.models import find_config
    from jax_mono.decoder import default_blocks
    from jax_mono.draw import draw_plan, plan_text
    from jax_mono.plan import make_plan

    set_up_jax()
    config = find_config(arguments.model, revision=arguments.revision, ignore_keys=arguments.ignore_key)
    blocks = arguments.blocks or default_blocks(config, arguments.devices)
    plan = make_plan(config, devices=arguments.devices, blocks=blocks)
    print(plan_text(plan))
    if arguments.out:
        draw_plan(plan, arguments.out)
        note(f"wrote {arguments.out}", quiet=arguments.quiet)
    return 0
