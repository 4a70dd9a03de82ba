"""``jax-mono doctor``: what this machine can run, and why not."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_mono import settings
from jax_mono.cli import machine, options
from jax_mono.cli.console import print_json
from jax_mono.cli.verdict import (
    PLATFORMS,
    SELF_TEST,
    Finding,
    Status,
    Verdict,
    jax_devices,
    left_out,
    split_error,
    verdicts,
)
from jax_mono.config import ConfigError

if TYPE_CHECKING:
    import jax

    from jax_mono.native import GpuPlatform, GpuReport

_DESCRIPTION = """\
Looks at everything that jax_mono depends on, and on every platform that is usable generates a few tokens with a tiny
model, on the kernel and on the reference model, and compares them. Ends with a verdict for each platform: CPU, NVIDIA
and AMD GPUs. Exit code 0 if decoding works on the platform that JAX uses here; 1 if it does not.

  jax-mono doctor
  jax-mono doctor --json
"""

_MARKS: dict[Status, str] = {"ok": "+", "note": "-", "fail": "!"}
_GIB = 1 << 30

# Instruction sets by the variant of the resident program that needs them, best first.
_VARIANT_FLAGS = {
    "avx512bf16": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "avx512_vnni"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx2": {"avx2", "fma", "f16c"},
}
# Extra, and the modules that it brings.
_EXTRAS = {
    "hf": ("huggingface_hub", "jinja2", "safetensors", "tokenizers"),
    "gguf": ("gguf", "jinja2", "tokenizers"),
    "plot": ("matplotlib",),
    "cli": ("rich",),
}
_CPU_TOLERANCE, _GPU_TOLERANCE = 1e-4, 0.05
"""Largest difference of two logits of the tiny model, in float32 and in bfloat16; they deviate by about one."""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Declares the command."""
    parser = options.command(subparsers, "doctor", run, "say what this machine can run, and why not", _DESCRIPTION)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Looks at everything."""
    findings: list[Finding] = []
    for look in (_software, _machine, _environment, _library, _devices, _gpus, _extras, _self_test):
        for finding in _guarded(look):
            if not arguments.json:
                _print(finding, new_section=not findings or findings[-1].section != finding.section)
            findings.append(finding)
    found = list(verdicts(findings))
    works = any(verdict.works and verdict.used for verdict in found)
    if arguments.json:
        record = {"works": works, "platforms": [asdict(verdict) for verdict in found]}
        print_json(record | {"findings": [asdict(finding) for finding in findings]})
    else:
        print("\nverdict")
        for verdict in found:
            _print_verdict(verdict)
    return 0 if works else 1


def _guarded(look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Turns whatever goes wrong into a finding: the rest should still be looked at."""
    try:
        yield from look()
    except Exception as error:
        name = look.__name__.strip("_").replace("_", " ")
        yield Finding(name, name, "fail", f"{type(error).__name__}: {error}")


def _software() -> Iterator[Finding]:
    section, found = "software", machine.versions()
    bounds = _requirements()
    for name, version in found.items():
        if name == "jax-mono" and not version:
            yield Finding(section, name, "note", "not installed, running from a checkout: versions are not checked")
            continue
        needed = bounds.get(name, [])
        text = f"{version or 'missing'}" + (f" (needs {','.join(map(''.join, needed))})" if needed else "")
        holds = bool(version) and all(_holds(version, *bound) for bound in needed)
        remedy = "" if holds else "install a supported Python" if name == "python" else f"pip install -U {name}"
        yield Finding(section, name, "ok" if holds else "fail", text, remedy)


def _requirements() -> dict[str, list[tuple[str, str]]]:
    """Supported versions, from the metadata of the installed package: name to (comparison, version) pairs."""
    try:
        metadata = importlib.metadata.metadata("jax-mono")
    except importlib.metadata.PackageNotFoundError:
        return {}
    found = {"python": _bounds(metadata.get("Requires-Python", ""))}
    for requirement in metadata.get_all("Requires-Dist") or ():
        if "extra" not in requirement:
            name = re.match(r"[\w.-]+", requirement)
            if name:
                found[name[0]] = _bounds(requirement[name.end() :])
    return found


