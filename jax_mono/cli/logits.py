"""``jax-mono logits``: what a model says about given tokens."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_mono.cli import options
from jax_mono.cli.console import note, progress

if TYPE_CHECKING:
    import numpy as np

_DESCRIPTION = """\
Feeds given tokens to a model and writes the logits after each of them (teacher forcing).

  python -c "import numpy as np; np.save('t.npy', np.arange(16))"
  jax-mono logits -c DIR --tokens-file t.npy --out kernel.npy
  jax-mono logits -c DIR --tokens-file t.npy --out flax.npy --backend flax
  python -c "import numpy as np; print(abs(np.load('kernel.npy') - np.load('flax.npy')).max())"

T.npy holds T token ids: one dimension, whole numbers. The result is float32 [T, vocabulary]; row t is about the token
that follows token t.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Declares the command."""
    parser = options.command(subparsers, "logits", run, "write the logits of given tokens", _DESCRIPTION)
    options.add_checkpoint_options(parser)
    parser.add_argument("--tokens-file", metavar="T.npy", required=True, help="the tokens")
    parser.add_argument("--out", metavar="L.npy", required=True, help="where to write the logits")
    options.add_backend_option(parser)
    options.add_dtype_option(parser, exact=True)
    options.add_shape_options(parser)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Writes the logits."""
    import numpy as np

    from jax_mono.cli.machine import set_up_jax, settle_dtype
    from jax_mono.cli.models import open_weights, read_tokens

    out = Path(arguments.out)
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out.parent}: no such directory; --out needs an existing one")
    set_up_jax(arguments.form, arguments.devices)
    settle_dtype(arguments, kernel=arguments.backend == "kernel")
    _, source = open_weights(arguments)
    tokens = read_tokens(arguments.tokens_file, source.config.vocab_size)
    longest = source.config.max_position_embeddings
    if len(tokens) > longest:
        raise ValueError(f"{arguments.tokens_file}: {len(tokens)} tokens are beyond the model's context of {longest}")
    logits = _flax(arguments, source, tokens) if arguments.backend == "flax" else _kernel(arguments, source, tokens)
    with out.open("wb") as file:  # given a name, numpy.save would add .npy to it
        np.save(file, logits)
    note(f"wrote {logits.dtype} {list(logits.shape)} to {out}", quiet=arguments.quiet)
    return 0


def _flax(arguments: argparse.Namespace, source: Any, tokens: list[int]) -> np.ndarray:
    from jax_mono.cli.flax_decoder import FlaxDecoder
    from jax_mono.cli.models import as_dtype, weight_bytes

    dtype = as_dtype(arguments.dtype)
    with progress("reading", weight_bytes(source.config, dtype), quiet=arguments.quiet) as on_tensor:
        decoder = FlaxDecoder.from_source(source, dtype=dtype, context=len(tokens), on_tensor=on_tensor)
    return decoder.forward(tokens)[0]


def _kernel(arguments: argparse.Namespace, source: Any, tokens: list[int]) -> np.ndarray:
    from jax_mono.cli.models import pack_decoder

    # Scores need two tokens. What follows a token does not change its logits.
    fed = tokens if len(tokens) > 1 else tokens * 2
    decoder = pack_decoder(source, arguments, devices=arguments.devices, form=arguments.form, context=len(fed))
    return decoder.score(fed, logits=True).logits[: len(tokens)]
