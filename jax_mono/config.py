"""Model and sampling configuration: the only place where numbers are chosen.

Everything below is frozen, hashable and validated on construction, so that a configuration can be
a static argument of ``jax.jit`` and a key of a cache.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

Module = Literal["attention", "mlp"]
Head = Literal["mean_of_norms", "norm_of_sum", "per_lane"]
OwnScale = Literal["sqrt_lanes", "one"]


class ConfigError(ValueError):
    """A configuration that cannot work; the message names the field and the remedy."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context.

    Field names are those of the Hugging Face ``rope_scaling`` dictionary.

    Attributes:
        kind: ``linear`` (divide positions by ``factor``), ``llama3`` (Llama 3.1 model card) or
            ``yarn`` (https://arxiv.org/abs/2309.00071).
        factor: Ratio of the extended to the original context.
        original_max_position_embeddings: Context the model was trained on, in tokens.
        low_freq_factor: ``llama3`` only.
        high_freq_factor: ``llama3`` only.
        beta_fast: ``yarn`` only, in rotations over the original context.
        beta_slow: ``yarn`` only, in rotations over the original context.
        attention_factor: ``yarn`` only; scales cos and sin. None: ``0.1 ln(factor) + 1``.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        _require(self.kind in ("linear", "llama3", "yarn"), f"rope scaling kind {self.kind!r} is unknown")
        _require(self.factor >= 1.0, f"rope scaling factor {self.factor} must be >= 1")
        if self.kind != "linear":
            _require(
                self.original_max_position_embeddings > 0,
                f"rope scaling {self.kind!r} needs original_max_position_embeddings",
            )


@dataclass(frozen=True, kw_only=True)
class Lanes:
    """The lane axis of a Laneformer: how module outputs travel between lanes.

    Attributes:
        count: Number of lanes; every lane has its own residual stream.
        delay: Layers between a module's output and its arrival in the other lanes; 0 means at once.
        attention_comm: Whether attention outputs are exchanged between lanes at all.
        mlp_comm: Whether feed-forward outputs are exchanged between lanes at all.
        early_comm: Whether layers below ``delay`` exchange their outputs at once.
        early_layers_broadcast: Whether outputs of layers below ``delay`` also arrive ``delay``
            layers later.
        own_scale: Factor on a lane's own output where nothing arrives: sqrt(count) or one.
        head: ``mean_of_norms`` normalises every lane and averages; ``norm_of_sum`` adds the lanes
            and normalises once; ``per_lane`` gives every lane its slice of the vocabulary.
    """

    count: int
    delay: int = 2
    attention_comm: bool = True
    mlp_comm: bool = True
    early_comm: bool = True
    early_layers_broadcast: bool = True
    own_scale: OwnScale = "sqrt_lanes"
    head: Head = "mean_of_norms"

    def __post_init__(self) -> None:
        _require(self.count >= 1, f"lanes.count is {self.count}, must be at least 1")
        _require(self.delay >= 0, f"lanes.delay is {self.delay}, must not be negative")
        _require(self.own_scale in ("sqrt_lanes", "one"), f"lanes.own_scale {self.own_scale!r} is unknown")
        _require(self.head in ("mean_of_norms", "norm_of_sum", "per_lane"), f"lanes.head {self.head!r} is unknown")


@dataclass(frozen=True)
class Mixing:
    """What is added to a lane's residual stream after one module of one layer.

    ``x[l] += own_scale * o[l] + sum(o_source[j] for j != l)``

    Attributes:
        source: The layer whose outputs arrive, or None where nothing arrives.
        own_scale: Factor on the lane's own output of this layer.
    """

    source: int | None
    own_scale: float


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only Transformer: Llama family (``lanes is None``) or Laneformer.

    Attributes:
        family: ``llama``, ``qwen2``, ``qwen3`` or ``laneformer``; names the checkpoint layout.
        vocab_size: Rows of the embedding and of the LM head.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the SwiGLU feed-forward, over all lanes.
        num_layers: Transformer layers.
        num_heads: Query heads, over all lanes.
        num_kv_heads: Key/value heads, over all lanes.
        head_dim: Width of one head.
        max_position_embeddings: Longest context in tokens.
        norm_eps: Epsilon of every RMSNorm.
        rope_theta: Base of the rotary frequencies.
        rope_scaling: Stretching of the rotary frequencies, or None.
        rope_interleaved: True rotates adjacent pairs, False the two halves of a head.
        sliding_windows: Per layer, how many positions (the current one included) are attended to;
            0 attends to everything. Empty means 0 for all layers.
        qkv_bias: Whether the Q, K and V projections have a bias.
        qk_norm: Whether each Q and K head is RMS-normalised before rotation (Qwen3).
        tie_word_embeddings: Whether the LM head is the embedding table.
        bos_token_id: First token of a text, or None.
        eos_token_ids: Tokens that end a generation.
        lanes: The lane axis, or None for a dense model.
    """

    family: Literal["llama", "qwen2", "qwen3", "laneformer"]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rope_interleaved: bool = False
    sliding_windows: tuple[int, ...] = ()
    qkv_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    lanes: Lanes | None = None

    def __post_init__(self) -> None:
        if not self.sliding_windows:
            object.__setattr__(self, "sliding_windows", (0,) * self.num_layers)
        for field in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            _require(getattr(self, field) >= 1, f"{field} is {getattr(self, field)}, must be at least 1")
        _require(self.family in ("llama", "qwen2", "qwen3", "laneformer"), f"family {self.family!r} is unknown")
        _require(self.head_dim % 2 == 0, f"head_dim is {self.head_dim}, must be even for rotary embedding")
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})",
        )
        _require(
            len(self.sliding_windows) == self.num_layers,
            f"sliding_windows has {len(self.sliding_windows)} entries for {self.num_layers} layers",
        )
        _require(min(self.sliding_windows) >= 0, "sliding_windows must not be negative")
        _require(self.norm_eps > 0 and math.isfinite(self.norm_eps), f"norm_eps is {self.norm_eps}, must be > 0")
        _require(self.rope_theta > 0, f"rope_theta is {self.rope_theta}, must be positive")
        _require((self.family == "laneformer") == (self.lanes is not None), "lanes and family must agree")
        for field in ("num_kv_heads", "intermediate_size"):
            _require(
                getattr(self, field) % self.num_lanes == 0,
                f"{field} ({getattr(self, field)}) must be a multiple of the {self.num_lanes} lanes",
            )
        if self.lanes is not None and self.lanes.head == "per_lane":
            _require(
                self.vocab_size % self.num_lanes == 0,
                f"vocab_size ({self.vocab_size}) must be a multiple of the {self.num_lanes} lanes",
            )

    @property
    def num_lanes(self) -> int:
        """Number of lanes; 1 for a dense model."""
        return 1 if self.lanes is None else self.lanes.count

    @property
    def queries_per_kv(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    def mixing(self, module: Module, layer: int) -> Mixing:
        """Says what reaches the residual stream after ``module`` of ``layer``.

        A dense model split over devices is a Laneformer with delay 0: its partial sums arrive at once.
        """
        lanes = self.lanes
        if lanes is None or lanes.count == 1:
            return Mixing(source=layer, own_scale=1.0)
        communicates = lanes.attention_comm if module == "attention" else lanes.mlp_comm
        source: int | None
        if layer < lanes.delay:
            source = layer if lanes.early_comm else None
        else:
            source = layer - lanes.delay
            if lanes.delay and source < lanes.delay and not lanes.early_layers_broadcast:
                source = None
        if source is None or not communicates:
            scale = math.sqrt(lanes.count) if lanes.own_scale == "sqrt_lanes" else 1.0
            return Mixing(source=None, own_scale=scale)
        return Mixing(source=source, own_scale=1.0)

    def replace(self, **changes: object) -> ModelConfig:
        """Returns a copy with some fields changed, validated anew."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    @property
    def num_parameters(self) -> int:
        """Number of trained values, counting a tied embedding once."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = self.hidden_size * (2 * q + 2 * kv)
        if self.qkv_bias:
            attention += q + 2 * kv
        if self.qk_norm:
            attention += 2 * self.head_dim
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * layer + embeddings + self.hidden_size
