"""``python -m jax_mono.gfx942``: the program of a model for MI300X as a code object or as assembly."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from jax_mono.cli import options
from jax_mono.cli.models import find_config
from jax_mono.cut import default_blocks
from jax_mono.extras import MissingExtraError
from jax_mono.gfx942.listing import kernels
from jax_mono.gfx942.toolchain import (
    COMPUTE_UNITS,
    CompilerError,
    Toolchain,
    assembly,
    code_object,
    debian,
    ziglang,
)
from jax_mono.gpus import DTYPES
from jax_mono.native import NativeError
from jax_mono.plan import GPU, make_plan
from jax_mono.topology import MI300X

_DESCRIPTION = """\
Compiles the resident program of a model for AMD's MI300X. Needs neither ROCm nor a GPU, but pip install ziglang.

  python -m jax_mono.gfx942 --model laneformer-2b --out program.hsaco
  python -m jax_mono.gfx942 --model qwen3-8b --devices 4 --listing --out program.s
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Compiles a program and says what it takes.

    Args:
        argv: Arguments without the name of the program; None takes those of the process.

    Returns:
        The exit code: 0; 2 where the request makes no sense or something is not installed; 1 where a compiler refuses.
    """
    arguments = _parser().parse_args(argv)
    try:
        _write(arguments)
    except (ValueError, OSError, MissingExtraError) as error:
        return _complain(error, 2)
    except (NativeError, CompilerError) as error:
        return _complain(error, 1)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m jax_mono.gfx942", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a preset, or a checkpoint whose configuration is read")
    parser.add_argument("--devices", metavar="N", type=options.count, default=8, help="GPUs that share the model (8)")
    parser.add_argument(
        "--blocks",
        metavar="N",
        type=options.count,
        help=f"blocks per GPU; if absent {COMPUTE_UNITS}, or as many as the model can employ",
    )
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of the weights (bfloat16)")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="where to write")
    parser.add_argument("--listing", action="store_true", help="write assembly instead of the code object")
    parser.add_argument(
        "--compiler", metavar="CLANG", help="a clang of the system, such as clang-19, instead of ziglang's"
    )
    return parser


def _write(arguments: argparse.Namespace) -> None:
    toolchain: Toolchain = debian(arguments.compiler) if arguments.compiler else ziglang()
    config = find_config(arguments.model)
    blocks = arguments.blocks or default_blocks(config, 1, COMPUTE_UNITS)
    plan = make_plan(config, devices=arguments.devices, blocks=blocks, target=GPU, topology=MI300X)
    listing = assembly(plan, arguments.dtype, toolchain)
    arguments.out.write_bytes(listing.encode() if arguments.listing else code_object(listing, toolchain))
    for kernel in kernels(listing).values():
        print(kernel, file=sys.stderr)


def _complain(error: Exception, code: int) -> int:
    print(f"python -m jax_mono.gfx942: error: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
