"""What machine this is: its GPUs, the topology that describes them, and whatever else explains a measurement."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from jax_mono.topology import TOPOLOGIES, Topology

_TOOLS = (
    ("rocm-smi", "--showproductname", "--showcomputepartition", "--showmemorypartition", "--showtopo"),
    ("rocm-smi", "--showdriverversion", "--showclocks", "--showpower"),
    ("nvidia-smi",),
    ("nvidia-smi", "topo", "-m"),
    ("lscpu",),
)
"""Programs whose output tells about the machine, where there are any."""

_FILES = ("/proc/version", "/proc/cmdline", "/proc/sys/kernel/numa_balancing", "/opt/rocm/.info/version")
_VARIABLES = re.compile(r"(JAX|XLA|HIP|HSA|ROCR|ROCM|GPU|CUDA|NVIDIA|NCCL|AMD)_")
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD")
_TOOL_SECONDS = 10


@dataclass(frozen=True)
class Machine:
    """What decides which steps make sense.

    Attributes:
        platform: Where decoding runs: JAX's name of the GPU platform, or ``cpu``.
        gpus: Names of its GPUs.
        architecture: Of the first GPU, as its compiler calls it, or ``host``.
        topology: Name of the closest entry of :data:`jax_mono.topology.TOPOLOGIES`.
    """

    platform: Literal["cpu", "cuda", "rocm"]
    gpus: tuple[str, ...] = ()
    architecture: str = "host"
    topology: str = "host"

    @property
    def described(self) -> Topology:
        """The topology."""
        return TOPOLOGIES[self.topology]

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def from_record(record: dict[str, Any]) -> Machine:
    """The machine of a record."""
    return Machine(**(record | {"gpus": tuple(record["gpus"])}))


def closest_topology(architecture: str, name: str) -> str:
    """The topology that describes a GPU: the one that its name holds, or the first of its architecture."""
    same = [topology.name for topology in TOPOLOGIES.values() if topology.architecture == architecture]
    named = [known for known in same if known in name.lower().replace(" ", "")]
    return (named or same or ["host"])[0]


def look() -> Machine:
    """Asks the drivers. Loads the native library; a driver that hangs makes this hang."""
    from jax_mono import native

    if os.environ.get("JAX_PLATFORMS", "").split(",")[0] == "cpu":
        return Machine("cpu")
    for name in native.GPU_PLATFORMS:
        found = native.gpu_report(name).gpus
        if found:
            first = found[0]
            names = tuple(gpu.name for gpu in found)
            return Machine(name, names, first.architecture, closest_topology(first.architecture, first.name))
    return Machine("cpu")


def environment() -> dict[str, Any]:
    """Versions, settings and what the system's tools say; nothing that looks like a secret."""
    from jax_mono.cli import machine

    return {
        "versions": machine.versions(),
        "system": platform.platform(),
        "cpu": machine.cpu_model(),
        "cores": os.cpu_count(),
        "memory_bytes": machine.memory()[0],
        "huge_pages": machine.huge_pages(),
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if _VARIABLES.match(name) and not _SECRET.search(name)
        },
        "files": {name: Path(name).read_text(errors="replace").strip() for name in _FILES if os.access(name, os.R_OK)},
        "tools": {" ".join(tool): _output(tool) for tool in _TOOLS if shutil.which(tool[0])},
    }


def _output(command: tuple[str, ...]) -> str:
    try:
        ran = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            timeout=_TOOL_SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"({error})"
    return ran.stdout
