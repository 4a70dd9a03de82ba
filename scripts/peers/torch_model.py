"""A plain decoder in PyTorch: dense, one token at a time, static KV cache, Q/K/V and gate/up in one matrix each."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jax_mono.config import ModelConfig
from jax_mono.models.rope import rope_table


class Layer(nn.Module):
    """One layer; keys and values are buffers [kv_heads, S, head_dim]."""

    def __init__(self, config: ModelConfig, capacity: int, factory: dict) -> None:
        super().__init__()
        hidden, ffn, hd = config.hidden_size, config.intermediate_size, config.head_dim
        self.heads = (config.num_heads, config.num_kv_heads, hd)
        self.eps, self.interleaved = config.norm_eps, config.rope_interleaved
        rows = (config.num_heads + 2 * config.num_kv_heads) * hd
        self.wqkv = _matrix(rows, hidden, factory)
        self.bqkv = _vector(rows, 0.0, factory) if config.qkv_bias else None
        self.q_norm = _vector(hd, 1.0, factory) if config.qk_norm else None
        self.k_norm = _vector(hd, 1.0, factory) if config.qk_norm else None
        self.wo = _matrix(hidden, config.num_heads * hd, factory)
        self.w13 = _matrix(2 * ffn, hidden, factory)
        self.w2 = _matrix(hidden, ffn, factory)
        self.attention_norm = _vector(hidden, 1.0, factory)
        self.ffn_norm = _vector(hidden, 1.0, factory)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(config.num_kv_heads, capacity, hd, **factory))

    def forward(self, x: Tensor, position: Tensor, visible: Tensor, rotation: Tensor) -> Tensor:
        """x float32 [1, H]; position int64 [1]; visible bool [S]; rotation float32 [head_dim / 2, 2]."""
        heads, kv_heads, hd = self.heads
        dtype = self.wqkv.dtype
        qkv = F.linear(norm(x, self.attention_norm, self.eps).to(dtype), self.wqkv, self.bqkv)
        q, k, v = qkv.view(-1, hd).split((heads, kv_heads, kv_heads))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = norm(q.float(), self.q_norm, self.eps), norm(k.float(), self.k_norm, self.eps)
        q, k = (rotate(part.float(), rotation, self.interleaved).to(dtype) for part in (q, k))
        self.keys.index_copy_(1, position, k[:, None])
        self.values.index_copy_(1, position, v[:, None])
        # Sums of products instead of small matrix products: inductor fuses them, and has nothing to tune.
        grouped = q.view(kv_heads, heads // kv_heads, 1, hd).float()
        scores = (grouped * self.keys[:, None].float()).sum(-1) * hd**-0.5
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        mixed = (weights[..., None] * self.values[:, None].float()).sum(2)
        x = x + F.linear(mixed.to(dtype).view(1, -1), self.wo).float()
        gate, up = F.linear(norm(x, self.ffn_norm, self.eps).to(dtype), self.w13).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, self.w2).float()


class Head(nn.Module):
    """Final norm, LM head and choice: float32 logits [1, V] and the most likely token, int64 [1]."""

    def __init__(self, config: ModelConfig, factory: dict) -> None:
        super().__init__()
        self.norm, self.eps = _vector(config.hidden_size, 1.0, factory), config.norm_eps
        self.weight = _matrix(config.vocab_size, config.hidden_size, factory)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(norm(x, self.norm, self.eps).to(self.weight.dtype), self.weight).float()
        return logits, logits.argmax(-1)


class Decoder(nn.Module):
    """A dense model with random weights: token and position in, logits and the next token out."""

    def __init__(self, config: ModelConfig, capacity: int, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        if config.lanes is not None:
            raise ValueError("this decoder is dense; take dense_twin of the configuration")
        factory = {"dtype": dtype, "device": device}
        self.windows = config.sliding_windows
        self.embed = _matrix(config.vocab_size, config.hidden_size, factory)
        self.layers = nn.ModuleList(Layer(config, capacity, factory) for _ in range(config.num_layers))
        self.head = Head(config, factory)
        if config.tie_word_embeddings:
            self.head.weight = self.embed
        self.register_buffer("rope", torch.from_numpy(np.array(rope_table(config, capacity))).to(device))
        self.register_buffer("places", torch.arange(capacity, device=device))

    def forward(self, token: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [1] each; see ``Head``."""
        distance = position - self.places
        visible = {w: (distance >= 0) & (distance < w) if w else distance >= 0 for w in sorted(set(self.windows))}
        rotation = self.rope[position][0]
        x = self.embed[token].float()
        for layer, window in zip(self.layers, self.windows, strict=True):
            x = layer(x, position, visible[window], rotation)
        return self.head(x)


def norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * scale.float()


def rotate(x: Tensor, rotation: Tensor, interleaved: bool) -> Tensor:
    """x float32 [heads, head_dim]."""
    cos, sin = rotation.unbind(-1)
    if interleaved:
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


def _matrix(rows: int, cols: int, factory: dict) -> nn.Parameter:
    return nn.Parameter(torch.empty(rows, cols, **factory).normal_(std=cols**-0.5), requires_grad=False)


def _vector(length: int, value: float, factory: dict) -> nn.Parameter:
    return nn.Parameter(torch.full((length,), value, **factory), requires_grad=False)
