#!/usr/bin/env python3
"""The GPU's resident program under compute-sanitizer, on models small enough for it.

    PYTHONPATH=. python scripts/gpu_sanitize.py
    PYTHONPATH=. python scripts/gpu_sanitize.py --tools memcheck --models llama --tokens 2

Needs an NVIDIA GPU that this library has a program for, compute-sanitizer from the CUDA toolkit (or its package
cuda-sanitizer-api), and for racecheck nvdisasm (from there or from nvidia-cuda-nvdisasm). Each model first runs alone,
which compiles its program and says what the tokens are; then under each tool, restricted to the kernel mono_decode,
where the tokens have to be the same.

  memcheck    accesses beyond or astride of what was allocated, in global and in shared memory: every error counts
  racecheck   hazards between the threads of a block in shared memory: errors count, warnings are shown. The ring of
              weights is left out: the tool sees bulk copies (cp.async.bulk) write there and products read, but not
              that each product waits for the barrier (mbarrier) on which its copy ends. So races in which nothing
              writes but such copies, by the program's listing, are counted apart. That the ring is right is for
              tests of parity to show
  synccheck   barriers that not all threads of a warp reach as they should

initcheck is not among them: it would have to follow XLA's kernels, too, to know what they wrote.

None of them looks at the order of accesses between blocks or GPUs: that is argued in ffi/kernel/handoff.h and tested
by tests/gpu. A tool makes the program 10 to 100 times slower; waits are given that time.

Exit status: 0 all clean, 1 a tool found something, 2 nothing was checked.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from sm_90a_listing import disassemble, find_disassembler

ROOT = Path(__file__).parents[1]
TOOLS = ("memcheck", "racecheck", "synccheck")
MODELS = {"llama": (1, 2), "laneformer": (2, 2)}
"""Devices and blocks per device: together they use every hand-off."""
FOUND = 86
"""Exit status that compute-sanitizer gives when it found something."""
WAIT_LIMIT_MS = 300_000

ERRORS = re.compile(r"ERROR SUMMARY: (\d+) error")
RACE = re.compile(r"^=+ Error: (Race reported between .*(?:\n=+     and .*)*)", re.MULTILINE)
HAZARDS = re.compile(r"RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) errors?, (\d+) warnings?\)")


def find_sanitizer(named: str | None) -> Path:
    """The program: as named, in PATH, or in a CUDA toolkit."""
    if named:
        path = Path(named)
        if not os.access(path, os.X_OK):
            raise SystemExit2(f"{path} is no program; give --sanitizer the path of compute-sanitizer")
        return path
    if found := shutil.which("compute-sanitizer"):
        return Path(found)
    for folder in ("bin", "compute-sanitizer"):
        for path in sorted(Path("/usr/local").glob(f"cuda*/{folder}/compute-sanitizer"), reverse=True):
            if os.access(path, os.X_OK):
                return path
    raise SystemExit2(
        "compute-sanitizer is neither in PATH nor in /usr/local/cuda*/bin; install the CUDA toolkit or its package "
        "cuda-sanitizer-api, or name the program with --sanitizer"
    )


class SystemExit2(SystemExit):
    """Nothing can be checked: says why, with exit status 2."""

    def __init__(self, message: str) -> None:
        print(f"gpu_sanitize: {message}", file=sys.stderr)
        super().__init__(2)


@dataclass(frozen=True)
class Verdict:
    """How a model went under a tool."""

    model: str
    tool: str
    ok: bool
    words: str
    seconds: float


def judge(tool: str, status: int, log: str, tokens: str, expected: str, copies: set[str]) -> tuple[bool, str]:
    """Whether a run was clean, and why not.

    Args:
        tool: The tool.
        status: Exit status of compute-sanitizer.
        log: What it and the program wrote.
        tokens: What the program decoded, or empty.
        expected: What it decoded alone.
        copies: Where the program copies into the ring.
    """
    ring, finding = 0, first_finding(log)
    if tool == "racecheck" and (found := HAZARDS.search(log)):
        races = RACE.findall(log)
        others = [race for race in races if not is_of_ring(race, copies)]
        ring = len(races) - len(others)
        if others:
            finding = " ".join(line.removeprefix("=========").strip() for line in others[0].splitlines())
        errors = int(found[1]) - ring
        words = f"{errors} errors, {found[2]} warnings" + (f" ({ring} on the ring of weights)" if ring else "")
    elif found := ERRORS.search(log):
        errors, words = int(found[1]), f"{found[1]} errors"
    else:
        return False, f"no summary (exit status {status}): {last_lines(log)}"
    if errors:
        return False, f"{words}; first: {finding}"
    if not tokens:
        return False, f"the program did not come to its end (exit status {status}): {last_lines(log)}"
    if tokens != expected:
        return False, f"tokens {tokens}, not {expected}"
    if status not in ((0, FOUND) if ring else (0,)):
        return False, f"{words}, but exit status {status}: {last_lines(log)}"
    return True, words


def is_of_ring(race: str, copies: set[str]) -> bool:
    """Whether nothing but copies writes in a reported race."""
    written = set(re.findall(r"Write access at (\S+)", race))
    return bool(written) and written <= copies


def bulk_copies(instructions: dict[int, str]) -> set[str]:
    """Where a program has bulk copies into shared memory, as reports name places."""
    return {f"mono_decode+{offset:#x}" for offset, instruction in instructions.items() if "UBLKCP" in instruction}


def program_in(cache: Path) -> bytes:
    """The machine code of the one program in a cache of programs."""
    (path,) = cache.glob("*.program")
    data = path.read_bytes()
    return data[data.index(b"\x7fELF") :]


def last_lines(log: str) -> str:
    return " | ".join(line.strip() for line in log.strip().splitlines()[-4:])


def first_finding(log: str) -> str:
    lines = [line.removeprefix("=========").strip() for line in log.splitlines() if line.startswith("=========")]
    telling = [
        line for line in lines if re.match(r"(Error|Warning|Invalid|Race|Barrier|Uninit|Misaligned|Program)", line)
    ]
    return " ".join((telling or lines)[:2])


def tokens_in(log: str) -> str:
    found = re.search(r"^tokens (\[.*\])$", log, re.MULTILINE)
    return found[1] if found else ""


def run(command: list[str], environment: dict[str, str], seconds: float) -> tuple[int, str]:
    """Exit status and all output; 124 if it took too long."""
    try:
        process = subprocess.run(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=seconds,
        )
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        return 124, (output.decode(errors="replace") if isinstance(output, bytes) else output) + "\nout of time"
    return process.returncode, process.stdout


def sanitizer_command(sanitizer: Path, tool: str, command: list[str]) -> list[str]:
    """What to start; XLA's kernels and what its calls return are none of our business."""
    # Children (XLA starts some to compile) are left alone: with them compute-sanitizer 2025.3.1 itself breaks down.
    options = ["--target-processes", "application-only", "--tool", tool, "--kernel-name", "kns=mono_decode"]
    options += ["--error-exitcode", str(FOUND)]
    if tool == "memcheck":
        options += ["--report-api-errors", "no"]
    if tool == "racecheck":
        options += ["--racecheck-report", "analysis"]
    return [str(sanitizer), *options, "--print-limit", "20", *command]


