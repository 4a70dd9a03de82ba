"""Tokenizers from the metadata of GGUF files.

Two kinds are in use: byte-level BPE with explicit merges (``gpt2``), and SentencePiece BPE (``llama``), whose
merges follow from the scores of the pieces.
"""

from __future__ import annotations

import functools
from typing import Any

from jax_mono.extras import require
from jax_mono.models.gguf import end_tokens
from jax_mono.models.gguf_file import GGUFFile
from jax_mono.tokenizer import TokenizerError

# Types of tokens in the metadata.
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_THREE_DIGITS = rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_ONE_DIGIT = rf"{_WORDS}|\p{{N}}|{_REST}"

# How text is cut into words before merging, by the file's name for it: a pattern, "digits" (single digits,
# then GPT-2's own rule) or "gpt-2". Files without a name predate the key, and their words were cut by GPT-2's
# rule.
_CUTS = {
    "default": "gpt-2",
    "gpt-2": "gpt-2",
    "smollm": "digits",
    "qwen2": _ONE_DIGIT,
    "deepseek-r1-qwen": _ONE_DIGIT,
    "llama3": _THREE_DIGITS,
    "llama-v3": _THREE_DIGITS,
    "llama-bpe": _THREE_DIGITS,
}


def build(file: GGUFFile) -> dict[str, Any]:
    """Builds a tokenizer.

    Args:
        file: The opened file.

    Returns:
        The arguments of ``Tokenizer``.

    Raises:
        TokenizerError: If the file has no tokenizer or one of an unsupported kind.
    """
    meta = file.metadata
    kind = meta.get("tokenizer.ggml.model")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in builders:
        raise TokenizerError(
            f"{file.path}: tokenizer model {kind!r} is not supported; known: {', '.join(builders)}. "
            "Put the model's tokenizer.json into a directory and use that"
        )
    tokens = meta["tokenizer.ggml.tokens"]
    backend = builders[kind](file, tokens)
    _add_special(backend, tokens, meta.get("tokenizer.ggml.token_type", []))
    ids = {name: meta.get(f"tokenizer.ggml.{key}_token_id") for name, key in _TEMPLATE_TOKENS.items()}
    return {
        "backend": backend,
        "bos_id": ids["bos_token"],
        "eos_ids": end_tokens(meta),
        "add_bos": meta.get("tokenizer.ggml.add_bos_token", _adds_bos(kind, meta.get("tokenizer.ggml.pre"))),
        "chat_template": meta.get("tokenizer.chat_template"),
        "special_tokens": {name: tokens[token] for name, token in ids.items() if token is not None},
    }


_TEMPLATE_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def _adds_bos(kind: str, pre: str | None) -> bool:
    """What llama.cpp assumes where the file does not say."""
    return kind == "llama" or _CUTS.get(pre or "default") == _THREE_DIGITS


def _add_special(backend: Any, tokens: list[str], types: list[int]) -> None:
    added_token = require("tokenizers", "hf").AddedToken
    marked = [(token, kind) for token, kind in zip(tokens, types, strict=False)]
    backend.add_special_tokens(
        [added_token(t, special=True, normalized=False) for t, kind in marked if kind in (_UNKNOWN, _CONTROL)]
    )
    backend.add_tokens([added_token(t, special=False, normalized=False) for t, kind in marked if kind == _USER_DEFINED])


def _byte_level(file: GGUFFile, tokens: list[str]) -> Any:
    tk = require("tokenizers", "hf")
    pre = file.metadata.get("tokenizer.ggml.pre", "default")
    if pre not in _CUTS:
        raise TokenizerError(
            f"{file.path}: pre-tokenizer {pre!r} is not supported; known: {', '.join(_CUTS)}. "
            "Put the model's tokenizer.json into a directory and use that"
        )
    cut = _CUTS[pre]
    merges = [tuple(merge.split(" ", 1)) for merge in file.metadata["tokenizer.ggml.merges"]]
    vocab = {token: number for number, token in enumerate(tokens)}
    # Llama 3 takes a word that is in the vocabulary whole, whether or not merges lead to it.
    backend = tk.Tokenizer(tk.models.BPE(vocab=vocab, merges=merges, ignore_merges=cut == _THREE_DIGITS))
    if cut == _ONE_DIGIT:
        backend.normalizer = tk.normalizers.NFC()
    own_rule = functools.partial(tk.pre_tokenizers.ByteLevel, add_prefix_space=False)
    if cut == "gpt-2":
        backend.pre_tokenizer = own_rule(use_regex=True)
    elif cut == "digits":
        digits = tk.pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = tk.pre_tokenizers.Sequence([digits, own_rule(use_regex=True)])
    else:
        words = tk.pre_tokenizers.Split(tk.Regex(cut), behavior="isolated")
        backend.pre_tokenizer = tk.pre_tokenizers.Sequence([words, own_rule(use_regex=False)])
    backend.decoder = tk.decoders.ByteLevel()
    return backend


def _sentencepiece(file: GGUFFile, tokens: list[str]) -> Any:
    tk = require("tokenizers", "hf")
    scores = file.metadata["tokenizer.ggml.scores"]
    types = file.metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    vocab = {token: number for number, token in enumerate(tokens)}
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN), None)
    model = tk.models.BPE(
        vocab=vocab, merges=_merges(vocab, scores), unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    backend = tk.Tokenizer(model)
    space, prefix = (
        tk.normalizers.Replace(" ", "▁"),
        file.metadata.get("tokenizer.ggml.add_space_prefix", True),
    )
    decoders = [tk.decoders.Replace("▁", " "), tk.decoders.ByteFallback(), tk.decoders.Fuse()]
    if prefix:
        backend.normalizer = tk.normalizers.Sequence([tk.normalizers.Prepend("▁"), space])
        decoders.append(tk.decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = space
    backend.decoder = tk.decoders.Sequence(decoders)
    return backend


def _merges(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Lists every way to join two pieces into a third, best piece first.

    SentencePiece joins the pair whose result scores best; as a list of merges that is all pairs in the order
    of the score of their result.
    """
    pairs = []
    for piece, number in vocab.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                pairs.append((-scores[number], vocab[left], vocab[right], left, right))
    return [(left, right) for *_, left, right in sorted(pairs)]
