"""The quantised blocks of ggml, one value at a time: an independent check of vectorised dequantisers."""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np


def _half(block: bytes, at: int) -> float:
    return struct.unpack_from("<e", block, at)[0]


def _q4_0(block: bytes) -> list[float]:
    scale, quants = _half(block, 0), block[2:]
    return [scale * ((q & 15) - 8) for q in quants] + [scale * ((q >> 4) - 8) for q in quants]


def _q4_1(block: bytes) -> list[float]:
    scale, least, quants = _half(block, 0), _half(block, 2), block[4:]
    return [scale * (q & 15) + least for q in quants] + [scale * (q >> 4) + least for q in quants]


def _q8_0(block: bytes) -> list[float]:
    scale = _half(block, 0)
    return [scale * q for q in struct.unpack_from("<32b", block, 2)]


def _q4_k(block: bytes) -> list[float]:
    scale, least, packed, quants = _half(block, 0), _half(block, 2), block[4:16], block[16:]
    values = []
    for group in range(8):  # of 32 values, each with a 6-bit scale and a 6-bit minimum
        if group < 4:
            d, m = packed[group] & 63, packed[group + 4] & 63
        else:
            d = (packed[group + 4] & 15) | (packed[group - 4] >> 6 << 4)
            m = (packed[group + 4] >> 4) | (packed[group] >> 6 << 4)
        for q in quants[group // 2 * 32 : group // 2 * 32 + 32]:
            values.append(scale * d * (q >> 4 if group % 2 else q & 15) - least * m)
    return values


def _q6_k(block: bytes) -> list[float]:
    low, high, scales = block[:128], block[128:192], struct.unpack_from("<16b", block, 192)
    scale = _half(block, 208)
    values = []
    for index in range(256):
        half, quarter, lane = index // 128, index // 32 % 4, index % 32
        nibble = low[half * 64 + quarter % 2 * 32 + lane] >> (4 if quarter >= 2 else 0) & 15
        bits = high[half * 32 + lane] >> (2 * quarter) & 3
        values.append(scale * scales[index // 16] * ((nibble | bits << 4) - 32))
    return values


# Name to (ggml type, values per block, bytes per block, where half-precision scales are, decoder).
KINDS: dict[str, tuple[int, int, int, list[int], Callable[[bytes], list[float]]]] = {
    "Q4_0": (2, 32, 18, [0], _q4_0),
    "Q4_1": (3, 32, 20, [0, 2], _q4_1),
    "Q8_0": (8, 32, 34, [0], _q8_0),
    "Q4_K": (12, 256, 144, [0, 2], _q4_k),
    "Q6_K": (14, 256, 210, [208], _q6_k),
}


def random_rows(kind: str, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Random blocks with sensible scales: uint8[rows, bytes per row]."""
    _, values, size, scales, _ = KINDS[kind]
    blocks = rng.integers(0, 256, (shape[0] * shape[1] // values, size), dtype=np.uint8)
    for at in scales:
        halves = rng.uniform(-0.01, 0.01, len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = halves.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(shape[0], -1)


def dequantise(kind: str, rows: np.ndarray) -> np.ndarray:
    """Decodes uint8[rows, bytes per row] to float64[rows, values]."""
    _, _, size, _, decode = KINDS[kind]
    data = rows.tobytes()
    values = [value for at in range(0, len(data), size) for value in decode(data[at : at + size])]
    return np.array(values).reshape(len(rows), -1)
