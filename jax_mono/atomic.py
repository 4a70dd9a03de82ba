"""Writes directories all or nothing."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_directory(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Makes a directory that appears under its name only once it is complete.

    Args:
        path: The final name. Its parents are made.
        overwrite: Whether a directory that has content is replaced.

    Yields:
        An empty directory beside ``path`` to write into. It becomes ``path`` when the block ends, and is
        removed when the block raises.

    Raises:
        FileExistsError: If ``path`` has content and ``overwrite`` is false, or ``path`` is a file.
    """
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file; choose another directory")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise FileExistsError(f"{path} is not empty; choose another directory or pass overwrite=True")
    path.parent.mkdir(parents=True, exist_ok=True)
    # One fresh parent holds the new directory and, for the moment of the swap, the old one.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
        fresh, old = Path(scratch, "new"), Path(scratch, "old")
        fresh.mkdir()
        yield fresh
        if path.is_dir():
            os.rename(path, old)
        try:
            os.rename(fresh, path)
        except OSError:
            if old.is_dir():
                shutil.move(old, path)
            raise