def _bounds(text: str) -> list[tuple[str, str]]:
    return re.findall(r"(>=|<)\s*([\d.]+)", text)


def _holds(version: str, comparison: str, bound: str) -> bool:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", text)[:3]]

    return numbers(version) >= numbers(bound) if comparison == ">=" else numbers(version) < numbers(bound)


def _machine() -> Iterator[Finding]:
    section = "machine"
    flags = machine.cpu_flags()
    best = next((name for name, needed in _VARIANT_FLAGS.items() if needed <= flags), "portable")
    yield Finding(section, "processor", "ok", f"{machine.cpu_model()}; {settings.cores()} cores for this process")
    yield Finding(section, "instructions", "ok", f"{best} is the best variant for it")
    total, available = machine.memory()
    text = f"{total / _GIB:.1f} GiB, {available / _GIB:.1f} GiB available"
    yield Finding(section, "memory", "ok", f"{text}: a bfloat16 model of up to {available / 2e9:.0f} billion weights")
    setting = machine.huge_pages()
    if setting in ("always", "madvise"):
        yield Finding(section, "huge pages", "ok", f"{setting}: weights get them")
    else:
        remedy = "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"
        yield Finding(section, "huge pages", "note", f"{setting or 'not available'}: weights read more slowly", remedy)


def _environment() -> Iterator[Finding]:
    names = dict.fromkeys(re.findall(r"JAX_MONO_\w+", settings.__doc__ or ""))
    for name in (*names, "JAX_MONO_SMOLLM2_GGUF", "JAX_PLATFORMS", "XLA_FLAGS"):
        yield Finding("environment", name, "ok", os.environ.get(name) or "not set")
    # Refuses values that make no sense.
    settings.wait_limit_ms(), settings.meeting_limit_ms(), settings.blocks()


def _library() -> Iterator[Finding]:
    from jax_mono import native

    section = "native library"
    path = native.library_path()
    try:
        native.library()
        yield Finding(section, "library", "ok", str(path))
        yield Finding(section, "variant", "ok", native.cpu_variant())
    except native.NativeError as error:
        yield Finding(section, "library", "fail", str(error))


def _devices() -> Iterator[Finding]:
    import jax

    section = "jax"
    try:
        machine.jax_platform()
    except ConfigError as error:
        yield Finding(section, "devices", "fail", str(error))
        return
    found = jax.devices()
    kinds = [f"{device.platform} ({device.device_kind})" for device in found]
    counts = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
    yield Finding(section, "devices", "ok", f"{counts}: where decoding runs unless JAX_PLATFORMS says otherwise")
    for platform in ("cuda", "rocm"):
        if jax_devices(platform):
            yield Finding(section, platform, "ok", f"a plugin with {len(jax_devices(platform))} devices")
        elif left_out(platform):
            yield Finding(section, platform, "note", f"left out by JAX_PLATFORMS={os.environ['JAX_PLATFORMS']}")
        else:
            yield Finding(section, platform, "note", "JAX has no plugin, or it found no device")


def _gpus() -> Iterator[Finding]:
    from jax_mono import native

    for platform in native.GPU_PLATFORMS:
        yield from _gpu_platform(platform, native.gpu_report(platform))


def _gpu_platform(platform: GpuPlatform, report: GpuReport) -> Iterator[Finding]:
    from jax_mono import gpus

    section = PLATFORMS[platform]
    if report.driver_error:
        yield Finding(section, "driver", "note", *split_error(report.driver_error))
    else:
        yield Finding(section, "driver", "ok" if report.gpus else "note", f"shows {len(report.gpus)} GPUs")
    for index, gpu in enumerate(report.gpus):
        text = (
            f"{gpu.name}, {gpu.architecture}, {gpu.multiprocessors} multiprocessors, "
            f"{gpu.shared_memory >> 10} KiB of shared memory per block"
        )
        missing = gpus.why_not(gpu)
        yield Finding(section, f"GPU {index}", "note" if missing else "ok", f"{text}: {missing or 'has a program'}")
    if report.compiler_error:
        yield Finding(section, "compiler", "note", *split_error(report.compiler_error))
    else:
        yield Finding(section, "compiler", "ok", report.compiler)
    if not report.gpus:
        return
    if not report.cache:
        remedy = "set HOME or JAX_MONO_CACHE"
        yield Finding(
            section, "cache", "note", "compiled programs are not kept: there is no directory for them", remedy
        )
    elif not _writable(Path(report.cache)):
        remedy = f"make {report.cache} writable, or set JAX_MONO_CACHE"
        yield Finding(
            section, "cache", "note", f"{report.cache} cannot be written: every process compiles anew", remedy
        )
    else:
        yield Finding(section, "cache", "ok", report.cache)


