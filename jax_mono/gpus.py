"""What GPUs can run: which of them have a resident program, and which weights it takes."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_mono import native
from jax_mono.config import ConfigError
from jax_mono.plan import Plan
from jax_mono.record import plan_record
from jax_mono.tape import STORAGE
from jax_mono.topology import TOPOLOGIES, Topology

DTYPES = ("bfloat16", "float16")
"""Weights of GPU programs."""

CPU_DTYPES = ("float32", "bfloat16")
"""Weights of CPU programs."""

KNOWN = {
    "sm_90a": "NVIDIA Hopper: H100, H200, GH200",
    "gfx942": "AMD MI300: MI300X, MI300A, MI325X",
}
"""Architectures that a program may be written for, and what they are."""

COMPRESSED = ("sm_90a",)
"""Architectures whose programs read compressed tapes."""

USE_CPU = "set JAX_PLATFORMS=cpu to decode on the CPU"


def kernel_sources() -> dict[str, str]:
    """What GPU programs are compiled from, by the name under which the files include each other.

    The library carries them; ``JAX_MONO_KERNELS`` names others.
    """
    named = os.environ.get("JAX_MONO_KERNELS")
    if not named:
        return native.kernel_sources()
    return {path.relative_to(named).as_posix(): path.read_text() for path in sorted(Path(named).rglob("*.h"))}


def architectures() -> tuple[str, ...]:
    """The architectures that there is a program for: one entry each among the sources."""
    entries = [PurePosixPath(name) for name in kernel_sources() if name.startswith("kernel/entry/")]
    return tuple(sorted(entry.stem for entry in entries))


def why_not(gpu: native.Gpu) -> str:
    """Why a GPU runs no resident program; empty if it does."""
    found = architectures()
    if gpu.architecture in found:
        return ""
    programs = ", ".join(f"{name} ({KNOWN[name]})" if name in KNOWN else name for name in found) or "no GPU"
    return f"{gpu.name} is {gpu.architecture}, and this library has programs for {programs}"


def gpu_of(device: jax.Device) -> native.Gpu:
    """What a JAX device is.

    Args:
        device: A GPU.

    Raises:
        NativeError: The driver that the native library found does not show it.
    """
    platform = native.gpu_platform()
    if platform is None:
        raise native.NativeError(f"JAX's platform {device.platform!r} has no resident program; {USE_CPU}")
    report = native.gpu_report(platform)
    ordinal = device.local_hardware_id
    ordinal = device.id if ordinal is None else ordinal
    if ordinal < len(report.gpus):
        return report.gpus[ordinal]
    why = report.driver_error or f"the driver shows {len(report.gpus)} GPUs"
    raise native.NativeError(f"{device} cannot be used: {why}; run jax-mono doctor, or {USE_CPU}")


def topology_of(gpu: native.Gpu) -> Topology | None:
    """What is known of a GPU's dies and memory, by its architecture and the number of its multiprocessors.

    A device that shows only some of its dies, as MI300X do in other partition modes than SPX, is not known.
    """
    for topology in TOPOLOGIES.values():
        if (topology.architecture, topology.units) == (gpu.architecture, gpu.multiprocessors):
            return topology
    return None


def check_plan(device: jax.Device, plan: Plan, dtype: DTypeLike) -> None:
    """Refuses a plan that there is no program for on a JAX device, as far as that is known before compiling.

    Args:
        device: Where the resident program is to run.
        plan: The plan.
        dtype: Of the weights.

    Raises:
        NativeError: There is none; the message says why.
    """
    if device.platform != "cpu":
        gpu, weights = gpu_of(device), list(STORAGE).index(jnp.dtype(dtype).name)
        native.gpu_shape(plan_record(plan), weights, architecture=gpu.architecture, shared_memory=gpu.shared_memory)


def check(device: jax.Device, dtype: DTypeLike) -> None:
    """Refuses what a JAX device cannot run, before any weights are read.

    Args:
        device: Where the resident program is to run.
        dtype: Of the weights.

    Raises:
        ConfigError: Its programs do not take such weights.
        NativeError: There is no program for it.
    """
    name = jnp.dtype(dtype).name
    if device.platform == "cpu":
        if name == "float16":
            raise ConfigError("float16 weights run on GPUs only; on the CPU use bfloat16 or float32")
        return
    if why := why_not(gpu_of(device)):
        raise native.NativeError(f"{why}; {USE_CPU}")
    if name == "float32":
        raise ConfigError(f"GPUs take {' and '.join(DTYPES)} weights, not float32; use one of these, or {USE_CPU}")
