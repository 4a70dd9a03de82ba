"""Programs that the tests look at: each compiled once, two at a time, and only those that are asked for."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

from jax_mono import native
from jax_mono.cut import default_blocks
from jax_mono.gfx942.listing import Kernel, instructions, kernels
from jax_mono.gfx942.toolchain import (
    ARCHITECTURE,
    COMPUTE_UNITS,
    SHARED_MEMORY,
    Toolchain,
    assembly,
    debian,
    ziglang,
)
from jax_mono.models import preset
from jax_mono.plan import GPU, Plan, make_plan
from jax_mono.record import plan_record
from jax_mono.tape import STORAGE
from jax_mono.topology import MI300X, Topology


@dataclass(frozen=True)
class Change:
    """Of the sources: what a mutant replaces in one of them."""

    name: str
    old: str
    new: str


@dataclass(frozen=True)
class Build:
    """What is compiled.

    Attributes:
        model: A preset.
        devices: On which it runs, with a block on every compute unit that it can employ.
        dtype: Of the weights.
        compiler: ``ziglang`` or a clang of the system.
        topology: Of the devices.
        changes: To the sources.
    """

    model: str
    devices: int = 8
    dtype: str = "bfloat16"
    compiler: str = "ziglang"
    changes: tuple[Change, ...] = ()
    topology: Topology | None = MI300X

    def __str__(self) -> str:
        parts = [self.model, str(self.devices), self.dtype]
        if self.compiler != "ziglang":
            parts.append(self.compiler)
        if self.topology is None:
            parts.append("flat")
        return "-".join(parts + [change.name.rpartition("/")[2] for change in self.changes])

    def plan(self) -> Plan:
        config = preset(self.model)
        blocks = default_blocks(config, 1, COMPUTE_UNITS)
        return make_plan(config, devices=self.devices, blocks=blocks, target=GPU, topology=self.topology)

    def toolchain(self) -> Toolchain:
        return ziglang() if self.compiler == "ziglang" else debian(self.compiler)

    def sources(self) -> dict[str, str]:
        """Those of the library, changed.

        Raises:
            AssertionError: A change does not fit the sources any more.
        """
        sources = native.kernel_sources()
        for change in self.changes:
            assert sources[change.name].count(change.old) == 1, f"{change.name} has no longer one {change.old!r}"
            sources[change.name] = sources[change.name].replace(change.old, change.new)
        return sources


@dataclass(frozen=True)
class Listing:
    """A program as assembly."""

    build: Build
    text: str

    @cached_property
    def kernels(self) -> dict[str, Kernel]:
        return kernels(self.text)

    @cached_property
    def instructions(self) -> list[str]:
        return instructions(self.text)

    @cached_property
    def shape(self) -> native.GpuShape:
        number = list(STORAGE).index(self.build.dtype)
        return native.gpu_shape(
            plan_record(self.build.plan()), number, architecture=ARCHITECTURE, shared_memory=SHARED_MEMORY
        )

    @property
    def quads(self) -> int:
        """16-byte loads of a lane for the longest piece."""
        (line,) = (line for line in self.shape.header.splitlines() if "kSlotChunks" in line)
        return (int(line.rpartition("=")[2].rstrip(";")) + 1) // 2


class Builds:
    """Compiles in the background what was ordered."""

    def __init__(self, ordered: Iterable[Build]) -> None:
        self._pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
        self._futures: dict[Build, Future[Listing]] = {}
        for build in ordered:
            self.order(build)

    def order(self, build: Build) -> Future[Listing]:
        if build not in self._futures:
            self._futures[build] = self._pool.submit(self._compile, build)
        return self._futures[build]

    def __getitem__(self, build: Build) -> Listing:
        return self.order(build).result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    @staticmethod
    def _compile(build: Build) -> Listing:
        return Listing(build, assembly(build.plan(), build.dtype, build.toolchain(), sources=build.sources()))
