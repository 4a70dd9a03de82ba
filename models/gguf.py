"""GGUF checkpoints of Llama, Qwen2 and Qwen3, dequantised one tensor at a time.

Values are those of llama.cpp; the layout is that of Hugging Face files. The two differ in one point: files of
architecture ``llama`` hold the rows of Q and K reordered so that adjacent pairs rotate. That is undone here.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from jax_mono.config import ConfigError, ModelConfig, RopeScaling
from jax_mono.extras import require
from jax_mono.models.gguf_file import GGUFFile, StoredTensor
from jax_mono.models.keys import Keys
from jax_mono.models.source import CheckpointError, check_names, check_shape, convert, tensor_shapes

ARCHITECTURES = ("llama", "qwen2", "qwen3")

# Supported ggml types: number to (name, values per block, bytes per block).
KINDS = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    8: ("Q8_0", 32, 34),
    12: ("Q4_K", 256, 144),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}

_NAMES = {
    "embed": "token_embd.weight",
    "norm": "output_norm.weight",
    "lm_head": "output.weight",
    "attention_norm": "attn_norm.weight",
    "attention.wq": "attn_q.weight",
    "attention.wk": "attn_k.weight",
    "attention.wv": "attn_v.weight",
    "attention.wo": "attn_output.weight",
    "attention.bq": "attn_q.bias",
    "attention.bk": "attn_k.bias",
    "attention.bv": "attn_v.bias",
    "attention.q_norm": "attn_q_norm.weight",
    "attention.k_norm": "attn_k_norm.weight",
    "ffn_norm": "ffn_norm.weight",
    "feed_forward.w1": "ffn_gate.weight",
    "feed_forward.w3": "ffn_up.weight",
    "feed_forward.w2": "ffn_down.weight",
}

_ROPE_FACTORS = "rope_freqs.weight"


def gguf_name(path: str) -> str:
    """Returns the GGUF name of a canonical path."""
    if not path.startswith("layers."):
        return _NAMES[path]
    _, layer, name = path.split(".", 2)
    return f"blk.{layer}.{_NAMES[name]}"


class GGUFCheckpoint:
    """A GGUF file as a ``WeightSource``.

    Opening reads and checks metadata and the table of tensors, but no weights.

    Attributes:
        file: The container, for readers of other metadata such as the tokenizer.
        config: The model, in Hugging Face layout (``rope_interleaved`` is false).
    """

    def __init__(self, path: str | Path, *, ignore_keys: Collection[str] = ()) -> None:
        """Opens a file.

        Args:
            path: The file.
            ignore_keys: Metadata keys, without the architecture's name, to ignore although they are unknown.

        Raises:
            CheckpointError: If the file is damaged, or tensors are missing, unknown or of an unsupported
                type.
            ConfigError: If the architecture or its metadata are not supported.
        """
        self._quants = require("gguf.quants", "gguf")
        self.file = GGUFFile(path)
        tensors = dict(self.file.tensors)
        factors = tensors.pop(_ROPE_FACTORS, None)
        self.config = _config(self.file, tensors, ignore_keys)
        if factors is not None:
            check_shape(str(path), _ROPE_FACTORS, (self.config.head_dim // 2,), factors.shape)
            scaling = _llama3_scaling(self.config, self._dequantise(factors), str(path))
            self.config = self.config.replace(rope_scaling=scaling)

        self._tensors = {name: gguf_name(name) for name in tensor_shapes(self.config)}
        check_names(str(path), dict.fromkeys(self._tensors.values()), tensors)
        for name, shape in tensor_shapes(self.config).items():
            stored = tensors[self._tensors[name]]
            # The lane axis of a dense model is 1 and not in the file.
            check_shape(str(path), stored.name, tuple(shape[len(shape) - len(stored.shape) :]), stored.shape)
            self.file.check_inside(stored, self._nbytes(stored))

    def paths(self) -> tuple[str, ...]:
        """Canonical paths of all tensors."""
        return tuple(self._tensors)

    def dtype(self, path: str) -> np.dtype:
        """Always float32, to which all types dequantise exactly as llama.cpp defines them."""
        return np.dtype(np.float32)

    def tensor(self, path: str, dtype: DTypeLike | None = None) -> np.ndarray:
        """Reads and dequantises one tensor; see ``WeightSource.tensor``."""
        array = self._dequantise(self.file.tensors[self._tensors[path]])
        if self.config.family == "llama":
            if path.endswith(".wq"):
                array = _halves_from_pairs(array, self.config.num_heads)
            elif path.endswith(".wk"):
                array = _halves_from_pairs(array, self.config.num_kv_heads)
        return convert(array.reshape(tensor_shapes(self.config)[path]), dtype)

    def _nbytes(self, tensor: StoredTensor) -> int:
        if tensor.kind not in KINDS:
            raise CheckpointError(
                f"{self.file.path}: tensor {tensor.name!r} has type {_kind_name(tensor.kind)}, supported are "
                f"{', '.join(name for name, _, _ in KINDS.values())}; choose a file with one of these"
            )
        name, values, size = KINDS[tensor.kind]
        if tensor.shape[-1] % values:
            raise CheckpointError(
                f"{self.file.path}: tensor {tensor.name!r} has rows of {tensor.shape[-1]} values, "
                f"not whole blocks of {values} as {name} needs"
            )
        return math.prod(tensor.shape) // values * size

    def _dequantise(self, tensor: StoredTensor) -> np.ndarray:
        data = self.file.read(tensor, self._nbytes(tensor))
        _, values, size = KINDS[tensor.kind]
        # The library works on 16 rows at a time, so rows of 8192 values are faster than those of small
        # models.
        blocks = math.gcd(len(data) // size, max(1, 8192 // values))
        rows = data.reshape(-1, blocks * size)
        kind = require("gguf.constants", "gguf").GGMLQuantizationType(tensor.kind)
        return self._quants.dequantize(rows, kind).reshape(tensor.shape)


def _kind_name(kind: int) -> str:
    try:
        return require("gguf.constants", "gguf").GGMLQuantizationType(kind).name
    except ValueError:
        return f"number {kind}"


def _halves_from_pairs(array: np.ndarray, heads: int) -> np.ndarray:
    """Puts the rows of every head from the order of adjacent pairs into that of two halves.

    Row 2i becomes row i, row 2i + 1 becomes row i + head_dim / 2.
    """
    rows, columns = array.shape
    pairs = array.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _config(file: GGUFFile, tensors: dict[str, StoredTensor], ignore_keys: Collection[str]) -> ModelConfig:
    meta, where = file.metadata, str(file.path)
    arch = meta.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise ConfigError(f"{where}: architecture {arch!r} is not supported; known: {', '.join(ARCHITECTURES)}")
    if meta.get("split.count", 1) > 1:
        raise CheckpointError(
            f"{where}: one of {meta['split.count']} parts; join them with: llama-gguf-split --merge FIRST OUT"
        )
    if "token_embd.weight" not in tensors:
        raise CheckpointError(f"{where}: tensor 'token_embd.weight' is missing; the file holds no model")
    rows, hidden = tensors["token_embd.weight"].shape

    prefix = f"{arch}."
    keys = Keys({key.removeprefix(prefix): value for key, value in meta.items() if key.startswith(prefix)}, where)
    keys.skip(ignore_keys)
    keys.neutral("vocab_size", rows)
    keys.neutral("embedding_length", hidden)
    keys.neutral("expert_count", 0)
    keys.neutral("attention.causal", True)
    heads = keys.integer("attention.head_count")
    head_dim = keys.integer("attention.key_length", hidden // heads)
    keys.neutral("attention.value_length", head_dim)
    keys.neutral("rope.dimension_count", head_dim)
    positions = keys.integer("context_length")
    config = ModelConfig(
        family=arch,
        vocab_size=rows,
        hidden_size=hidden,
        intermediate_size=keys.integer("feed_forward_length"),
        num_layers=keys.integer("block_count"),
        num_heads=heads,
        num_kv_heads=keys.integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=positions,
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        rope_theta=keys.number("rope.freq_base", 10000.0),
        rope_scaling=_scaling(keys, positions),
        qkv_bias=arch == "qwen2",
        qk_norm=arch == "qwen3",
        tie_word_embeddings="output.weight" not in tensors,
        bos_token_id=meta.get("tokenizer.ggml.bos_token_id"),
        eos_token_ids=end_tokens(meta),
    )
    keys.finish()
    return config


def end_tokens(metadata: dict[str, Any]) -> tuple[int, ...]:
    """Returns the tokens that end a text, a turn or a message."""
    found = (metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom"))
    return tuple(dict.fromkeys(token for token in found if token is not None))


def _scaling(keys: Keys, positions: int) -> RopeScaling | None:
    kind = keys.one_of("rope.scaling.type", "none", ("none", "linear", "yarn"))
    factor = keys.number("rope.scaling.factor", 1.0)
    original = keys.integer("rope.scaling.original_context_length", None)
    keys.skip(["rope.scaling.finetuned"])
    beta_fast = keys.number("rope.scaling.yarn_beta_fast", 32.0)
    beta_slow = keys.number("rope.scaling.yarn_beta_slow", 1.0)
    for multiplier in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor"):
        keys.neutral(f"rope.scaling.{multiplier}", 1.0)
    if kind == "none":
        keys.check(factor in (0.0, 1.0), "rope.scaling.factor", factor, "has no rope.scaling.type")
        return None
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor, original_max_position_embeddings=original or 0)
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_max_position_embeddings=original or positions,
        beta_fast=beta_fast,
        beta_slow=beta_slow,
    )


def _llama3_scaling(config: ModelConfig, factors: np.ndarray, where: str) -> RopeScaling:
    """Recognises the frequency divisors of Llama 3, which files hold instead of the numbers they follow from.

    Args:
        config: The model; head_dim and rope_theta matter.
        factors: float32[head_dim / 2], what each frequency is divided by.
        where: Name of the file, for messages.

    Returns:
        The scaling with the published constants (low 1, high 4, original context 8192) and the factor found.

    Raises:
        CheckpointError: If the divisors are not those.
    """
    scaling = RopeScaling(kind="llama3", factor=max(1.0, float(factors[-1])), original_max_position_embeddings=8192)
    frequencies = config.rope_theta ** (-2.0 * np.arange(config.head_dim // 2) / config.head_dim)
    rotations = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((rotations - low) / (high - low), 0.0, 1.0)
    expected = 1.0 / (kept + (1.0 - kept) / scaling.factor)
    if config.rope_scaling is not None or not np.allclose(factors, expected, rtol=1e-4):
        raise CheckpointError(
            f"{where}: tensor {_ROPE_FACTORS!r} does not hold the rotary scaling of Llama 3; other tensors "
            "of this kind are not supported, use the Hugging Face checkpoint of this model instead"
        )
    return scaling
