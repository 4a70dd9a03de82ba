"""``jax-mono eval bits``: how well a model predicts given text."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jax_mono.cli import options
from jax_mono.cli.console import counter, print_json, progress

if TYPE_CHECKING:
    import numpy as np

    from jax_mono.evals.bits import Score
    from jax_mono.models.source import WeightSource
    from jax_mono.tokenizer import Tokenizer

_DESCRIPTION = """\
Scores text, each token given the true ones before it, and prints the negative log-likelihood in bits per byte of text,
which models with different tokenizers share.

  jax-mono eval bits -c DIR --text held-out.jsonl.gz
  jax-mono eval bits -c DIR --text src/ README.md --limit-bytes 200000 --json

Text is files, directories (their .py files) and .jsonl or .jsonl.gz files with a "text" in each line. A document longer
than the context is read in windows that overlap by half.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Declares the command."""
    parser = options.command(subparsers, "bits", run, "bits per byte of given text", _DESCRIPTION)
    model = parser.add_argument_group("model")
    options.add_checkpoint_options(model)
    options.add_dtype_option(model)
    options.add_shape_options(model)
    options.add_backend_option(model)
    model.add_argument("--context", metavar="N", type=options.count, default=1024, help="tokens of a window, at most")
    model.add_argument(
        "--start-token",
        metavar="ID",
        type=options.natural,
        help="token before each document; if absent the one that starts, else the one that ends a text",
    )
    text = parser.add_argument_group("text")
    text.add_argument("--text", metavar="PATH", nargs="+", required=True, help="what to score")
    text.add_argument("--limit-bytes", metavar="N", type=options.count, help="end with the document that reaches this")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Scores."""
    from jax_mono.cli.machine import set_up_jax, settle_dtype
    from jax_mono.cli.models import open_weights
    from jax_mono.evals.bits import Bits, add_document, read_documents
    from jax_mono.tokenizer import Tokenizer

    documents = _chosen(read_documents(arguments.text), arguments.limit_bytes)
    if not documents:
        raise ValueError("there is no text; pass files, or directories with .py files, to --text")
    set_up_jax(arguments.form, arguments.devices)
    settle_dtype(arguments, kernel=arguments.backend == "kernel")
    path, source = open_weights(arguments)
    tokenizer = Tokenizer.open(path)
    context = min(arguments.context, source.config.max_position_embeddings)
    if context < 2:
        raise ValueError("--context must be at least 2: a token is scored given one before it")
    start = _start_token(arguments, source, tokenizer)
    score = _score(arguments, source, context)
    bits, started = Bits(), time.perf_counter()
    with counter("scoring", len(documents), quiet=arguments.quiet) as shown:
        for text in documents:
            add_document(bits, text, tokenizer, start, score, context, max(1, context // 2))
            shown(f"{bits.bits_per_byte:.4f} bits/byte")
    seconds = time.perf_counter() - started
    record = {
        "model": arguments.checkpoint,
        "dtype": arguments.dtype,
        "backend": arguments.backend,
        "context": context,
        "start_token": start,
        **bits.record(),
        "seconds": seconds,
    }
    if arguments.json:
        print_json(record)
    else:
        print(
            f"{bits.bits_per_byte:.4f} bits per byte: {bits.bytes} bytes, {bits.tokens} tokens, "
            f"{bits.documents} documents, {seconds:.1f} s"
        )
    return 0


def _chosen(documents: Any, limit: int | None) -> list[str]:
    texts: list[str] = []
    size = 0
    for _, text in documents:
        if limit is not None and size >= limit:
            break
        texts.append(text)
        size += len(text.encode())
    return texts


def _start_token(arguments: argparse.Namespace, source: WeightSource, tokenizer: Tokenizer) -> int | None:
    if arguments.start_token is not None:
        if arguments.start_token >= source.config.vocab_size:
            raise ValueError(f"--start-token {arguments.start_token} is outside the vocabulary")
        return arguments.start_token
    known = (source.config.bos_token_id, tokenizer.bos_id, *tokenizer.eos_ids, *source.config.eos_token_ids)
    return next((token for token in known if token is not None), None)


def _score(arguments: argparse.Namespace, source: WeightSource, context: int) -> Score:
    import jax
    import numpy as np

    from jax_mono.cli.models import as_dtype, pack_decoder, weight_bytes

    if arguments.backend == "kernel":
        decoder = pack_decoder(source, arguments, devices=arguments.devices, form=arguments.form, context=context)
        return lambda tokens: decoder.score(tokens, padded=True).logprobs
    from jax_mono.models.source import read_params
    from jax_mono.models.transformer import Transformer

    dtype = as_dtype(arguments.dtype)
    with progress("reading", weight_bytes(source.config, dtype), quiet=arguments.quiet) as on_tensor:
        params = jax.tree.map(jax.numpy.asarray, read_params(source, dtype, on_tensor))

    @jax.jit
    def logprobs(params: Any, tokens: jax.Array) -> jax.Array:
        logits, _ = Transformer.from_params(source.config, params)(tokens)
        return jax.nn.log_softmax(logits)[jax.numpy.arange(context - 1), tokens[1:]]

    def score(tokens: Sequence[int]) -> np.ndarray:
        padded = np.zeros(context, np.int32)
        padded[: len(tokens)] = tokens
        return np.asarray(logprobs(params, padded))[: len(tokens) - 1]

    return score
