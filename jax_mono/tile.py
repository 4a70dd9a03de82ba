"""The unit of weight streaming, and what it takes on a tape."""

from __future__ import annotations

from dataclasses import dataclass

from jax_mono.config import ConfigError

GROUP = 4
"""Chunks that are compressed together."""

LONGEST_PIECE = 16
"""Chunks of a compressed piece, at most."""

HEAD_WORDS = 32
"""16-bit words in front of a compressed piece; see :mod:`jax_mono.compression`."""


@dataclass(frozen=True)
class TileFormat:
    """How tiles lie on a tape.

    Tiles are ``rows`` rows high. A *part* of a tile, its rows over the columns of one lane, is a sequence of *chunks*
    of ``rows`` by ``cols`` weights, stored row by row, so a block reads one linear stream.

    8 x 32 is what a CPU core wants: eight accumulators, one cache line of bfloat16 per row and chunk.

    Attributes:
        rows: Rows of a tile, even.
        cols: Columns of a chunk.
        compressed: Whether 16-bit weights take 12 bits, to the last bit; see :mod:`jax_mono.compression`. A part is
            then a sequence of pieces of equally many chunks.
    """

    rows: int = 8
    cols: int = 32
    compressed: bool = False

    def __post_init__(self) -> None:
        if self.rows < 2 or self.rows % 2:
            raise ConfigError(f"tile rows must be even and positive, not {self.rows}: gate and up rows pair up")
        if self.cols < 1:
            raise ConfigError(f"tile cols must be positive, not {self.cols}")
        if self.compressed and (self.rows, self.cols) != (8, 32):
            raise ConfigError(f"compressed chunks are 8 x 32, not {self.rows} x {self.cols}")

    @property
    def cut_cols(self) -> int:
        """Columns by which a matrix may be cut between devices."""
        return self.cols * GROUP if self.compressed else self.cols

    def row_tiles(self, rows: int) -> int:
        """Tiles that hold ``rows`` rows."""
        return -(-rows // self.rows)

    def padded_cols(self, cols: int) -> int:
        """``cols`` rounded up to whole chunks."""
        return -(-cols // self.cols) * self.cols

    def chunks(self, cols: int) -> int:
        """Chunks of a part."""
        return -(-cols // self.cols)

    def piece_chunks(self, cols: int) -> int:
        """Chunks of each piece of a compressed part; ``piece_chunks`` in ffi/kernel/simt/tuning.h.

        Raises:
            ConfigError: Parts of so many columns cannot be compressed.
        """
        chunks = self.chunks(cols)
        for pieces in range(-(-chunks // LONGEST_PIECE), chunks // GROUP + 1):
            if chunks % (pieces * GROUP) == 0:
                return chunks // pieces
        raise ConfigError(f"compressed weights need a multiple of {GROUP * self.cols} columns per lane, not {cols}")

    def part_words(self, cols: int) -> int:
        """Words of a part on the tape, each as long as an uncompressed weight.

        Raises:
            ConfigError: As for :meth:`piece_chunks`.
        """
        weights = self.rows * self.padded_cols(cols)
        if not self.compressed or not weights:
            return weights
        return self.chunks(cols) // self.piece_chunks(cols) * HEAD_WORDS + weights // 4 * 3
