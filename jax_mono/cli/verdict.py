"""What ``jax-mono doctor`` concludes: whether decoding works on CPU, NVIDIA GPUs and AMD GPUs, and why not."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from jax_mono import settings

if TYPE_CHECKING:
    import jax

Status = Literal["ok", "note", "fail"]
PLATFORMS = {"cpu": "CPU", "cuda": "NVIDIA GPUs", "rocm": "AMD GPUs"}
_PLUGINS = {"cuda": "pip install -U 'jax[cuda13]'", "rocm": "pip install -U jax-rocm7-plugin jax-rocm7-pjrt"}
SELF_TEST = "self-test"
"""The section of what was found by decoding."""


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


@dataclass(frozen=True)
class Verdict:
    """Whether decoding works on a platform.

    Attributes:
        platform: ``cpu``, ``cuda`` or ``rocm``.
        works: Whether it does.
        used: Whether JAX puts arrays there by default.
        text: What it runs, or why it does not.
        remedy: What to do about it, or empty.
    """

    platform: str
    works: bool
    used: bool
    text: str
    remedy: str = ""


def jax_devices(platform: str) -> list[jax.Device]:
    """JAX's devices of a platform, maybe none."""
    import jax

    try:
        return jax.local_devices(backend=platform)
    except (RuntimeError, AssertionError):  # an assertion, in jax 0.10, where a platform has no plugin
        return []


def left_out(platform: str) -> bool:
    """Whether ``JAX_PLATFORMS`` keeps JAX from a GPU platform."""
    named = os.environ.get("JAX_PLATFORMS", "")
    return bool(named) and not {platform, "gpu"} & set(named.split(","))


def split_error(error: str) -> tuple[str, str]:
    """An error of the native library, as what is wrong and what to do; libraries that are not there only by name."""
    text, _, remedy = error.rpartition("; ")
    text, remedy = (text, remedy) if text else (remedy, "")
    text = text.replace(": cannot open shared object file: No such file or directory", "")
    return re.sub(r"\((\S+); .*\)$", r"(\1 and others)", text), remedy


def verdicts(findings: Sequence[Finding]) -> Iterator[Verdict]:
    """What follows from the findings for each platform."""
    for platform in PLATFORMS:
        try:
            yield _verdict(platform, findings)
        except Exception as error:  # whatever it is, a finding says more about it
            yield Verdict(platform, False, False, f"{type(error).__name__}: {error}")


def _verdict(platform: str, findings: Sequence[Finding]) -> Verdict:
    from jax_mono import gpus, native
    from jax_mono.packing import home

    broken = next((one for one in findings if one.status == "fail" and one.section != SELF_TEST), None)
    test = next((one for one in findings if (one.section, one.name) == (SELF_TEST, platform)), None)
    devices = jax_devices(platform)
    used = bool(devices) and home() in devices
    if broken is not None:
        return Verdict(platform, False, used, f"{broken.name}: {broken.text}", broken.remedy)
    if test is not None and test.status == "ok":
        return Verdict(platform, True, used, _what_runs(platform))
    if test is not None:
        return Verdict(platform, False, used, f"the self-test fails: {test.text}", test.remedy)
    if platform == "cpu":
        return Verdict(platform, False, used, "JAX_PLATFORMS leaves it out", "set JAX_PLATFORMS=cpu")
    report = native.gpu_report(platform)
    if report.driver_error:
        return Verdict(platform, False, used, *split_error(report.driver_error))
    if not report.gpus:
        remedy = "look at CUDA_VISIBLE_DEVICES" if platform == "cuda" else "look at HIP_VISIBLE_DEVICES"
        return Verdict(platform, False, used, "the driver shows no GPU", remedy)
    missing = [gpus.why_not(gpu) for gpu in report.gpus]
    if all(missing):
        return Verdict(platform, False, used, missing[0], gpus.USE_CPU)
    if report.compiler_error:
        return Verdict(platform, False, used, *split_error(report.compiler_error))
    if left_out(platform):
        told = os.environ["JAX_PLATFORMS"]
        return Verdict(platform, False, used, f"JAX_PLATFORMS={told} leaves it out", "unset JAX_PLATFORMS")
    return Verdict(platform, False, used, "JAX has no devices there", _PLUGINS[platform])


def _what_runs(platform: str) -> str:
    from jax_mono import gpus, native

    if platform == "cpu":
        return f"{native.cpu_variant()}, {settings.cores()} cores, {' and '.join(gpus.CPU_DTYPES)} weights"
    good = [gpu for gpu in native.gpu_report(platform).gpus if not gpus.why_not(gpu)]
    return f"{len(good)} x {good[0].name} ({good[0].architecture}), {' and '.join(gpus.DTYPES)} weights"
