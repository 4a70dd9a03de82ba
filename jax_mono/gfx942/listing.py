"""What a listing says about its kernels: registers, memory, and what did not fit."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Kernel:
    """A kernel as the metadata of its program describes it.

    Attributes:
        name: What it is launched as.
        vector_registers: Per lane; 256 leave room for two waves on each SIMD.
        scalar_registers: Per wave.
        scratch: Bytes of memory per lane that stand in for registers.
        spilled_vectors: Vector registers that went to memory.
        spilled_scalars: Scalar values that wait in a lane of a vector register.
        shared_memory: Bytes per block, without what a launch adds.
        threads: Of a block, at most.
    """

    name: str
    vector_registers: int
    scalar_registers: int
    scratch: int
    spilled_vectors: int
    spilled_scalars: int
    shared_memory: int
    threads: int

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.vector_registers} vector registers, {self.scalar_registers} scalar ones and "
            f"{self.spilled_scalars} values in lanes, {self.shared_memory} bytes of shared memory, "
            f"{self.scratch} of scratch"
        )


_FIELDS = {
    "vector_registers": "vgpr_count",
    "scalar_registers": "sgpr_count",
    "scratch": "private_segment_fixed_size",
    "spilled_vectors": "vgpr_spill_count",
    "spilled_scalars": "sgpr_spill_count",
    "shared_memory": "group_segment_fixed_size",
    "threads": "max_flat_workgroup_size",
}


def kernels(listing: str) -> dict[str, Kernel]:
    """Reads the metadata at the end of a listing.

    Raises:
        ValueError: The text is no listing of a program.
    """
    _, _, metadata = listing.partition("amdhsa.kernels:")
    found: dict[str, Kernel] = {}
    for entry in re.split(r"^  - ", metadata, flags=re.MULTILINE)[1:]:
        values = dict(re.findall(r"^    \.(\w+): +(\S+)$", entry, re.MULTILINE))
        if "vgpr_count" in values:
            numbers = {field: int(values[key]) for field, key in _FIELDS.items()}
            found[values["name"]] = Kernel(values["name"], **numbers)
    if not found:
        raise ValueError("this is no listing of a gfx942 program: it has no metadata of kernels")
    return found


def instructions(listing: str) -> list[str]:
    """The instructions in the order of the listing, in single spaces, without labels, directives and comments."""
    lines = re.findall(r"^\t([a-z][^;\n]*)", listing, re.MULTILINE)
    return [" ".join(line.split()) for line in lines]
