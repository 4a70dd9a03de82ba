"""Reads Python source out of wheels and of the standard library; nothing of it is installed or run."""

from __future__ import annotations

import email.parser
import platform
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mini_coder.packages import (
    PACKAGES,
    STANDARD_LIBRARY,
    STANDARD_LIBRARY_LICENCE,
    WHEEL_PLATFORM,
    WHEEL_PYTHON,
    Package,
)

_SMALLEST, _LARGEST = 64, 1_000_000
"""Bytes of a document."""
_LONGEST_LINE, _MEAN_LINE = 2000, 120
"""Characters; beyond, a file is data and not code."""
_MOST_DIGITS = 0.25
"""Share of digits; beyond, a file is a table."""


class CorpusError(RuntimeError):
    """Data that cannot be had or may not be used."""


@dataclass(frozen=True)
class Document:
    """One file.

    Attributes:
        package: The package's name.
        path: Inside the package.
        text: Its content.
    """

    package: str
    path: str
    text: str


def download(directory: Path) -> None:
    """Downloads the wheels that are missing, by pip, without what they depend on."""
    wanted = [package for package in PACKAGES if find_wheel(directory, package) is None]
    if not wanted:
        return
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += [f"--python-version={WHEEL_PYTHON}", f"--platform={WHEEL_PLATFORM}", "--platform=manylinux2014_x86_64"]
    command += ["--dest", str(directory), *(f"{package.name}=={package.version}" for package in wanted)]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        raise CorpusError(f"pip could not download the packages: {process.stderr.strip()[-500:]}")


def find_wheel(directory: Path, package: Package) -> Path | None:
    """The downloaded wheel of a package."""
    stem = package.name.replace("-", "_")
    return next(iter(sorted(directory.glob(f"{stem}-{package.version}-*.whl"))), None)


def check_licence(wheel: Path, package: Package) -> None:
    """Refuses a wheel whose metadata does not declare the expected licence.

    Raises:
        CorpusError: Says what it declares.
    """
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (entry for entry in archive.namelist() if entry.endswith(".dist-info/METADATA"))
        about = email.parser.HeaderParser().parsestr(archive.read(name).decode(errors="replace"))
    declared = [*about.get_all("License-Expression", ()), *about.get_all("License", ())]
    declared += [entry for entry in about.get_all("Classifier", ()) if entry.startswith("License ::")]
    if about["Version"] != package.version or not any(package.declared in entry for entry in declared):
        found = "; ".join(entry.splitlines()[0][:80] for entry in declared) or "nothing"
        raise CorpusError(
            f"{wheel.name}: declares version {about['Version']} and licence {found}, expected {package.version} and "
            f"{package.declared!r}; look at its licence before changing packages.py"
        )


def wheel_documents(wheel: Path, package: Package) -> Iterator[Document]:
    """Yields the Python files of a wheel, in the order of their names."""
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(entry for entry in archive.namelist() if entry.endswith(".py")):
            text = readable(archive.read(name))
            if text is not None:
                yield Document(package.name, name, text)


def library_documents() -> Iterator[Document]:
    """Yields the Python files of this interpreter's standard library, in the order of their names."""
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).parts
        if not {"site-packages", "dist-packages", "__pycache__"} & set(parts):
            text = readable(file.read_bytes())
            if text is not None:
                yield Document(STANDARD_LIBRARY, "/".join(parts), text)


def library_entry() -> dict[str, object]:
    """The manifest's line of the standard library."""
    version = platform.python_version()
    return {"name": STANDARD_LIBRARY, "version": version, "licence": STANDARD_LIBRARY_LICENCE, "held_out": False}


def readable(data: bytes) -> str | None:
    """The text of a file that is worth learning from: UTF-8, neither tiny nor huge, code and not a table."""
    if not _SMALLEST <= len(data) <= _LARGEST:
        return None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return None
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    lines = text.splitlines()
    if not lines or max(map(len, lines)) > _LONGEST_LINE or len(text) > _MEAN_LINE * len(lines):
        return None
    digits = sum(map(text.count, "0123456789"))
    return text if digits <= _MOST_DIGITS * len(text) else None
