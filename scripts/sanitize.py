"""Runs the resident program under a sanitizer and compares its tokens with those of the installed library.

    python scripts/sanitize.py --sanitizer thread
    python scripts/sanitize.py --sanitizer address
    python scripts/sanitize.py --sanitizer thread --mutants

A plain C++ driver (ffi/test/sanitize_driver.cc), the kernel and ffi/host without the XLA handler are built with g++ and
run on small random models: all numbers of devices and blocks, every way to sample, scoring, streaming, cancelling, a
lost hand-off, and both forms of the call. `address` means address and undefined behaviour. Any report or any difference
fails. With --mutants the sources are broken on purpose, one fault at a time, and each must be noticed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
SOURCES = (
    "ffi/test/sanitize_driver.cc",
    "ffi/host/gang.cc",
    "ffi/host/rendezvous.cc",
    "ffi/host/failure.cc",
    "ffi/host/session.cc",
    "ffi/host/trace.cc",
    "ffi/host/gpu_memory.cc",
    "ffi/host/driver.cc",
    "ffi/host/driver_cuda.cc",
    "ffi/host/driver_hip.cc",
    "ffi/host/shared_library.cc",
    "ffi/host/cpu.cc",
    "ffi/host/program_portable.cc",
)
FLAGS = {"thread": "thread", "address": "address,undefined,float-cast-overflow"}
OPTIONS = {
    "TSAN_OPTIONS": "exitcode=66 halt_on_error=1",
    "ASAN_OPTIONS": "exitcode=66 detect_leaks=1",
    "UBSAN_OPTIONS": "halt_on_error=1 print_stacktrace=1",
}
OUTCOME = ("tokens", "logprobs", "top_ids", "top_logprobs", "status", "logits")
NOT_FINITE = 4
"""``kNotFinite`` in ffi/kernel/call.h."""
CAPACITY = 48
"""Positions of the KV cache; more than two chunks of attention positions."""


@dataclass(frozen=True)
class Case:
    """One run of the driver.

    Attributes:
        family: Of the model, ``laneformer`` or ``qwen3``.
        devices: Devices.
        blocks: Blocks per device.
        what: The name of the path that is taken.
        steps: Tokens to generate or to score.
        prompt: Tokens to feed before any is generated.
        score: Whether tokens are fed instead of drawn.
        dtype: Of the weights.
        meet: Whether every device comes from a thread of its own, as under ``jax.shard_map``.
        cancel_after: Cancel from another thread after so many tokens; -1 never.
        streams: Whether another thread reads the tokens as they appear.
        lost: Device, block, layer and channel number of a hand-off that gets lost.
        head: How lanes reach the LM head.
        poison: Whether a weight is not a number, so that the call ends with its first token.
        compressed: Whether tapes are; the model is then wide enough.
        options: Fields of the request.
    """

    family: str
    devices: int
    blocks: int
    what: str
    steps: int = 6
    prompt: int = 1
    score: bool = False
    dtype: str = "float32"
    meet: bool = False
    cancel_after: int = -1
    streams: bool = False
    lost: tuple[int, ...] = ()
    head: str = "mean_of_norms"
    poison: bool = False
    compressed: bool = False
    options: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.family}, {self.devices} x {self.blocks}, {self.what}"


def make_cases() -> list[Case]:
    sizes = [(devices, blocks) for devices in (1, 2, 4, 8) for blocks in (1, 2, 4, 8)]
    cases = [Case("laneformer", *size, "greedy") for size in sizes]
    filters = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.01}
    cases += [Case("qwen3", *size, "top-k and top-p", options=filters) for size in sizes]
    for family, size in (("laneformer", (4, 2)), ("qwen3", (2, 4))):
        long = CAPACITY - 8  # beyond two chunks of positions, so that every split of attention has some
        cases += [
            Case(family, *size, "sampled", steps=long, options={"temperature": 0.9, "repetition_penalty": 1.2}),
            Case(family, *size, "alternatives", options={"top_n": 3}),
            Case(family, *size, "filters and alternatives", steps=long, options=filters | {"top_n": 2}),
            Case(family, *size, "scored", steps=long, score=True),
            Case(family, *size, "scored with alternatives", score=True, options={"top_n": 3}),
            Case(family, *size, "bfloat16", steps=long, dtype="bfloat16"),
            Case(family, *size, "compressed", dtype="bfloat16", compressed=True),
            Case(family, *size, "fed prompt", steps=20, prompt=21, options={"repetition_penalty": 1.2}),
            Case(family, *size, "fed prompt, filtered", prompt=21, options=filters),
            Case(family, *size, "fed prompt, cancelled", steps=20, prompt=21, streams=True, cancel_after=0),
            Case(family, *size, "streamed", steps=long, streams=True),
            Case(family, *size, "cancelled", steps=CAPACITY, streams=True, cancel_after=2),
            Case(family, *size, "one call per device", steps=long, meet=True),
            Case(
                family, *size, "one call per device, cancelled", meet=True, streams=True, cancel_after=2, steps=CAPACITY
            ),
            Case(family, *size, "not finite", poison=True),
            Case(family, *size, "not finite, filtered", poison=True, options=filters),
            Case(family, *size, "lost hand-off", lost=(1, 1, 0, 3)),
            Case(family, *size, "one call per device, lost hand-off", meet=True, lost=(0, 1, 1, 6)),
        ]
    cases += [Case("laneformer", 4, 2, head, head=head) for head in ("norm_of_sum", "per_lane")]
    return cases


def make_config(case: Case):
    from jax_mono.config import Lanes, ModelConfig

    common = {"vocab_size": 128, "hidden_size": 64, "max_position_embeddings": CAPACITY}
    if case.compressed:
        # Lanes of 128 columns and more.
        return dataclasses.replace(
            make_config(dataclasses.replace(case, compressed=False)),
            hidden_size=128,
            intermediate_size=1024,
            head_dim=64,
        )
    if case.family == "laneformer":
        return ModelConfig(
            family="laneformer", intermediate_size=128, num_layers=5, num_heads=16, num_kv_heads=8, head_dim=8,
            rope_interleaved=True, sliding_windows=(5, 5, 5, 0, 0), lanes=Lanes(count=8, delay=2, head=case.head),
            **common,
        )  # fmt: skip
    return ModelConfig(
        family="qwen3", intermediate_size=256, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16, qk_norm=True,
        **common,
    )  # fmt: skip


def write_case(case: Case, path: Path, limit_ms: int) -> None:
    """Writes operands and, as computed by the installed library, the expected outcome."""
    import jax
    import jax.numpy as jnp

    from jax_mono.call import CallRequest, Mode, resident_call
    from jax_mono.decode import empty_cache
    from jax_mono.models.random_source import RandomSource
    from jax_mono.models.rope import rope_table
    from jax_mono.packing import pack
    from jax_mono.plan import make_plan
    from jax_mono.record import plan_record
    from jax_mono.tape import STORAGE
    from jax_mono.tile import TileFormat

    config = make_config(case)
    plan = make_plan(config, devices=case.devices, blocks=case.blocks, tile=TileFormat(compressed=case.compressed))
    tapes = pack(plan, RandomSource(config, seed=1), dtype=case.dtype)
    rope, cache = rope_table(config, CAPACITY), empty_cache(plan, CAPACITY, case.dtype)
    fed = case.steps if case.score else case.prompt
    tokens = np.random.default_rng(2).integers(0, config.vocab_size, fed).astype(np.int32)
    top_n = int(case.options.get("top_n", 0))
    request = CallRequest(
        position=np.int32(0),
        num_forced=np.int32(fed),
        budget=np.int32(case.steps),
        session=np.int32(0),
        seed=np.asarray([3, 4], np.uint32),
        temperature=np.float32(case.options.get("temperature", 0.0)),
        top_k=np.int32(case.options.get("top_k", 0)),
        top_p=np.float32(case.options.get("top_p", 1.0)),
        min_p=np.float32(case.options.get("min_p", 0.0)),
        repetition_penalty=np.float32(case.options.get("repetition_penalty", 1.0)),
        stops=np.asarray([-1], np.int32),
        history=np.append(tokens, np.int32(-1)),
        forced=tokens,
    )
    mode = Mode.SCORE if case.score else Mode.GENERATE
    call = jax.jit(
        lambda tapes, rope, k, v, request: resident_call(
            plan, tapes, rope, (k, v), request, mode=mode, room=case.steps, top_n=top_n, want_logits=case.score
        )
    )
    result = jax.block_until_ready(call(tapes, jnp.asarray(rope), cache.k, cache.v, request))
    assert len(set(np.asarray(result.tokens).tolist())) > 1 or case.score, "a model that repeats itself tests little"
    outcome = {f"expected_{name}": np.asarray(getattr(result, name)) for name in OUTCOME}
    head = np.array(tapes.head)
    if case.poison:
        head.flat[0] = np.nan
        outcome["expected_status"] = np.asarray([1, NOT_FINITE], np.int32)
        outcome["expected_tokens"] = np.full(case.steps, -1, np.int32)
        outcome["expected_logprobs"] = np.full(case.steps, np.nan, np.float32)  # anything will do
    integers = {
        "mode": mode, "capacity": CAPACITY, "top_n": top_n, "weights": list(STORAGE).index(case.dtype),
        "want_logits": case.score, "meet": case.meet, "streams": case.streams, "cancel_after": case.cancel_after,
        # A lost hand-off has to be waited for.
        "limit_ms": 2_000 if case.lost else limit_ms,
    }  # fmt: skip
    arrays = {name: np.int32(value) for name, value in integers.items()}
    arrays |= {"plan": plan_record(plan), "rope": rope, "lost": np.asarray(case.lost, np.int32)}
    arrays |= {"layers": tapes.layers, "head": head, "constants": tapes.constants, "embed": tapes.embed}
    arrays |= {name: value for name, value in vars(request).items() if name != "session"}
    arrays |= outcome
    with path.open("wb") as file:
        for name, value in arrays.items():
            data = np.ascontiguousarray(value).tobytes()
            file.write(np.asarray([len(name), len(data)], np.int64).tobytes() + name.encode() + data)


def build(sanitizer: str, compiler: str, root: Path, out: Path) -> Path:
    """Compiles the driver; the sources in parallel."""
    flags = [f"-fsanitize={FLAGS[sanitizer]}", "-std=c++17", "-O1", "-g", "-fno-omit-frame-pointer", "-Wall", "-Wextra"]
    if sanitizer == "address":
        flags.append("-fno-sanitize-recover=all")

    def compile_one(source: str) -> str:
        target = out / (Path(source).stem + ".o")
        run([compiler, *flags, f"-I{root / 'ffi'}", "-c", str(root / source), "-o", str(target)])
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    driver = out / "sanitize_driver"
    run([compiler, *flags, *objects, "-pthread", "-ldl", "-o", str(driver)])
    return driver


def run(command: list[str]) -> None:
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\n{process.stdout}{process.stderr}")


@dataclass(frozen=True)
class Verdict:
    """How a case went: ``ok`` or not, the driver's line or the sanitizer's report, and the seconds it took."""

    case: str
    ok: bool
    words: str
    seconds: float


def check(driver: Path, case: Case, path: Path) -> Verdict:
    start = time.perf_counter()
    command = [str(driver), str(path)]
    for prefix in ([], ["setarch", "--addr-no-randomize"]):
        process = subprocess.run(
            [*prefix, *command], capture_output=True, text=True, timeout=300, env=os.environ | OPTIONS
        )
        # Older runtimes cannot live with the address randomisation of newer kernels.
        if "unexpected memory mapping" not in process.stderr or not shutil.which("setarch"):
            break
    words = (process.stdout + process.stderr).strip()
    return Verdict(case.name, process.returncode == 0 and not process.stderr, words, time.perf_counter() - start)


RACES = {
    "words are stored plainly": (
        "ffi/kernel/arch/host.h",
        "__atomic_store_n(at, word, __ATOMIC_RELAXED)",
        "*at = word",
    ),
    "words are loaded plainly": (
        "ffi/kernel/arch/host.h",
        "return __atomic_load_n(at, __ATOMIC_RELAXED)",
        "return *const_cast<const volatile Word*>(at)",
    ),
    "every split writes the KV cache": (
        "ffi/kernel/attention.h",
        "return last_chunk % h.kv_splits == split;",
        "return true;",
    ),
    "blocks share scratch memory": (
        "ffi/host/variant_body.h",
        "near += scratch_bytes<T>(call.plan, call.device, b);",
        "near += scratch_bytes<T>(call.plan, call.device, b) - 64;",
    ),
    "tiles that others have taken are not waited for": (
        "ffi/kernel/serial/offer.h",
        "arch::load_acquire(&offer.returned) != count - own",
        "false",
    ),
    "who helps leaves the tiles to others, too": (
        "ffi/kernel/serial/offer.h",
        "{seen.number, seen.first, seen.end - taken}",
        "{seen.number, seen.first, seen.end}",
    ),
    "sums of tiles that others have taken are not released": (
        "ffi/kernel/serial/offer.h",
        "taken, __ATOMIC_RELEASE",
        "taken, __ATOMIC_RELAXED",
    ),
    "tokens are not released to the host": (
        "ffi/kernel/arch/host.h",
        "__atomic_store_n(at, value, __ATOMIC_RELEASE)",
        "__atomic_store_n(at, value, __ATOMIC_RELAXED)",
    ),
}
OVERRUNS = {
    "exchange memory is too short": (
        "ffi/host/gang.cc",
        "exchange_.emplace_back(plan.devices[device].channels.words, 0)",
        "exchange_.emplace_back(plan.devices[device].channels.words - 8, 0)",
    ),
    "scratch memory is too short": (
        "ffi/host/gang.cc",
        "scratch.emplace_back(words + 8, 0)",
        "scratch.emplace_back(words - 64, 0)",
    ),
}
WRONG_TOKENS = {
    "a block takes the word of the token before": (
        "ffi/kernel/handoff.h",
        "return arch::tag_of(word) == tag;",
        "return arch::tag_of(word) + 1 >= tag;",
    ),
}
MUTANTS = {"thread": RACES | WRONG_TOKENS, "address": OVERRUNS | WRONG_TOKENS}
"""Faults by name: file, what it says, what it shall not say. Some cases cannot notice some faults."""


def check_mutants(sanitizer: str, compiler: str, cases: list[tuple[Case, Path]], out: Path) -> list[Verdict]:
    """Breaks a copy of the sources in every way of MUTANTS; ok means noticed."""
    verdicts = []
    for number, (name, (path, right, wrong)) in enumerate(MUTANTS[sanitizer].items()):
        start, root = time.perf_counter(), out / str(number)
        shutil.copytree(ROOT / "ffi", root / "ffi")
        text = (root / path).read_text()
        assert text.count(right) == 1, f"{path} does not say {right!r} once"
        (root / path).write_text(text.replace(right, wrong))
        driver = build(sanitizer, compiler, root, root)
        found = [verdict for case, file in cases if not (verdict := check(driver, case, file)).ok]
        words = f"noticed by {len(found)} of {len(cases)} cases"
        if found:
            report = [
                line for line in found[0].words.splitlines() if line.startswith(("WARNING:", "SUMMARY:", "wrong:"))
            ]
            words += ": " + "; ".join(report)
        verdicts.append(Verdict(name, bool(found), words, time.perf_counter() - start))
        show(verdicts[-1])
    return verdicts


def show(verdict: Verdict) -> None:
    print(f"{'ok  ' if verdict.ok else 'FAIL'}  {verdict.case}: {verdict.words}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sanitizer", choices=sorted(FLAGS), default="thread")
    parser.add_argument("--mutants", action="store_true", help="check that faults are noticed, instead of the sources")
    parser.add_argument("--compiler", default="g++", help="g++ or clang++; default: g++")
    parser.add_argument("--only", default="", help="only cases whose name contains this text")
    parser.add_argument("--json", metavar="FILE", help="also write the verdicts to a file")
    arguments = parser.parse_args()
    # The driver's variant, so that both compute alike; and no other backend than the one that is needed.
    os.environ.update(JAX_MONO_CPU="portable", JAX_PLATFORMS="cpu")

    cases = [case for case in make_cases() if arguments.only in case.name]
    if arguments.mutants:
        cases = [case for case in cases if case.what in ("sampled", "filters and alternatives", "streamed")]
    if not cases:
        raise SystemExit(f"no case is named {arguments.only!r}")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory)
        files = []
        for number, case in enumerate(cases):
            files.append((case, out / f"{number}.case"))
            # Broken sources hang; good ones may take long on a busy machine.
            write_case(*files[-1], limit_ms=2_000 if arguments.mutants else 60_000)
        if arguments.mutants:
            verdicts = check_mutants(arguments.sanitizer, arguments.compiler, files, out)
        else:
            driver = build(arguments.sanitizer, arguments.compiler, ROOT, out)
            verdicts = []
            for case, file in files:
                verdicts.append(check(driver, case, file))
                show(verdicts[-1])
    failed = sum(not verdict.ok for verdict in verdicts)
    seconds = time.perf_counter() - start
    print(f"{len(verdicts) - failed} of {len(verdicts)} ok under {FLAGS[arguments.sanitizer]} in {seconds:.0f} s")
    if arguments.json:
        report = {
            "sanitizer": arguments.sanitizer,
            "seconds": seconds,
            "cases": [vars(verdict) for verdict in verdicts],
        }
        Path(arguments.json).write_text(json.dumps(report, indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
