"""``jax-mono trace``: where the time of a token goes, from what a call wrote under ``JAX_MONO_TRACE``."""

from __future__ import annotations

import argparse
from typing import Any

from jax_mono.cli import options
from jax_mono.cli.console import note

_DESCRIPTION = """\
Shows where the time of a token goes: per phase how long the blocks took, and which of them the others waited for.

  JAX_MONO_TRACE=call.trace jax-mono generate --prompt "Hello" --max-new-tokens 32
  jax-mono trace call.trace
  jax-mono trace call.trace --out trace.json --picture token.svg
  jax-mono trace call.trace.*

The last form is for devices with a call each, which write a file each. JAX_MONO_TRACE_TOKENS=FIRST,COUNT chooses the
tokens, counted from the first one that the call feeds; 8,8 if absent. Every call overwrites the file.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Declares the command."""
    parser = options.command(subparsers, "trace", run, "show where the time of a token goes", _DESCRIPTION)
    parser.add_argument("files", metavar="FILE", nargs="+", help="what a call wrote under JAX_MONO_TRACE")
    parser.add_argument("--out", metavar="JSON", help="also write it for https://ui.perfetto.dev or chrome://tracing")
    parser.add_argument("--picture", metavar="FILE", help="also draw one token; .svg or .png chooses the format")
    parser.add_argument("--token", metavar="N", type=int, help="the one to draw; one of median length if absent")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Shows a trace."""
    from jax_mono.trace import draw_token, read_trace, trace_text, write_perfetto

    if arguments.token is not None and not arguments.picture:
        raise ValueError("--token chooses what to draw; add --picture FILE")
    trace = read_trace(*arguments.files)
    print(trace_text(trace))
    if arguments.out:
        write_perfetto(trace, arguments.out)
        note(f"wrote {arguments.out}", quiet=arguments.quiet)
    if arguments.picture:
        draw_token(trace, arguments.picture, arguments.token)
        note(f"wrote {arguments.picture}", quiet=arguments.quiet)
    return 0
