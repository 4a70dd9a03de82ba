"""bfloat16 weights in 12 bits each, to the last bit.

Weights of a trained matrix have all signs and mantissas, but few exponents: of 8 bits of exponent fewer than 4 say
anything (Zhang et al., "70% Size, 100% Accuracy: Lossless LLM Compression for Efficient GPU Inference via
Dynamic-Length Float", 2025). So a weight is kept as sign, 7 bits of mantissa and 4 bits that say which of 15
neighbouring exponents it has, or that it is zero. Which 15 these are, every run of up to 512 columns of a row says for
itself; what lies outside is listed as an exception. Decoding then reads a quarter fewer bytes, and gets the same
weights.

A part of a tile is a sequence of *pieces* of up to 16 chunks. A piece is

* a head of 16 words of 32 bits: 14 exceptions, then a byte for each of its rows, that row's scale;
* groups of 4 chunks, 384 words each.

An exception has the weight in its upper 16 bits, its row in the 3 bits from bit 9 on, its column within the piece in
the lower 9; unused ones are zero. Its own place holds a zero. Exceptions come in order of chunk, row and column.

A *code* is a weight as bfloat16 whose exponent is 1 to 15 instead of ``top - 14`` to ``top``, or zero: 12 of its 16
bits are used, sign, the lower 4 bits of the exponent, mantissa. The resident program multiplies codes with activations
times 2^64, so that no product is subnormal, and a row's sum with its scale, 2^(top - 79), which makes it what weights
and activations give. The byte is ``top + 48``, the exponent of that scale as float32 has it.

Rows of a chunk are four *lanes* of 8 weights, which are four *pairs*; two codes make a pair, the even column's in the
lower half. A group has three planes of 32 lanes of 4 chunks, one word each: the first three pairs, whose unused bits
hold the fourth pair: bits 3 to 6 of each half 8 places higher in the first plane, bits 7 to 10 four higher in the
second, and bits 0 to 2 and 15 rotated by 12 in the third.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jax_mono import native
from jax_mono.tile import GROUP, HEAD_WORDS, TileFormat

Array = jax.Array

EXCEPTIONS = HEAD_WORDS // 2 - 2
"""Of a piece, at most."""

_USED, _LOW, _MIDDLE, _ENDS, _UPPER = np.array([0x87FF87FF, 0x00780078, 0x07800780, 0x80078007, 0xFFFF0000], np.uint32)
_EXPONENTS = 15
_LOWEST_TOP, _HIGHEST_TOP = 15, 200
_SCALE = 127 - 79  # the exponent of a scale, as float32 has it, less the top
_TOPS = 8
"""So many highest exponents are tried, from the largest weight's down: outliers are better listed."""