def decode(model: str, steps: int) -> None:
    """The child: generates, and prints the tokens. Every token goes through the resident program alone."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import jax
    import jax.numpy as jnp
    from kernel.common import make_decoder, some_tokens
    from tiny import tiny

    from jax_mono.sampling import Sampling

    if jax.default_backend() == "cpu":
        print("no GPU: JAX has only CPUs", flush=True)
        raise SystemExit(2)
    devices, blocks = MODELS[model]
    windows = {} if model == "laneformer" else {"sliding_windows": (2, 0, 0)}
    decoder = make_decoder(tiny(model, **windows), devices=devices, blocks=blocks, dtype=jnp.bfloat16)
    prompt = some_tokens(3)
    greedy = decoder.generate(prompt, max_new_tokens=steps, top_logprobs=2).tokens
    filters = Sampling(temperature=1.0, top_k=20, top_p=0.9, repetition_penalty=1.2)
    drawn = decoder.generate(prompt, max_new_tokens=steps, sampling=filters, seed=1).tokens
    print(f"tokens {greedy + drawn}", flush=True)
    os._exit(0)  # the tool's report must not wait for JAX to take itself apart


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tools", nargs="+", choices=TOOLS, default=["memcheck", "racecheck"], help="default: memcheck racecheck"
    )
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=list(MODELS), help="default: both")
    parser.add_argument("--tokens", type=int, default=4, metavar="N", help="tokens per generation; default: 4")
    parser.add_argument(
        "--timeout", type=float, default=240, metavar="S", help="seconds that one run may take; default: 240"
    )
    parser.add_argument("--sanitizer", metavar="PATH", help="compute-sanitizer; default: in PATH or /usr/local/cuda*")
    parser.add_argument("--logs", metavar="DIR", help="keep each tool's whole output there")
    parser.add_argument("--json", metavar="FILE", help="also write the verdicts to a file")
    parser.add_argument("--decode", metavar="MODEL", choices=sorted(MODELS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.decode:
        decode(arguments.decode, arguments.tokens)
    sanitizer = find_sanitizer(arguments.sanitizer)
    disassembler = find_disassembler() if "racecheck" in arguments.tools else None
    if "racecheck" in arguments.tools and disassembler is None:
        raise SystemExit2("racecheck needs nvdisasm; pip install nvidia-cuda-nvdisasm, or leave it out with --tools")

    verdicts: list[Verdict] = []
    with tempfile.TemporaryDirectory() as directory:
        logs = Path(arguments.logs or directory)
        logs.mkdir(parents=True, exist_ok=True)
        environment = {
            **os.environ,
            "JAX_MONO_WAIT_LIMIT_MS": str(WAIT_LIMIT_MS),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "PYTHONUNBUFFERED": "1",
            # Else XLA tries its products out, and fails: the tools reach into the kernels that it tries.
            "XLA_FLAGS": "--xla_gpu_autotune_level=0",
        }
        for model in arguments.models:
            cache = Path(directory) / f"{model}-programs"
            environment["JAX_MONO_CACHE"] = str(cache)
            child = [sys.executable, str(Path(__file__).resolve())]
            child += ["--decode", model, "--tokens", str(arguments.tokens)]
            status, log = run(child, environment, arguments.timeout)
            expected = tokens_in(log)
            if status or not expected:
                raise SystemExit2(f"{model} does not run even without a tool (exit status {status}): {last_lines(log)}")
            print(f"      {model}: {expected}", flush=True)
            copies = bulk_copies(disassemble(disassembler, program_in(cache))) if disassembler else set()
            for tool in arguments.tools:
                started = time.monotonic()
                status, log = run(sanitizer_command(sanitizer, tool, child), environment, arguments.timeout)
                (logs / f"{model}-{tool}.log").write_text(log)
                ok, words = judge(tool, status, log, tokens_in(log), expected, copies)
                verdicts.append(Verdict(model, tool, ok, words, time.monotonic() - started))
                mark = "ok  " if ok else "FAIL"
                print(f"{mark}  {model} under {tool}: {words} ({verdicts[-1].seconds:.0f} s)", flush=True)
    failed = sum(not verdict.ok for verdict in verdicts)
    print(f"{len(verdicts) - failed} of {len(verdicts)} runs are clean")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps([asdict(verdict) for verdict in verdicts], indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
