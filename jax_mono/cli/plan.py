"""``jax-mono plan``: what every block will do, as a table and as a picture."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from jax_mono.cli import options
from jax_mono.cli.console import note

if TYPE_CHECKING:
    from jax_mono.config import ModelConfig
    from jax_mono.topology import Topology

_DESCRIPTION = """\
Shows how a model is shared among devices and their blocks: heads, neurons, vocabulary, bytes per token.

  jax-mono plan laneformer-2b --devices 8 --blocks 4
  jax-mono plan laneformer-2b --target gpu --blocks 132
  jax-mono plan laneformer-2b --devices 8 --topology mi300x
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
        "--blocks",
        metavar="N",
        type=options.count,
        help="blocks per device; if absent this process's cores, or the multiprocessors of the GPU, are shared among "
        "the devices",
    )
    parser.add_argument(
        "--target",
        choices=("cpu", "gpu"),
        help="what is planned for, which need not be here; what JAX uses here if absent",
    )
    parser.add_argument(
        "--topology",
        metavar="NAME",
        help="a kind of GPU that is planned for: mi300x, h200, …; it need not be here, and has a block on every "
        "compute unit that the model can employ",
    )
    parser.add_argument("--out", metavar="FILE", help="also draw it; the suffix chooses the format: .svg or .png")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Shows a plan."""
    from jax_mono.cli.models import find_config
    from jax_mono.cut import default_blocks, default_devices
    from jax_mono.draw import draw_plan, plan_text
    from jax_mono.plan import CPU, GPU, make_plan

    topology = _topology(arguments.topology)
    target = arguments.target or ("gpu" if topology else _target_here())
    config = find_config(arguments.model, revision=arguments.revision, ignore_keys=arguments.ignore_key)
    alone = target == "cpu" and arguments.blocks is None
    devices = arguments.devices or (default_devices(config) if alone else 1)
    units = topology.units if topology else None
    blocks = arguments.blocks or (default_blocks(config, 1, units) if units else _blocks(config, devices, target))
    plan = make_plan(config, devices=devices, blocks=blocks, target=CPU if target == "cpu" else GPU, topology=topology)
    print(plan_text(plan))
    if arguments.out:
        draw_plan(plan, arguments.out)
        note(f"wrote {arguments.out}", quiet=arguments.quiet)
    return 0


def _topology(name: str | None) -> Topology | None:
    """What is known of a kind of GPU.

    Raises:
        ConfigError: Nothing.
    """
    from jax_mono.config import ConfigError
    from jax_mono.topology import TOPOLOGIES

    gpus = {key: topology for key, topology in TOPOLOGIES.items() if topology.architecture != "host"}
    if name is None or name in gpus:
        return None if name is None else gpus[name]
    raise ConfigError(f"there is no topology {name!r}, only {', '.join(gpus)}")


def _target_here() -> str:
    from jax_mono.cli.machine import set_up_jax
    from jax_mono.cut import target_of
    from jax_mono.packing import home

    set_up_jax()
    return target_of(home()).name


def _blocks(config: ModelConfig, devices: int, target: str) -> int:
    """Blocks per device unless asked otherwise.

    Raises:
        ConfigError: There is no GPU to count the multiprocessors of.
    """
    from jax_mono import native
    from jax_mono.config import ConfigError
    from jax_mono.cut import default_blocks

    if target == "cpu":
        return default_blocks(config, devices)
    for platform in native.GPU_PLATFORMS:
        for gpu in native.gpu_report(platform).gpus:
            return default_blocks(config, devices, gpu.multiprocessors)
    raise ConfigError("there is no GPU here whose multiprocessors could be counted; add --blocks, 132 for an H100")
