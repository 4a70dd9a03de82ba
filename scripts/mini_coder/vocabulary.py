"""The tokenizer: byte-level byte-pair encoding, with tokens reserved for filling in and for conversations."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"
SPECIAL = (
    END,
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|file_sep|>",
)
END_ID = 0
"""Stands before the first document and behind each; the only special token that training shows the model."""


def train(texts: Iterator[str], size: int) -> tokenizers.Tokenizer:
    """Learns merges.

    Digits stand alone; words keep the space before them; a line break joins the indentation behind it.

    Args:
        texts: Documents.
        size: Entries, special tokens included.

    Returns:
        The tokenizer.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def save(backend: tokenizers.Tokenizer, directory: Path) -> None:
    """Writes ``tokenizer.json`` and ``tokenizer_config.json``."""
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    about = {"bos_token": END, "eos_token": END, "add_bos_token": True}
    (directory / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")
