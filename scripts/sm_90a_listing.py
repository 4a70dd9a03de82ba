"""The decoding program for Hopper as NVIDIA's disassembler lists it: for whoever checks what the compiler made."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

SECONDS = 120
"""That the disassembler may take."""


def find_disassembler() -> Path | None:
    """In PATH, in a CUDA toolkit, or in the package nvidia-cuda-nvdisasm, which keeps it in one of NVIDIA's folders."""
    if found := shutil.which("nvdisasm"):
        return Path(found)
    spec = importlib.util.find_spec("nvidia")
    folders = [Path("/usr/local"), *map(Path, (spec.submodule_search_locations or []) if spec else [])]
    for folder in folders:
        for path in sorted(folder.glob("*/bin/nvdisasm"), reverse=True):
            if os.access(path, os.X_OK):
                return path
    return None


def disassemble(disassembler: Path, program: bytes) -> dict[int, str]:
    """Lists a program; see :func:`instructions`."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as code:
        code.write(program)
        code.flush()
        command = [str(disassembler), "-c", code.name]
        process = subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)
    return instructions(process.stdout)


def instructions(listing: str) -> dict[int, str]:
    """Instructions of mono_decode, functions that it calls included, by their offset."""
    body = listing.partition("\n.text.mono_decode:")[2].partition("\n.text.")[0]
    found = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+([^;]+);", body, re.MULTILINE)
    return {int(offset, 16): instruction for offset, instruction in found}
