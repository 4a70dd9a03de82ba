"""What mini-coder has to beat: bits per byte of its held-out text by gzip, xz and a 5-gram model of bytes.

    python scripts/mini_coder_baselines.py --data data/mini-coder --out runs/baselines.json

gzip and xz compress the held-out documents at their highest levels: each by itself, as the model reads them, and all as
one file, where they also profit from what documents share. The 5-gram model is trained on the
first --train-bytes of the training text and interpolates contexts of 4 to 0 bytes by Witten and Bell ("The
zero-frequency problem", IEEE Transactions on Information Theory 37, 1991): a context that was followed by n bytes, t of
them different, gives the next shorter context the weight t / (n + t). Takes some 30 bytes of memory per byte of
training text.
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import math
from pathlib import Path

import numpy as np
from mini_coder.token_file import DTYPE

from jax_mono.evals.bits import read_documents
from jax_mono.tokenizer import Tokenizer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory that prepare_mini_coder.py has written")
    parser.add_argument("--train-bytes", type=int, default=60_000_000, help="of the 5-gram model (60 MB)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    documents = [text.encode() for _, text in read_documents([arguments.data / "held_out.jsonl.gz"])]
    held_out = b"".join(documents)
    training = training_bytes(arguments.data, arguments.train_bytes)
    record = {
        "held_out_bytes": len(held_out),
        "training_bytes_of_5_gram": len(training),
        "gzip_each": 8.0 * sum(map(gzip_size, documents)) / len(held_out),
        "xz_each": 8.0 * sum(map(xz_size, documents)) / len(held_out),
        "gzip_together": 8.0 * gzip_size(held_out) / len(held_out),
        "xz_together": 8.0 * xz_size(held_out) / len(held_out),
        "5-gram": n_gram_bits(training, held_out, 5),
    }
    print(json.dumps(record, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    return 0


def gzip_size(data: bytes) -> int:
    return len(gzip.compress(data, 9))


def xz_size(data: bytes) -> int:
    return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


def training_bytes(data: Path, limit: int) -> bytes:
    """The beginning of the training text, from its tokens."""
    tokenizer = Tokenizer.open(data / "tokenizer")
    tokens = np.memmap(data / "train.bin", DTYPE, mode="r")
    parts, size = [], 0
    for start in range(0, len(tokens), 1 << 20):
        parts.append(tokenizer.decode(tokens[start : start + (1 << 20)].tolist()).encode())
        size += len(parts[-1])
        if size >= limit:
            break
    return b"".join(parts)[:limit]


def n_gram_bits(training: bytes, text: bytes, order: int) -> float:
    """Bits per byte of a text under a model of bytes.

    Args:
        training: What the model has seen.
        text: What it predicts; a context does not reach over its beginning.
        order: Bytes of an n-gram: the predicted one and those before it.

    Returns:
        Bits per byte; a byte never seen in any context has the probability 1 / 256 in the last one.
    """
    seen, wanted = (np.frombuffer(data, np.uint8) for data in (training, text))
    probability = np.full(len(wanted), 1.0 / 256.0)
    for length in range(1, order + 1):
        grams, counts = np.unique(_grams(seen, length), return_counts=True)
        # Sorted grams of one context, which is all but the last byte, are neighbours.
        contexts, first, different = np.unique(grams >> np.uint64(8), return_index=True, return_counts=True)
        totals = np.add.reduceat(counts, first)
        ours = _grams(wanted, length)
        followed = _look_up(grams, counts, ours)
        total, kinds = (_look_up(contexts, values, ours >> np.uint64(8)) for values in (totals, different))
        known = total > 0
        part = probability[length - 1 :]
        mixed = (followed + kinds * part) / np.maximum(total + kinds, 1)
        probability[length - 1 :] = np.where(known, mixed, part)
    return float(-np.log2(probability).mean()) if len(wanted) else math.nan


def _grams(data: np.ndarray, length: int) -> np.ndarray:
    """Every run of bytes as a number, the first byte highest."""
    count = max(0, len(data) - length + 1)
    grams = np.zeros(count, np.uint64)
    for offset in range(length):
        grams <<= np.uint64(8)
        grams |= data[offset : offset + count]
    return grams


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Values of keys, which are sorted; zero for those that are not there."""
    index = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[index] == wanted, values[index], 0)


if __name__ == "__main__":
    raise SystemExit(main())
