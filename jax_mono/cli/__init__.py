"""The command ``jax-mono``: one module per subcommand, and here what they have in common when they fail.

Modules import JAX inside their commands only, so that help is instant and JAX can still be set up.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from jax_mono import __version__
from jax_mono.cli.options import Formatter, add_message_options
from jax_mono.extras import MissingExtraError

COMMANDS = (
    "generate",
    "chat",
    "serve",
    "logits",
    "parity",
    "eval",
    "bench",
    "plan",
    "simulate",
    "trace",
    "convert",
    "doctor",
    "bringup",
)

BAD_INPUT = 2
"""Exit code: what was asked for makes no sense; nothing was run."""
FAILED = 1
"""Exit code: it made sense and failed."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""
PIPE_CLOSED = 141
"""Exit code when nobody reads the output any more, as shells have it."""

# ConfigError, CheckpointError and TokenizerError are ValueErrors.
_BAD_INPUT_ERRORS = (
    ValueError,
    MissingExtraError,
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)
# NativeError and JaxRuntimeError are RuntimeErrors.
_FAILURES = (RuntimeError, OSError, MemoryError)

_DESCRIPTION = """\
Runs language models under JAX as one resident kernel: one launch per generation.

Start with

  jax-mono doctor                          what this machine can run, and why not
  jax-mono generate --prompt "class A:"    code from mini-coder, which comes with jax-mono
  jax-mono generate -c DIR --prompt "..."  text from a Hugging Face, GGUF or Orbax checkpoint
  jax-mono chat                            a conversation in the terminal
  jax-mono serve                           a page to try it on, and an OpenAI-compatible API

Every command explains itself: jax-mono COMMAND --help
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: Arguments without the name of the program; None takes those of the process.

    Returns:
        The exit code: 0, or 2 for bad input, 1 for a failure while running (also a comparison that does not hold) and
        130 after Ctrl-C.
    """
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as exit:  # argparse has printed what was wrong, or the help
        return exit.code if isinstance(exit.code, int) else BAD_INPUT
    try:
        code = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("jax-mono: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes stdout once more on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except Exception as error:
        code = _exit_code(error)
        if code is None or arguments.debug:
            raise
        print(f"jax-mono: error: {_one_line(error)}", file=sys.stderr)
        return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jax-mono", description=_DESCRIPTION, formatter_class=Formatter)
    parser.add_argument("--version", action="version", version=f"jax-mono {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        add_message_options(importlib.import_module(f"jax_mono.cli.{name}").add_parser(subparsers))
    return parser


def _exit_code(error: Exception) -> int | None:
    """The exit code of an error that a user can act on; None for a bug, whose traceback should be seen."""
    if isinstance(error, _BAD_INPUT_ERRORS):
        return BAD_INPUT
    if isinstance(error, _FAILURES):
        return FAILED
    return None


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror[:1].lower()}{error.strerror[1:]}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
