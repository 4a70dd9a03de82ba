"""A Laneformer in float64 numpy with one loop per lane, position and head.

Written from the published description alone; shares no code with the package. Slow on purpose.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def forward(config: Any, params: dict, tokens: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Runs a whole text.

    Args:
        config: A ``ModelConfig`` with lanes, without QKV bias, QK norm and RoPE scaling.
        params: The canonical parameter tree.
        tokens: int [T].

    Returns:
        Logits [T, V], and the residual streams [lanes, T, H] after the embedding and after every layer.
    """
    lanes = config.lanes.count
    embedded = _f64(params["embed"])[tokens]
    x = [embedded.copy() for _ in range(lanes)]
    streams = [np.stack(x)]
    history: dict[str, list[list[np.ndarray]]] = {"attention": [], "mlp": []}
    for n in range(config.num_layers):
        layer = params["layers"][n]
        norm = _f64(layer["attention_norm"])
        outputs = [
            _attention(
                config,
                layer["attention"],
                lane,
                _rms(x[lane], norm, config.norm_eps),
                config.sliding_windows[n],
            )
            for lane in range(lanes)
        ]
        x = _exchange(config, "attention", n, x, outputs, history["attention"])
        norm = _f64(layer["ffn_norm"])
        outputs = [
            _feed_forward(layer["feed_forward"], lane, _rms(x[lane], norm, config.norm_eps)) for lane in range(lanes)
        ]
        x = _exchange(config, "mlp", n, x, outputs, history["mlp"])
        streams.append(np.stack(x))
    return _head(config, params, x), streams


def _f64(array: Any) -> np.ndarray:
    return np.asarray(array).astype(np.float64)


def _rms(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    out = np.empty_like(x)
    for t in range(len(x)):
        out[t] = x[t] / math.sqrt(sum(value * value for value in x[t]) / x.shape[1] + eps) * scale
    return out


def _exchange(
    config: Any,
    module: str,
    n: int,
    x: list[np.ndarray],
    outputs: list[np.ndarray],
    history: list[list[np.ndarray]],
) -> list[np.ndarray]:
    """Own output plus the others' of ``delay`` layers ago; before layer ``delay`` at once, or alone."""
    options, lanes = config.lanes, len(outputs)
    history.append(outputs)
    may_talk = {"attention": options.attention_comm, "mlp": options.mlp_comm}[module]
    alone = math.sqrt(lanes) if options.own_scale == "sqrt_lanes" else 1.0

    sent: list[np.ndarray] | None = None
    if may_talk and n < options.delay:
        sent = outputs if options.early_comm else None
    elif may_talk:
        sender = n - options.delay
        sender_is_early = sender < options.delay
        if not sender_is_early or options.early_layers_broadcast:
            sent = history[sender]

    mixed = []
    for lane in range(lanes):
        if sent is None:
            mixed.append(x[lane] + alone * outputs[lane])
            continue
        total = x[lane] + outputs[lane]
        for j in range(lanes):
            if j != lane:
                total = total + sent[j]
        mixed.append(total)
    return mixed


def _rotate(config: Any, head: np.ndarray, position: int) -> np.ndarray:
    half = config.head_dim // 2
    out = np.empty_like(head)
    for i in range(half):
        angle = position / config.rope_theta ** (2 * i / config.head_dim)
        a, b = (2 * i, 2 * i + 1) if config.rope_interleaved else (i, i + half)
        out[a] = head[a] * math.cos(angle) - head[b] * math.sin(angle)
        out[b] = head[a] * math.sin(angle) + head[b] * math.cos(angle)
    return out


def _attention(config: Any, weights: dict, lane: int, x: np.ndarray, window: int) -> np.ndarray:
    wq, wk, wv, wo = (_f64(weights[name][lane]) for name in ("wq", "wk", "wv", "wo"))
    size, length = config.head_dim, len(x)
    heads, kv_heads = len(wq) // size, len(wk) // size
    q = (x @ wq.T).reshape(length, heads, size)
    k = (x @ wk.T).reshape(length, kv_heads, size)
    v = (x @ wv.T).reshape(length, kv_heads, size)
    for t in range(length):
        for h in range(heads):
            q[t, h] = _rotate(config, q[t, h], t)
        for h in range(kv_heads):
            k[t, h] = _rotate(config, k[t, h], t)
    joined = np.zeros((length, heads, size))
    for t in range(length):
        oldest = 0 if window == 0 else max(0, t - window + 1)
        for h in range(heads):
            shared = h * kv_heads // heads
            scores = np.array([q[t, h] @ k[p, shared] / math.sqrt(size) for p in range(oldest, t + 1)])
            weight = np.exp(scores - scores.max())
            weight /= weight.sum()
            for p in range(oldest, t + 1):
                joined[t, h] += weight[p - oldest] * v[p, shared]
    return joined.reshape(length, heads * size) @ wo.T


def _feed_forward(weights: dict, lane: int, x: np.ndarray) -> np.ndarray:
    gate, up = x @ _f64(weights["w1"][lane]).T, x @ _f64(weights["w3"][lane]).T
    return (gate / (1.0 + np.exp(-gate)) * up) @ _f64(weights["w2"][lane]).T


def _head(config: Any, params: dict, x: list[np.ndarray]) -> np.ndarray:
    scale, lanes = _f64(params["norm"]), len(x)
    table = _f64(params["embed"] if config.tie_word_embeddings else params["lm_head"])
    if config.lanes.head == "norm_of_sum":
        return _rms(sum(x), scale, config.norm_eps) @ table.T
    normed = [_rms(stream, scale, config.norm_eps) for stream in x]
    if config.lanes.head == "mean_of_norms":
        return sum(normed) / lanes @ table.T
    rows = len(table) // lanes
    return np.concatenate([normed[lane] @ table[lane * rows : (lane + 1) * rows].T for lane in range(lanes)], axis=1)