def compress(tile: TileFormat, parts: Array, cols: int) -> tuple[Array, Array]:
    """Compresses parts of tiles; traceable.

    Args:
        tile: Their format.
        parts: uint16 [parts, chunks, rows, cols], bit patterns of bfloat16.
        cols: Columns of a part, without padding.

    Returns:
        uint16 [parts, words], and how many pieces have more exceptions than a head has room for, or weights that are
        not finite: those are not what they were.
    """
    length = tile.piece_chunks(cols)
    weights = parts.reshape(-1, length, tile.rows, tile.cols)
    exponent = (weights >> 7).astype(jnp.uint8)
    top = _best_top(exponent)
    spread = _spread(exponent, top)
    zero = (weights & 0x7FFF) == 0
    plain = spread < _EXPONENTS
    codes = (weights & 0x807F) | (spread + np.uint8(1)).astype(jnp.uint16) << 7
    codes = jnp.where(plain, codes, jnp.where(zero, weights, 0))
    entries, left = _entries(weights, ~(plain | zero))
    scales = jax.lax.bitcast_convert_type((top + np.uint8(_SCALE)).reshape(-1, tile.rows // 4, 4), jnp.uint32)
    words = jnp.concatenate([entries, scales, _planes(codes).reshape(len(weights), -1)], axis=1)
    spoiled = left | (exponent == 0xFF).any(axis=(1, 2, 3)) | (top > _HIGHEST_TOP).any(axis=1)
    return jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(len(parts), -1), spoiled.sum()


def expand(tile: TileFormat, words: Array, cols: int, rows: slice = slice(None)) -> Array:
    """Recovers rows of parts of tiles, every bit; traceable.

    Args:
        tile: Their format.
        words: uint16 [parts, words] from :func:`compress`.
        cols: Columns of a part, without padding.
        rows: Which rows of every part, one after the other.

    Returns:
        uint16 [parts, rows, padded cols].
    """
    native.register()
    wanted, width, length = range(tile.rows)[rows], tile.padded_cols(cols), tile.piece_chunks(cols)

    def on_cpu(words: Array) -> Array:
        out = jax.ShapeDtypeStruct((len(words), len(wanted), width), jnp.uint16)
        call = jax.ffi.ffi_call(native.EXPAND_TARGET, out, vmap_method="broadcast_all")
        return call(words, length=np.int32(length), first=np.int32(wanted.start))

    return jax.lax.platform_dependent(words, cpu=on_cpu, default=functools.partial(_expand, tile, cols, rows))


def _expand(tile: TileFormat, cols: int, rows: slice, words: Array) -> Array:
    """:func:`expand` in words of two weights, which on a GPU takes a quarter of the time that single weights take."""
    length, width = tile.piece_chunks(cols), tile.padded_cols(cols)
    pieces = words.reshape(len(words), width // (length * tile.cols), -1, 2)
    as_words = jax.lax.bitcast_convert_type(pieces, jnp.uint32)
    head, planes = as_words[..., : HEAD_WORDS // 2], as_words[..., HEAD_WORDS // 2 :]
    planes = planes.reshape(*planes.shape[:2], length // GROUP, 3, tile.rows, 4, GROUP)[..., rows, :, :]
    scales = jax.lax.bitcast_convert_type(head[..., EXCEPTIONS:], jnp.uint8).reshape(*head.shape[:2], tile.rows)
    lowest = scales[..., rows].astype(jnp.uint32) - jnp.uint32(_SCALE + _EXPONENTS)
    pairs = _pairs(planes, (lowest << 7)[:, :, None, :, None, None])
    # [parts, pieces, groups, rows, lanes of a row, chunks, pairs] to rows of pairs.
    found = pairs.transpose(0, 3, 1, 2, 5, 4, 6).reshape(len(words), -1, width // 2)
    weights = jax.lax.bitcast_convert_type(found, jnp.uint16).reshape(*found.shape[:2], width)
    return _with_exceptions(weights, head[..., :EXCEPTIONS], length * tile.cols, range(tile.rows)[rows])


def _best_top(exponent: Array) -> Array:
    """The highest exponents that get a code, so that as many weights as possible do: uint8 [pieces, rows]."""
    highest = jnp.maximum(exponent.max(axis=(1, 3)), _LOWEST_TOP)
    best, most = highest, jnp.full(highest.shape, -1, jnp.int32)
    for below in range(_TOPS):
        top = jnp.maximum(highest, _LOWEST_TOP + below) - np.uint8(below)
        # Sums of bytes as far as they cannot overflow: CPUs add 64 at once.
        inside = (_spread(exponent, top) < _EXPONENTS).sum(axis=1, dtype=jnp.uint8).sum(axis=2, dtype=jnp.int32)
        best, most = jnp.where(inside > most, top, best), jnp.maximum(inside, most)
    return best


def _spread(exponent: Array, top: Array) -> Array:
    """Exponents less the lowest that gets a code, modulo 256: those below it, and zeros, become large, too."""
    return exponent - (top - np.uint8(_EXPONENTS - 1))[:, None, :, None]


def _entries(weights: Array, listed: Array) -> tuple[Array, Array]:
    """Lists exceptions.

    Args:
        weights: [pieces, chunks, rows, cols].
        listed: bool, likewise: which ones.

    Returns:
        uint32 [pieces, EXCEPTIONS], and bool [pieces], where there are more.
    """
    pieces, _, rows, cols = weights.shape
    # A bit per column makes 32 times less to look through.
    bits = (listed.astype(jnp.uint32) << jnp.arange(cols, dtype=jnp.uint32)).sum(axis=3, dtype=jnp.uint32)
    bits, flat = bits.reshape(pieces, -1), weights.reshape(pieces, -1)

    def take(left: Array, _: None) -> tuple[Array, Array]:
        line = (left != 0).argmax(axis=1)[:, None]
        word = jnp.take_along_axis(left, line, axis=1)
        lowest = word & (0 - word)
        col = jax.lax.population_count(lowest - 1)
        weight = jnp.take_along_axis(flat, line * cols + (col & (cols - 1)).astype(line.dtype), axis=1)
        chunk, row = (line // rows).astype(jnp.uint32), (line % rows).astype(jnp.uint32)
        entry = weight.astype(jnp.uint32) << 16 | row << 9 | (chunk * cols + col)
        left = jnp.where(jnp.arange(left.shape[1]) == line, left ^ lowest, left)
        return left, jnp.where(word == 0, 0, entry)[:, 0]

    left, entries = jax.lax.scan(take, bits, length=EXCEPTIONS)
    return entries.T, (left != 0).any(axis=1)


def _planes(codes: Array) -> Array:
    """[pieces, chunks, rows, cols] codes to uint32 [pieces, groups, 3, lanes, GROUP]."""
    pieces, chunks, rows, cols = codes.shape
    pairs = jax.lax.bitcast_convert_type(
        codes.reshape(pieces, chunks // GROUP, GROUP, rows * cols // 8, 4, 2), jnp.uint32
    )
    first, second, third, fourth = (pairs[..., k] for k in range(4))
    turned = fourth & _ENDS
    planes = (
        first | (fourth & _LOW) << 8,
        second | (fourth & _MIDDLE) << 4,
        third | turned << 12 | turned >> 20,
    )
    return jnp.stack(planes, axis=2).swapaxes(3, 4)


def _pairs(planes: Array, shift: Array) -> Array:
    """Weights from planes.

    Args:
        planes: uint32 [..., 3, rows, lanes, chunks].
        shift: uint32, what the exponents of codes lack, as a bfloat16 has it.

    Returns:
        uint32 [..., rows, lanes, chunks, 4], pairs of bfloat16.
    """
    first, second, third = (planes[..., k, :, :, :] for k in range(3))
    turned = third >> 12 | third << 20
    fourth = (first >> 8 & _LOW) | (second >> 4 & _MIDDLE) | (turned & _ENDS)
    pairs = jnp.stack([first & _USED, second & _USED, third & _USED, fourth], axis=-1)
    low = jnp.where(pairs & 0x0780 != 0, shift[..., None], 0)  # a zero stays zero
    high = jnp.where(pairs & 0x07800000 != 0, shift[..., None] << 16, 0)
    return (pairs + low & 0xFFFF) | ((pairs & _UPPER) + high)


def _with_exceptions(weights: Array, entries: Array, length: int, rows: range) -> Array:
    """Puts exceptions where they belong.

    Args:
        weights: [parts, rows, cols].
        entries: uint32 [parts, pieces, EXCEPTIONS].
        length: Columns of a piece.
        rows: Which rows of the parts these are.
    """
    count = jnp.arange(entries.size, dtype=jnp.uint32).reshape(entries.shape)
    row, col = (entries >> 9 & 7) - jnp.uint32(rows.start), entries & 0x1FF
    part = jnp.arange(len(weights), dtype=jnp.uint32)[:, None, None]
    piece = jnp.arange(entries.shape[1], dtype=jnp.uint32)[:, None]
    at = (part * len(rows) + row) * weights.shape[2] + piece * length + col
    # What is not wanted goes beyond the end, every one to a place of its own.
    at = jnp.where((entries != 0) & (row < len(rows)), at, weights.size + count)
    values = (entries >> 16).astype(jnp.uint16)
    flat = weights.reshape(-1).at[at].set(values, mode="drop", unique_indices=True)
    return flat.reshape(weights.shape)
