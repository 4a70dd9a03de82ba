"""Compiles the resident program of a plan for gfx942 with clang and lld, of the package ``ziglang`` or of Debian."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jax_mono import gpus, native
from jax_mono.extras import require
from jax_mono.plan import Plan
from jax_mono.record import plan_record
from jax_mono.tape import STORAGE
from jax_mono.topology import MI300X

ARCHITECTURE = "gfx942"
"""As compilers call it."""

COMPUTE_UNITS = MI300X.units
"""Of an MI300X; each holds one block."""

SHARED_MEMORY = MI300X.near_bytes.whole
"""Bytes that a block may have; a compute unit has no more."""

OPTIONS = (
    *("-x", "hip", f"--offload-arch={ARCHITECTURE}", "--offload-device-only"),
    *("-nogpulib", "-nogpuinc", "-mcode-object-version=5"),  # neither ROCm's libraries nor its headers
    *("-std=c++17", "-O3"),  # as hipRTC is told in ffi/host/compiler.cc
)
"""Of clang, to make assembly of the program."""


class CompilerError(RuntimeError):
    """There is no such compiler, or it refuses; the message says why."""


@dataclass(frozen=True)
class Toolchain:
    """A compiler with its linker.

    Attributes:
        clang: Command line of clang.
        lld: Command line of lld, as a linker of ELF files.
    """

    clang: tuple[str, ...]
    lld: tuple[str, ...]


def ziglang() -> Toolchain:
    """The toolchain of the Python package ``ziglang``.

    Raises:
        MissingExtraError: It is not installed.
    """
    require("ziglang", "test")
    zig = (sys.executable, "-m", "ziglang")
    return Toolchain((*zig, "clang"), (*zig, "ld.lld"))


def debian(name: str) -> Toolchain:
    """A clang of the system, with the lld of the same version.

    Args:
        name: Such as ``clang-19``.

    Raises:
        CompilerError: It or its linker is not installed.
    """
    version = name.removeprefix("clang")
    linker = f"ld.lld{version}"
    for tool, package in ((name, name), (linker, f"lld{version}")):
        if shutil.which(tool) is None:
            raise CompilerError(
                f"there is no {tool} on the PATH; run apt-get install {package}, or leave out --compiler for ziglang's"
            )
    return Toolchain((name,), (linker,))


def assembly(
    plan: Plan,
    dtype: str,
    toolchain: Toolchain,
    *,
    sources: Mapping[str, str] | None = None,
    options: Sequence[str] = OPTIONS,
) -> str:
    """Compiles the program of a plan to assembly.

    Args:
        plan: For GPUs (``target=jax_mono.plan.GPU``).
        dtype: Of the weights: ``bfloat16`` or ``float16``.
        toolchain: What to compile with.
        sources: By the name under which they include each other; :func:`jax_mono.gpus.kernel_sources` if None.
        options: Of clang.

    Raises:
        NativeError: The plan does not fit this target, or the library is missing.
        CompilerError: The compiler refuses.
    """
    shape = native.gpu_shape(
        plan_record(plan), list(STORAGE).index(dtype), architecture=ARCHITECTURE, shared_memory=SHARED_MEMORY
    )
    files = {**(gpus.kernel_sources() if sources is None else sources), "shape.h": shape.header}
    with tempfile.TemporaryDirectory(prefix="jax_mono_") as directory:
        for name, text in files.items():
            path = Path(directory, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        entry, listing = Path(directory, f"kernel/entry/{ARCHITECTURE}.h"), Path(directory, "program.s")
        _run([*toolchain.clang, *options, "-S", f"-I{directory}", str(entry), "-o", str(listing)])
        return listing.read_text()


def code_object(listing: str, toolchain: Toolchain) -> bytes:
    """Assembles and links a listing: what ``hipModuleLoad`` takes.

    Raises:
        CompilerError: Assembler or linker refuse.
    """
    with tempfile.TemporaryDirectory(prefix="jax_mono_") as directory:
        source, relocatable, linked = (Path(directory, name) for name in ("program.s", "program.o", "program.hsaco"))
        source.write_text(listing)
        target = ("--target=amdgcn-amd-amdhsa", f"-mcpu={ARCHITECTURE}", "-mcode-object-version=5")
        _run([*toolchain.clang, *target, "-c", str(source), "-o", str(relocatable)])
        _run([*toolchain.lld, "-shared", str(relocatable), "-o", str(linked)])
        return linked.read_bytes()


def sizes(listing: str, toolchain: Toolchain) -> list[int]:
    """Bytes of the instructions of a listing, in its order.

    Raises:
        CompilerError: The assembler refuses.
    """
    target = ("-cc1as", "-triple", "amdgcn-amd-amdhsa", "-target-cpu", ARCHITECTURE)
    with tempfile.TemporaryDirectory(prefix="jax_mono_") as directory:
        source, shown = Path(directory, "program.s"), Path(directory, "shown.s")
        source.write_text(listing)
        _run([*toolchain.clang, *target, "-filetype", "asm", "-show-encoding", str(source), "-o", str(shown)])
        return [line.count(",") + 1 for line in re.findall(r"; encoding: \[(.*)\]$", shown.read_text(), re.MULTILINE)]


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise CompilerError(f"{command[0]} does not start: {error.strerror}") from error
    if done.returncode:
        raise CompilerError(f"{' '.join(command)} failed with {done.returncode}:\n{done.stderr.strip()}")
