"""What this machine is, and JAX set up for it."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from jax_mono.config import ConfigError

if TYPE_CHECKING:
    from jax.sharding import Mesh

_FORCE = "--xla_force_host_platform_device_count"


def set_up_jax(form: str = "threads", devices: int | None = None) -> None:
    """Chooses JAX's number of CPU devices. Without effect once JAX has looked for devices.

    JAX chooses the platform: GPUs if it has a plugin for them, unless ``JAX_PLATFORMS`` says otherwise.

    Args:
        form: ``mesh`` needs one CPU device for each device of the plan.
        devices: Devices that share the model; None means one.

    Raises:
        ConfigError: JAX was told, or has begun, to use a platform that the resident program does not run on.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if form != "threads" and _FORCE not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_FORCE}={devices or 1}".strip()
    platform = jax_platform()
    if platform not in ("cpu", "gpu"):
        raise ConfigError(
            f"JAX uses the platform {platform!r}, the resident program runs on CPUs and GPUs; set JAX_PLATFORMS=cpu"
        )


def jax_platform() -> str:
    """The platform on which JAX puts arrays.

    Raises:
        ConfigError: JAX finds no device of the platforms that it was told to use.
    """
    import jax

    try:
        return jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # an assertion, in jax 0.10, where a platform has no plugin
        told = os.environ.get("JAX_PLATFORMS")
        raise ConfigError(f"JAX finds no device, JAX_PLATFORMS is {told!r}; set JAX_PLATFORMS=cpu. {error}") from error


def device_mesh(devices: int) -> Mesh:
    """A mesh for the form with one call per JAX device.

    Raises:
        ConfigError: There are fewer JAX devices.
    """
    import jax

    from jax_mono.prefill import AXIS

    found = jax.devices()
    if len(found) < devices:
        remedy = f"remove {_FORCE} from XLA_FLAGS or set it to {devices}"
        if found[0].platform != "cpu":
            remedy = "use --form threads, where one GPU runs all devices, or set JAX_PLATFORMS=cpu"
        raise ConfigError(f"--form mesh needs {devices} JAX devices, there are {len(found)}; {remedy}")
    return jax.make_mesh((devices,), (AXIS,), devices=found[:devices])


def settle_dtype(arguments: argparse.Namespace, *, kernel: bool = True) -> None:
    """Fills in ``--dtype`` where it is absent, the most exact one that runs here, and refuses what does not run.

    Args:
        arguments: ``dtype`` is read, and set.
        kernel: Whether the resident program is to run; the reference model takes every dtype.

    Raises:
        ConfigError: There is no program for such weights here.
        NativeError: There is no program for this GPU.
    """
    from jax_mono import gpus
    from jax_mono.packing import home

    device = home()
    if arguments.dtype is None:
        arguments.dtype = "float32" if device.platform == "cpu" else "bfloat16"
    if kernel:
        gpus.check(device, arguments.dtype)


def variant() -> str:
    """What the resident program is compiled for here: an instruction set of the CPU, or a GPU architecture."""
    from jax_mono import gpus, native
    from jax_mono.packing import home

    device = home()
    return native.cpu_variant() if device.platform == "cpu" else gpus.gpu_of(device).architecture


def cpu_model() -> str:
    """The processor's name."""
    match = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return match[1] if match else platform.processor() or platform.machine()


def cpu_flags() -> set[str]:
    """Instruction sets and other features, as Linux names them."""
    match = re.search(r"^flags\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return set(match[1].split()) if match else set()


def memory() -> tuple[int, int]:
    """Bytes of memory in all, and available now."""
    text = _read("/proc/meminfo")

    def entry(name: str) -> int:
        match = re.search(rf"^{name}:\s*(\d+) kB$", text, re.MULTILINE)
        return int(match[1]) * 1024 if match else 0

    return entry("MemTotal"), entry("MemAvailable")


def huge_pages() -> str:
    """The kernel's setting for transparent huge pages: always, madvise or never; empty where there is none."""
    match = re.search(r"\[(\w+)\]", _read("/sys/kernel/mm/transparent_hugepage/enabled"))
    return match[1] if match else ""


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter; empty where one is not installed."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in ("jax-mono", "jax", "jaxlib", "flax", "numpy", "orbax-checkpoint"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return found


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
