"""From the name of a checkpoint to a decoder."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jax_mono.checkpoint import open_checkpoint
from jax_mono.decoder import Decoder
from jax_mono.hub import resolve
from jax_mono.models.source import OnTensor
from jax_mono.tokenizer import NoTokenizerError, Tokenizer


def load(
    checkpoint: str | Path,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    devices: int | None = None,
    blocks: int | None = None,
    context: int | None = None,
    mesh: Mesh | None = None,
    compress: bool | None = None,
    on_tensor: OnTensor | None = None,
) -> Decoder:
    """Loads a checkpoint and packs it for this machine: for JAX's default device, or for those of a mesh.

    Example::

        decoder = jax_mono.load("mini-coder")
        for token in decoder.stream("def fibonacci(n):", max_new_tokens=64):
            ...

    Args:
        checkpoint: A Hugging Face directory, a GGUF file, an Orbax checkpoint, ``mini-coder``,
            ``smollm2-135m-instruct`` where its package is installed, or a model of the Hugging Face hub.
        dtype: Of weights and KV cache: bfloat16 anywhere, float32 on the CPU, float16 on GPUs.
        devices: Devices that share the model; without a mesh they are groups of threads of one call on the CPU, groups
            of blocks of one GPU. None takes what is best there.
        blocks: Blocks per device (threads on the CPU); None takes this process's cores or the GPU's multiprocessors.
        context: Tokens that a conversation may have; None takes the model's longest context.
        mesh: A 1-D mesh with axis ``devices`` for one call per JAX device; ``devices`` is then a multiple of its size.
        compress: Whether bfloat16 weights take 12 bits each, without loss; None where that is faster and possible.
        on_tensor: Called after each tensor with its path and size in bytes.

    Returns:
        The decoder; without a tokenizer if the checkpoint has none.

    Raises:
        CheckpointError: The checkpoint is not there or cannot be read.
        TokenizerError: Its tokenizer cannot be read.
        ConfigError: The model cannot be cut like this, or does not run with such weights there.
        NativeError: There is no program for this GPU.
    """
    path = resolve(checkpoint)
    source = open_checkpoint(path)
    try:
        tokenizer = Tokenizer.open(path)
    except NoTokenizerError:
        tokenizer = None
    return Decoder.from_source(
        source,
        dtype=dtype,
        devices=devices,
        blocks=blocks,
        context=context,
        tokenizer=tokenizer,
        mesh=mesh,
        compress=compress,
        on_tensor=on_tensor,
    )
