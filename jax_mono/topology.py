"""Devices as data: dies, memory, caches, links; every figure with its source.

Nothing here computes anything about models, and nothing else in the project should know a chip's numbers. What was
*measured* on a device (rates that programs reach, latencies of hand-offs) is not here but with its user,
:mod:`jax_mono.simulate.timing`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SOURCES = {
    "cdna3": "AMD, CDNA 3 architecture white paper, 2023 (revised in 2025), text and table 2",
    "cdna4": "AMD, CDNA 4 architecture white paper, 2025, text, table 2 and endnote MI350-007",
    "rocm": "AMD, ROCm documentation, AMD GPU specifications; memory and caches in binary units",
    "amdgpu": "AMD's drivers for Linux: addresses of memory errors (umc_v12_0, amd/atl), partitions (aqua_vanjaram)",
    "hopper": "NVIDIA, H100 Tensor Core GPU architecture white paper, 2022",
    "hopper-tuning": "NVIDIA, Hopper tuning guide, CUDA documentation",
    "h100": "NVIDIA, H100 Tensor Core GPU data sheet, SXM",
    "h200": "NVIDIA, H200 Tensor Core GPU data sheet, SXM",
    "driver": "what the CUDA driver reports of the device; capacities differ by megabytes between versions",
    "reported": "reported by others who programmed the device; not in the vendor's documents, to be measured",
    "epyc": "AMD, EPYC 9004 (Zen 4) processors; a virtual machine may have fewer cores and less of the caches",
    "local": "measured on the development machine, docs/performance.md",
}
"""Where figures come from, by the key that they name."""


@dataclass(frozen=True)
class Figure:
    """A number and where it comes from.

    Attributes:
        value: The number, in the unit that its field names.
        source: A key of :data:`SOURCES`.
    """

    value: float
    source: str

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"source {self.source!r} is unknown; add it to SOURCES")

    @property
    def whole(self) -> int:
        """The value as an integer.

        Raises:
            ValueError: It is a fraction.
        """
        if self.value != int(self.value):
            raise ValueError(f"{self.value} is not a whole number")
        return int(self.value)


@dataclass(frozen=True)
class AddressHash:
    """Which part of its memory a device takes a physical address to.

    The lowest bits of the masks number the granules of a period, in order; further bits exchange parts, from one region
    of memory to the next.

    Attributes:
        masks: Per bit of the part's number, the lowest first: the bits of the address whose parity it is.
        source: A key of :data:`SOURCES`.
    """

    masks: tuple[int, ...]
    source: str

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"source {self.source!r} is unknown; add it to SOURCES")
        if any(mask & -mask != self.granule_bytes << bit for bit, mask in enumerate(self.masks)):
            raise ValueError("the lowest bits of the masks must follow each other, as the numbers of granules do")
        if all(mask & (mask - 1) == 0 for mask in self.masks):
            raise ValueError("no further bit of an address exchanges parts: granules take turns, which needs no hash")

    @property
    def granule_bytes(self) -> int:
        """Consecutive bytes of one part."""
        return self.masks[0] & -self.masks[0]

    @property
    def parts(self) -> int:
        """How many there are; also the granules of a period."""
        return 1 << len(self.masks)

    @property
    def region_bytes(self) -> int:
        """Consecutive, aligned bytes in which parts are exchanged alike."""
        higher = [mask & (mask - 1) for mask in self.masks]
        return min(mask & -mask for mask in higher if mask)


@dataclass(frozen=True, kw_only=True)
class Topology:
    """One kind of device and how several of them are linked.

    A *die* is what shares an L2 cache and runs blocks: an XCD of AMD's, the whole of NVIDIA's, a socket. Dies lie in
    groups on I/O dies, to which the memory stacks belong. A device without such structure has one of each.

    Attributes:
        name: As users write it.
        architecture: Name of the kernel's architecture header, or of the closest one.
        dies: Dies that run blocks.
        units_per_die: Compute units (multiprocessors, cores) of one die.
        io_dies: I/O dies.
        stacks: Memory stacks or channels of the device.
        granule_bytes: Consecutive bytes that lie in one stack; 0 where the placement is not known to matter.
        interleave_ways: Parts of the memory that consecutive granules belong to in turn; neighbours in number lie on
            one I/O die.
        address_hash: How addresses choose one of these parts; None if it is not known.
        memory_bytes: Capacity; what data sheets call GB are GiB.
        memory_rate: Peak of the memory, bytes per second.
        l2_bytes: Of one die.
        last_level_bytes: Of the cache at the memory's side, of the device; 0 for none.
        near_bytes: Shared memory (local data share, second-level cache of a core) of a compute unit.
        register_bytes: Vector registers of a compute unit; 0 where a program cannot use them as memory.
        clock_hz: Highest clock of the compute units.
        links: How devices of one host are linked: each with each, through a switch, or through memory.
        link_rate: Of one device to one other, one direction, bytes per second; 0 for memory.
        device_rate: Of one device to all others together, one direction, bytes per second; 0 for memory.
        most_devices: Devices of one host.
    """

    name: str
    architecture: Literal["gfx942", "gfx950", "sm_90a", "host"]
    dies: Figure
    units_per_die: Figure
    io_dies: Figure
    stacks: Figure
    granule_bytes: Figure
    interleave_ways: Figure
    address_hash: AddressHash | None = None
    memory_bytes: Figure
    memory_rate: Figure
    l2_bytes: Figure
    last_level_bytes: Figure
    near_bytes: Figure
    register_bytes: Figure
    clock_hz: Figure
    links: Literal["mesh", "switch", "memory"]
    link_rate: Figure
    device_rate: Figure
    most_devices: Figure

    @property
    def units(self) -> int:
        """Compute units of the device, each of which holds one block."""
        return self.dies.whole * self.units_per_die.whole

    def io_die_of(self, die: int) -> int:
        """The I/O die that a die lies on: neighbours in number share one.

        Raises:
            ValueError: There is no such die.
        """
        if not 0 <= die < self.dies.whole:
            raise ValueError(f"{self.name} has dies 0 to {self.dies.whole - 1}, not {die}")
        return die * self.io_dies.whole // self.dies.whole

    @property
    def granule_sides(self) -> tuple[int, ...]:
        """I/O dies to which consecutive granules of memory belong, over one period; (0,) if placement does not matter.

        It is the order within a region of physical memory, up to the exchanges of :attr:`address_hash`.
        """
        ways, sides = self.interleave_ways.whole, self.io_dies.whole
        if sides == 1 or self.granule_bytes.whole == 0:
            return (0,)
        return tuple(way * sides // ways for way in range(ways))

    def link_graph(self, devices: int) -> tuple[tuple[int, int, float], ...]:
        """Links of a host with that many devices.

        Args:
            devices: How many.

        Returns:
            (device, device, bytes per second in each direction); a switch is device -1.

        Raises:
            ValueError: A host does not have so many.
        """
        if not 1 <= devices <= self.most_devices.whole:
            raise ValueError(f"a host has 1 to {self.most_devices.whole} devices {self.name}, not {devices}")
        if devices == 1 or self.links == "memory":
            return ()
        if self.links == "switch":
            return tuple((device, -1, self.device_rate.value) for device in range(devices))
        return tuple((a, b, self.link_rate.value) for a in range(devices) for b in range(a + 1, devices))


# Of memory that is not partitioned. One of an I/O die's two stacks is chosen by bits 14, 19, 26, 33 and 40.
_AMD_HASH = AddressHash(
    tuple(sum(1 << bit for bit in bits) for bits in ((12, 20, 27, 34, 41), (13, 21, 28, 35, 42))), "amdgpu"
)


def _mi300(name: str, memory: Figure, rate: Figure) -> Topology:
    return Topology(
        name=name,
        architecture="gfx942",
        dies=Figure(8, "cdna3"),
        units_per_die=Figure(38, "cdna3"),
        io_dies=Figure(4, "cdna3"),
        stacks=Figure(8, "cdna3"),
        granule_bytes=Figure(4096, "amdgpu"),  # the white paper says it of the MI300A
        interleave_ways=Figure(4, "amdgpu"),  # one stack of each I/O die, then the other of each; not if partitioned
        address_hash=_AMD_HASH,
        memory_bytes=memory,
        memory_rate=rate,
        l2_bytes=Figure(4 << 20, "cdna3"),
        last_level_bytes=Figure(256 << 20, "cdna3"),
        near_bytes=Figure(64 << 10, "cdna3"),
        register_bytes=Figure(512 << 10, "rocm"),  # 4 SIMDs of 512 registers of 64 lanes of 4 bytes
        clock_hz=Figure(2.1e9, "cdna3"),
        links="mesh",
        link_rate=Figure(64e9, "cdna3"),  # 16 lanes of 32 Gb/s; AMD counts both directions, 128 GB/s
        device_rate=Figure(448e9, "cdna3"),  # seven links; 896 GB/s both ways
        most_devices=Figure(8, "cdna3"),
    )


MI300X = _mi300("mi300x", Figure(192 << 30, "rocm"), Figure(5.3e12, "cdna3"))
MI325X = _mi300("mi325x", Figure(256 << 30, "rocm"), Figure(6.0e12, "cdna3"))

MI355X = Topology(
    name="mi355x",
    architecture="gfx950",
    dies=Figure(8, "cdna4"),
    units_per_die=Figure(32, "cdna4"),
    io_dies=Figure(2, "cdna4"),
    stacks=Figure(8, "cdna4"),
    granule_bytes=Figure(4096, "amdgpu"),
    interleave_ways=Figure(4, "amdgpu"),  # two of each I/O die, as the halves of a memory in two partitions say
    address_hash=_AMD_HASH,
    memory_bytes=Figure(288 << 30, "rocm"),
    memory_rate=Figure(8e12, "cdna4"),
    l2_bytes=Figure(4 << 20, "cdna4"),
    last_level_bytes=Figure(256 << 20, "cdna4"),
    near_bytes=Figure(160 << 10, "cdna4"),
    register_bytes=Figure(512 << 10, "rocm"),
    clock_hz=Figure(2.4e9, "cdna4"),
    links="mesh",
    link_rate=Figure(76.8e9, "cdna4"),  # 16 lanes of 38.4 Gb/s; 153.6 GB/s both ways
    device_rate=Figure(537.6e9, "cdna4"),  # seven links; 1,075.2 GB/s both ways
    most_devices=Figure(8, "cdna4"),
)


def _hopper(name: str, stacks: Figure, memory: Figure, rate: Figure, l2: Figure) -> Topology:
    return Topology(
        name=name,
        architecture="sm_90a",
        dies=Figure(1, "hopper"),
        units_per_die=Figure(132, "hopper"),
        io_dies=Figure(1, "hopper"),
        stacks=stacks,
        granule_bytes=Figure(0, "reported"),  # addresses are hashed over all stacks
        interleave_ways=Figure(1, "reported"),
        memory_bytes=memory,
        memory_rate=rate,
        l2_bytes=l2,
        last_level_bytes=Figure(0, "hopper"),
        near_bytes=Figure(227 << 10, "hopper-tuning"),  # what one block can have of 228
        register_bytes=Figure(256 << 10, "hopper-tuning"),
        clock_hz=Figure(1.98e9, "driver"),
        links="switch",
        link_rate=Figure(450e9, "hopper"),  # 18 links of 25 GB/s, all of them to any one other device
        device_rate=Figure(450e9, "hopper"),
        most_devices=Figure(8, "hopper"),
    )


H100 = _hopper(
    "h100", Figure(5, "hopper"), Figure(81_089 << 20, "driver"), Figure(3.35e12, "h100"), Figure(50 << 20, "hopper")
)
# The same chip with all six stacks and the whole second-level cache in use; multiprocessors are as many.
H200 = _hopper(
    "h200", Figure(6, "reported"), Figure(143_156 << 20, "driver"), Figure(4.8e12, "h200"), Figure(60 << 20, "driver")
)

HOST = Topology(
    name="host",
    architecture="host",
    dies=Figure(1, "local"),
    units_per_die=Figure(2, "local"),
    io_dies=Figure(1, "local"),
    stacks=Figure(12, "epyc"),
    granule_bytes=Figure(0, "local"),
    interleave_ways=Figure(1, "local"),
    memory_bytes=Figure(24e9, "local"),
    memory_rate=Figure(33e9, "local"),  # as two of its cores read; the processor's own peak is far above
    l2_bytes=Figure(1 << 20, "epyc"),  # of a core
    last_level_bytes=Figure(32 << 20, "epyc"),  # of eight cores
    near_bytes=Figure(1 << 20, "epyc"),
    register_bytes=Figure(0, "epyc"),
    clock_hz=Figure(3.7e9, "epyc"),  # of a 9654; models differ, and a virtual machine does not tell which it is on
    links="memory",
    link_rate=Figure(0, "local"),
    device_rate=Figure(0, "local"),
    most_devices=Figure(16, "local"),
)

TOPOLOGIES = {topology.name: topology for topology in (MI300X, MI325X, MI355X, H100, H200, HOST)}
"""All of them, by name."""
