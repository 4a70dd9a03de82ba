"""What the compiler makes of the program for Hopper, as its listing shows; it needs no GPU."""

from __future__ import annotations

import re

import pytest
from sm_90a_listing import disassemble, find_disassembler

from jax_mono import native
from jax_mono.models import preset
from jax_mono.plan import GPU, TileFormat, make_plan
from jax_mono.record import plan_record

PROGRAMS = [("laneformer-2b", 4, True), ("laneformer-2b", 8, False), ("qwen3-1.7b", 1, True)]


@pytest.fixture(scope="module", params=PROGRAMS)
def listing(request: pytest.FixtureRequest) -> list[str]:
    """Instructions of the decoding program of a model on so many devices, from compressed tapes or plain ones."""
    tool, report = find_disassembler(), native.gpu_report("cuda")
    if not tool:
        pytest.skip("needs nvdisasm, which the package nvidia-cuda-nvdisasm has")
    if report.compiler_error:
        pytest.skip(report.compiler_error)
    name, devices, compressed = request.param
    plan = make_plan(
        preset(name), tile=TileFormat(compressed=compressed), devices=devices, blocks=128 // devices, target=GPU
    )
    code = native.compile_program("cuda", plan_record(plan), 1, architecture="sm_90a", shared_memory=227 << 10)
    return list(disassemble(tool, code).values())


def test_words_are_loaded_whole(listing: list[str]) -> None:
    """A word of the exchange memory is one access of 128 bits: of two smaller ones, the second may find a later word.

    The assembler makes one into two where the program looks at less than all of it. The flags, of 32 bits, have the
    scope of the system.
    """
    kind = re.compile(r"LDG\.E\.(?:(\d+)\.)?STRONG\.(GPU|SYS)")
    loads = [load for instruction in listing for load in kind.findall(instruction)]
    assert loads.count(("128", "GPU")) + loads.count(("128", "SYS")) > 10
    assert [load for load in loads if load[0] != "128" and load != ("", "SYS")] == []
    assert loads.count(("", "SYS")) <= 2  # whether a call has failed, and whether it is to end


def test_slots_are_freed_by_what_was_loaded(listing: list[str]) -> None:
    """The arrivals that free a slot of the ring have an operand that depends on the loads from it.

    It is always one, which an assembler may find out one day; then the arrival overtakes the loads. The only arrival
    that depends on nothing ends the pump's work.
    """
    arrivals = [instruction for instruction in listing if "SYNCS.ARRIVE" in instruction]
    assert sum(".A1T0" in instruction for instruction in arrivals) == 1
    assert sum(".ART0" in instruction for instruction in arrivals) >= 2


def test_few_registers_go_through_memory(listing: list[str]) -> None:
    """Those that do are read back where a block has none to lose: 200 to 300 clocks each."""
    assert sum("LDL" in instruction or "STL" in instruction for instruction in listing) <= 16
