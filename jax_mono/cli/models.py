"""From what a user calls a model to its configuration, its weights, its tokenizer, and a decoder."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jax_mono.config import ConfigError, Lanes, ModelConfig

if TYPE_CHECKING:
    import numpy as np

    from jax_mono.decoder import Decoder
    from jax_mono.models.source import WeightSource
    from jax_mono.tokenizer import Tokenizer

TINY = {
    "tiny": ModelConfig(
        family="llama",
        vocab_size=256,
        hidden_size=64,
        intermediate_size=192,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_position_embeddings=512,
    ),
    "tiny-laneformer": ModelConfig(
        family="laneformer",
        vocab_size=256,
        hidden_size=64,
        intermediate_size=192,
        num_layers=6,
        num_heads=16,
        num_kv_heads=8,
        head_dim=8,
        max_position_embeddings=512,
        rope_interleaved=True,
        sliding_windows=(16, 16, 16, 16, 0, 0),
        lanes=Lanes(count=8, delay=2),
    ),
}
"""Models that are only good for trying things out; with random weights, for there are no others."""


def find_config(name: str, *, revision: str | None = None, ignore_keys: Collection[str] = ()) -> ModelConfig:
    """Looks up a configuration: a tiny model, a preset, or that of a checkpoint, whose weights need not be there.

    Args:
        name: What the user calls the model.
        revision: See :func:`jax_mono.hub.resolve`.
        ignore_keys: See :func:`jax_mono.checkpoint.open_checkpoint`.

    Returns:
        The configuration.

    Raises:
        ConfigError: No preset has this name, and it does not look like a path or a hub name.
        CheckpointError: There is no such checkpoint.
    """
    from jax_mono.checkpoint import open_checkpoint
    from jax_mono.hub import PACKAGED, resolve
    from jax_mono.models.hf_config import from_hf_config
    from jax_mono.models.presets import PRESETS, preset
    from jax_mono.models.safetensors_file import read_json

    path = Path(name).expanduser()
    if not path.exists():
        if name.lower() in TINY:
            return TINY[name.lower()]
        if name.lower() in PRESETS or (os.sep not in name and name not in PACKAGED):
            return preset(name)
    path = resolve(name, revision=revision)
    file = path / "config.json"
    if file.is_file():
        return from_hf_config(read_json(file), ignore_keys=ignore_keys, where=str(file))
    return open_checkpoint(path, ignore_keys=ignore_keys).config


def open_weights(arguments: argparse.Namespace) -> tuple[Path, WeightSource]:
    """Opens the checkpoint that ``--checkpoint`` names.

    Returns:
        Where it lies, and the checkpoint.

    Raises:
        CheckpointError: There is no such checkpoint.
    """
    from jax_mono.checkpoint import open_checkpoint
    from jax_mono.hub import resolve

    path = resolve(arguments.checkpoint, revision=arguments.revision)
    return path, open_checkpoint(path, ignore_keys=arguments.ignore_key)


def open_model(arguments: argparse.Namespace) -> WeightSource:
    """Opens what ``--model`` names, with random weights if ``--random-weights`` says so.

    Raises:
        ConfigError: The model has no weights of its own, and random ones were not asked for.
        CheckpointError: There is no such checkpoint.
    """
    from jax_mono.checkpoint import open_checkpoint
    from jax_mono.hub import PACKAGED, resolve
    from jax_mono.models.random_source import RandomSource

    name = arguments.model
    reading = {"revision": arguments.revision, "ignore_keys": arguments.ignore_key}
    if arguments.random_weights:
        return RandomSource(find_config(name, **reading), arguments.seed)
    if not Path(name).expanduser().exists() and os.sep not in name and name not in PACKAGED:
        find_config(name, **reading)  # explains what is wrong with the name, if anything is
        raise ConfigError(f"{name!r} is a configuration without weights; add --random-weights or name a checkpoint")
    return open_checkpoint(resolve(name, revision=arguments.revision), ignore_keys=arguments.ignore_key)


def weight_bytes(config: ModelConfig, dtype: np.dtype) -> int:
    """Size of all tensors of a model."""
    from jax_mono.models.source import tensor_shapes

    return sum(math.prod(shape) for shape in tensor_shapes(config).values()) * dtype.itemsize


def pack_decoder(
    source: WeightSource,
    arguments: argparse.Namespace,
    *,
    devices: int | None,
    form: str,
    context: int,
    tokenizer: Tokenizer | None = None,
) -> Decoder:
    """Packs a model for the kernel, with progress.

    Args:
        source: The weights.
        arguments: ``dtype``, ``blocks``, ``compress`` and ``quiet`` count.
        devices: Devices that share the model; None takes what is best for this form.
        form: ``threads`` or ``mesh``.
        context: Tokens that a conversation may have.
        tokenizer: For prompts given as text.

    Returns:
        The decoder.

    Raises:
        ConfigError: The model cannot be cut like this, has no program for such weights, or JAX has too few devices.
        CheckpointError: A tensor cannot be read.
    """
    import jax

    from jax_mono.cli.console import note, progress
    from jax_mono.cli.machine import device_mesh
    from jax_mono.decoder import Decoder

    dtype = as_dtype(arguments.dtype)
    found = jax.devices()
    if form == "threads" and (devices or 1) > 1 and len(found) > 1 and found[0].platform != "cpu":
        note(f"the {devices} devices share one GPU; --form mesh takes one each", quiet=arguments.quiet)
    with progress("packing", weight_bytes(source.config, dtype), quiet=arguments.quiet) as on_tensor:
        return Decoder.from_source(
            source,
            dtype=dtype,
            devices=devices if form == "threads" else None,
            blocks=arguments.blocks,
            context=context,
            tokenizer=tokenizer,
            mesh=device_mesh(devices or 1) if form == "mesh" else None,
            compress=arguments.compress,
            on_tensor=on_tensor,
        )


def as_dtype(name: str) -> np.dtype:
    """The dtype ``float32``, ``bfloat16`` or ``float16``."""
    import jax.numpy as jnp

    return jnp.dtype(name)


def read_tokens(path: str, vocabulary: int) -> list[int]:
    """Reads tokens from a ``.npy`` file.

    Args:
        path: The file: one dimension, whole numbers.
        vocabulary: Tokens must be below this.

    Returns:
        The tokens, at least one.

    Raises:
        ValueError: The file holds something else.
        FileNotFoundError: There is no such file.
    """
    import numpy as np

    with open(path, "rb") as file:
        try:
            array = np.load(file, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path}: not readable as .npy ({error}); write it with numpy.save") from error
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.kind not in "iu":
        found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else "an archive"
        raise ValueError(f"{path}: holds {found}; tokens must be one-dimensional and whole numbers")
    if not array.size:
        raise ValueError(f"{path}: holds no tokens")
    check_tokens(path, array.tolist(), vocabulary)
    return array.tolist()


def check_tokens(where: str, tokens: Sequence[int], vocabulary: int) -> None:
    """Refuses tokens outside the vocabulary.

    Raises:
        ValueError: Naming the first of them.
    """
    for index, token in enumerate(tokens):
        if not 0 <= token < vocabulary:
            raise ValueError(f"{where}: token {token} at index {index} is outside the vocabulary of {vocabulary}")
