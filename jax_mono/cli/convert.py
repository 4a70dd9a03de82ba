"""``jax-mono convert``: a checkpoint of one format becomes one of another."""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path
from typing import Any

from jax_mono.cli import options
from jax_mono.cli.console import note, progress
from jax_mono.extras import MissingExtraError

_DESCRIPTION = """\
Reads a checkpoint of any format and writes it as a Hugging Face or an Orbax directory, its tokenizer included.

  jax-mono convert model.gguf model-hf --to hf
  jax-mono convert organisation/model model-orbax --to orbax --dtype bfloat16

The directory appears only once it is complete. Quantised GGUF tensors become float32 unless --dtype says otherwise.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Declares the command."""
    parser = options.command(subparsers, "convert", run, "write a checkpoint in another format", _DESCRIPTION)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="as for generate: a path, or a name")
    parser.add_argument("directory", metavar="DIRECTORY", help="where to write")
    parser.add_argument("--to", choices=("hf", "orbax"), required=True, help="the format to write")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of all tensors; what the checkpoint holds if absent",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a directory that has content")
    options.add_reading_options(parser)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Converts."""
    from jax_mono import checkpoint
    from jax_mono.atomic import new_directory
    from jax_mono.cli.machine import set_up_jax
    from jax_mono.cli.models import as_dtype, open_weights
    from jax_mono.models.hf import export_hf
    from jax_mono.models.source import read_params, tensor_shapes

    set_up_jax()
    path, source = open_weights(arguments)
    target = Path(arguments.directory)
    dtype = None if arguments.dtype is None else as_dtype(arguments.dtype)
    total = sum(
        math.prod(shape) * (dtype or source.dtype(name)).itemsize
        for name, shape in tensor_shapes(source.config).items()
    )
    with (
        new_directory(target, overwrite=arguments.overwrite) as fresh,
        progress("converting", total, quiet=arguments.quiet) as on_tensor,
    ):
        if arguments.to == "hf":
            export_hf(source.config, source, fresh, dtype=dtype, on_tensor=on_tensor)
        else:
            checkpoint.save(fresh, source.config, read_params(source, dtype, on_tensor))
        _copy_tokenizer(path, fresh, arguments.quiet)
    note(f"wrote {target}", quiet=arguments.quiet)
    return 0


def _copy_tokenizer(source: Path, directory: Path, quiet: bool) -> None:
    """Puts the tokenizer of a checkpoint beside its weights: copies its files, or writes what a GGUF file describes."""
    from jax_mono.models.hf import COMPANIONS

    for name in COMPANIONS:
        if (source / name).is_file() and not (directory / name).exists():
            shutil.copy(source / name, directory / name)
    if (directory / "tokenizer.json").exists():
        return
    files = [source] if source.is_file() else sorted(source.glob("*.gguf"))
    try:
        if len(files) != 1:
            raise ValueError("there is none")
        _write_tokenizer(files[0], directory)
    except (ValueError, MissingExtraError) as error:
        note(f"the result has no tokenizer: {error}", quiet=quiet)


def _write_tokenizer(file: Path, directory: Path) -> None:
    from jax_mono.models.gguf_file import GGUFFile
    from jax_mono.tokenizer_gguf import build

    parts = build(GGUFFile(file))
    parts["backend"].save(str(directory / "tokenizer.json"))
    config = {**parts["special_tokens"], "add_bos_token": parts["add_bos"]}
    if parts["chat_template"] is not None:
        config["chat_template"] = parts["chat_template"]
    _write_json(directory / "tokenizer_config.json", config)
    _write_json(directory / "generation_config.json", {"eos_token_id": list(parts["eos_ids"])})


def _write_json(file: Path, record: dict[str, Any]) -> None:
    file.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
