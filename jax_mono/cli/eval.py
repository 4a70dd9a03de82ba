"""``jax-mono eval``: how well a model predicts text, and how many of its programs are right."""

from __future__ import annotations

import argparse
from typing import Any

from jax_mono.cli import eval_bits, eval_humaneval, options

_DESCRIPTION = """\
Evaluates a checkpoint through the resident program.

  jax-mono eval bits -c DIR --text held-out.jsonl.gz
  jax-mono eval humaneval -c DIR --plus HumanEvalPlus.jsonl.gz --out results/

Each explains itself: jax-mono eval bits --help
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Declares the command."""
    parser = subparsers.add_parser(
        "eval",
        help="bits per byte of given text, HumanEval and HumanEval+",
        description=_DESCRIPTION,
        formatter_class=options.Formatter,
    )
    kinds = parser.add_subparsers(title="evaluations", metavar="EVALUATION", required=True)
    for module in (eval_bits, eval_humaneval):
        options.add_message_options(module.add_parser(kinds))
    return parser