def _writable(directory: Path) -> bool:
    """Whether a directory can be written, or made."""
    while not directory.exists() and directory != directory.parent:
        directory = directory.parent
    return directory.is_dir() and os.access(directory, os.W_OK | os.X_OK)


def _extras() -> Iterator[Finding]:
    for extra, modules in _EXTRAS.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        if missing:
            yield Finding("extras", extra, "note", f"without {', '.join(missing)}", f"pip install 'jax-mono[{extra}]'")
        else:
            yield Finding("extras", extra, "ok", ", ".join(modules))
    from jax_mono.hub import PACKAGED

    for name, weights in PACKAGED.items():
        path = weights.find()
        if path is None:
            yield Finding("extras", name, "note", "weights are not installed", weights.remedy)
        else:
            yield Finding("extras", name, "ok", str(path))


def _self_test() -> Iterator[Finding]:
    """Compares kernel and Flax on every platform that JAX has and that there is a program for."""
    from jax_mono import gpus, native

    if found := jax_devices("cpu"):
        yield _compare("cpu", found[0])
    for platform in native.GPU_PLATFORMS:
        if (found := jax_devices(platform)) and not gpus.why_not(gpus.gpu_of(found[0])):
            yield _compare(platform, found[0])


def _compare(platform: str, device: jax.Device) -> Finding:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jax_mono.cli.flax_decoder import FlaxDecoder
    from jax_mono.cli.models import TINY
    from jax_mono.decoder import Decoder
    from jax_mono.models.random_source import RandomSource

    source, text = RandomSource(TINY["tiny"]), [1, 2, 3, 4, 5, 6, 7, 8]
    dtype, bound = (jnp.float32, _CPU_TOLERANCE) if platform == "cpu" else (jnp.bfloat16, _GPU_TOLERANCE)
    remedy = "run jax-mono parity --model tiny --random-weights --per-layer, and report it"
    try:
        with jax.default_device(device):
            blocks = min(2, settings.cores()) if platform == "cpu" else None
            decoder = Decoder.from_source(source, dtype=dtype, blocks=blocks, context=16)
            reference = FlaxDecoder.from_source(source, dtype=dtype, context=16)
            expected, found = reference.forward(text)[0], decoder.score(text, logits=True).logits
            generated = decoder.generate(text, max_new_tokens=8, stop=[])
    except (RuntimeError, ValueError) as error:
        return Finding(SELF_TEST, platform, "fail", str(error), remedy)
    assert found is not None
    difference = float(np.abs(found - expected).max())
    # Not a number is not within any bound.
    if difference <= bound and len(generated.tokens) == 8:
        text = (
            f"kernel and Flax differ by {difference:.1e} in the logits of a tiny random {jnp.dtype(dtype).name} model"
        )
        return Finding(SELF_TEST, platform, "ok", text)
    return Finding(SELF_TEST, platform, "fail", f"logits differ by {difference:.1e}, beyond {bound:g}", remedy)


def _print_verdict(verdict: Verdict) -> None:
    works = "decoding works" if verdict.works else "decoding does not work"
    used = ", and is what JAX uses here" if verdict.used else ""
    mark = "ok" if verdict.works else "fail" if verdict.used else "note"
    remedy = f"\n      -> {verdict.remedy}" if verdict.remedy else ""
    print(f"  {_MARKS[mark]} {PLATFORMS[verdict.platform]}: {works}{used}: {verdict.text}{remedy}")


def _print(finding: Finding, *, new_section: bool) -> None:
    if new_section:
        print(f"\n{finding.section}")
    remedy = f"\n      -> {finding.remedy}" if finding.remedy else ""
    print(f"  {_MARKS[finding.status]} {finding.name}: {finding.text}{remedy}", flush=True)
