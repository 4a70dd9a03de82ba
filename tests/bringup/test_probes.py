"""Probes on this processor, and the GPUs' host side of them through a library that stands in for ROCm."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from bringup.synthetic_pages import Home, hashed, interleaved, times
from gpu_host import stand_in

from jax_mono import native
from jax_mono.bringup import kit, probe_steps, probes
from jax_mono.bringup.machine import Machine
from jax_mono.bringup.step import Context, Findings
from jax_mono.gfx942.listing import kernels
from jax_mono.gfx942.toolchain import OPTIONS, ziglang


def test_a_word_between_two_threads() -> None:
    made = probes.hand_off("cpu", blocks=2, first=0, second=1, rounds=300)
    assert 10 < made.nanoseconds < 1e6 and made.dies.tolist() == [0, 0]


def test_others_poll_it() -> None:
    made = probes.hand_off("cpu", blocks=5, first=4, second=2, rounds=50, pollers=3)
    assert made.nanoseconds > 10


def test_a_probe_ends_at_its_bound() -> None:
    with pytest.raises(probes.ProbeError, match="did not meet in 50 ms"):
        probes.hand_off("cpu", blocks=2, first=0, second=1, rounds=probes.MOST_ROUNDS, limit_ms=50)
    with pytest.raises(probes.ProbeError, match="100000 pages were not read in 1 ms"):
        probes.page_times("cpu", blocks=1, pages=100_000, lines=32, sweeps=1, limit_ms=1)


def test_pages_have_times() -> None:
    found, xcds = probes.page_times("cpu", blocks=2, pages=500, sweeps=3)
    assert found.shape == (1, 500) and found.dtype == np.float32 and xcds.tolist() == [0]
    assert (found > 0).all() and np.median(found) < 1e4


def test_what_makes_no_sense_is_refused() -> None:
    for wrong in ({"first": 2}, {"second": 0}, {"pollers": 1}, {"rounds": 0}, {"rounds": 1 << 30}):
        with pytest.raises(ValueError):
            probes.hand_off("cpu", **({"blocks": 2, "first": 0, "second": 1} | wrong))
    with pytest.raises(ValueError, match="3 lines"):
        probes.page_times("cpu", blocks=1, lines=3)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stand_in.build(tmp_path_factory.mktemp("stand_in"))


@pytest.fixture
def mi300x(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of this test find two GPUs of eight dies, whose blocks are threads."""
    for name, value in stand_in.environment(library, tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("JAX_MONO_KERNELS", raising=False)  # the library's own sources
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv("STAND_IN_ARCHITECTURE", "gfx942:sramecc+:xnack-")
    monkeypatch.setenv("STAND_IN_MULTIPROCESSORS", "16")
    monkeypatch.setenv("STAND_IN_DEVICES", "2")
    monkeypatch.setenv("STAND_IN_DIES", "8")


STEPS = [step for step in kit.STEPS if step.name in ("flags", "peers", "pollers", "pages")]


def test_the_steps_on_several_dies_and_devices(mi300x: None, tmp_path: Path) -> None:
    """Threads of a CPU have no dies: times are real ones, and the map of pages must be refused."""
    out = tmp_path / "report"
    outcomes = {outcome.step: outcome for outcome in kit.bring_up(out, size="toy", known=STEPS)}
    assert {name: outcome.status for name, outcome in outcomes.items()} == dict.fromkeys(
        ("flags", "peers", "pollers", "pages"), "done"
    ), [outcome.reason for outcome in outcomes.values()]
    record = json.loads((out / "report.json").read_text())
    assert record["machine"] == {
        "platform": "rocm", "gpus": ["stand-in GPU"] * 2, "architecture": "gfx942", "topology": "mi300x",
    }  # fmt: skip
    figures = {f.name: f for outcome in outcomes.values() for f in outcome.findings.figures}
    assert figures["dies that blocks ran on"].verdict == "as assumed"
    flags = np.array(outcomes["flags"].findings.details["matrices"]["flags"]["rows"], float)
    assert flags.shape == (8, 8) and np.isfinite(flags).all() and (flags > 0).all()
    peers = np.array(outcomes["peers"].findings.details["matrices"]["peers"]["rows"], float)
    assert peers.shape == (2, 2) and peers[0, 1] > 0 and np.isnan(peers[0, 0])
    assert outcomes["pollers"].findings.details["curves"]["pollers"]["xs"] == [0, 1, 2, 4, 8, 14]
    assert np.load(out / "pages.npz")["times"].shape == (8, 1024)
    assert figures["a map of pages was found"].verdict == "differs"
    assert outcomes["pages"].findings.remarks[0].startswith("no map of pages: ")
    assert all("no mapped memory" not in remark for remark in outcomes["pages"].findings.remarks)
    assert (out / "pages-pages.svg").is_file()
    assert (out / "flags-flags.svg").is_file() and (out / "pollers-pollers.svg").is_file()


def test_pages_of_memory_that_is_there_are_timed_and_left_as_they_are() -> None:
    """Whatever its words say, no read goes elsewhere."""
    memory = np.full(130 * 1024, 0xDEADBEEF, np.uint32)
    times, xcds = probes.page_times("cpu", blocks=2, pages=128, address=memory.ctypes.data)
    assert times.shape == (1, 128) and (times > 0).all() and len(xcds) == 1
    assert (memory == 0xDEADBEEF).all()


def test_drivers_that_fail_are_named(mi300x: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_FAIL", "hipModuleLaunchCooperativeKernel:719")
    (outcome,) = kit.bring_up(tmp_path / "report", size="toy", known=STEPS[:1])
    assert outcome.status == "failed"
    assert outcome.reason.startswith("ProbeError: hipModuleLaunchCooperativeKernel failed with hipErrorLaunchFailure")


def pages_of(context: Context, monkeypatch: pytest.MonkeyPatch, homes: Sequence[Home]) -> Findings:
    """The step on GPUs whose pages lie as told."""

    def page_times(platform: str, *, device: int = 0, pages: int, **_: object) -> tuple[np.ndarray, np.ndarray]:
        return times(homes[device], pages=pages, seed=device), np.arange(8)

    monkeypatch.setattr(probes, "page_times", page_times)
    monkeypatch.setattr(probe_steps, "_blocks", lambda _: 304)
    return probe_steps.Pages().run(context)


def test_the_map_of_pages_is_compared_with_the_topology(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = Context(tmp_path, Machine("rocm", ("AMD Instinct MI300X",) * 3, "gfx942", "mi300x"), "toy")
    found = pages_of(context, monkeypatch, [interleaved(1)] * 3)
    assert not [figure.name for figure in found.figures if figure.wrong] and not found.remarks
    figures = {figure.name: figure.value for figure in found.figures}
    assert figures["consecutive bytes on a die"] == 4096 and figures["period of the map"] == 4 * 4096
    assert figures["GPUs whose ordinary memory is the same"] == 3 and found.details["pattern"] == (0, 1, 2, 3)
    assert found.details["order"] == (0, 1, 2, 3)

    exchanged = hashed((1 | 1 << 8 | 1 << 9, 2 | 2 << 8))
    found = pages_of(context, monkeypatch, [lambda page: exchanged(page + 512)] * 3)
    assert found.details["order"] == (3, 2, 1, 0), "and regions exchange them"

    found = pages_of(context, monkeypatch, [interleaved(4), interleaved(4), interleaved(1)])
    assert found.details["order"] is None
    wrong = {figure.name: figure.value for figure in found.figures if figure.wrong}
    assert wrong == {"consecutive bytes on a die": 4 * 4096, "GPUs whose ordinary memory is the same": 2}


@pytest.mark.parametrize("function", ["hipMemCreate", "hipMemAddressReserve", "hipMemMap", "hipMemSetAccess"])
def test_memory_that_cannot_be_mapped_is_replaced_and_given_back(
    function: str, mi300x: None, monkeypatch: pytest.MonkeyPatch, library: Path
) -> None:
    """In a process of its own, because drivers are loaded once."""
    code = """
import ctypes, os, sys
from jax_mono.bringup import probe_steps, probes
from jax_mono.bringup.machine import look
from jax_mono.bringup.step import Context
from pathlib import Path
stand_in = ctypes.CDLL(sys.argv[1])
found = probe_steps.Pages().run(Context(Path(sys.argv[2]), look(), "toy"))
print(found.remarks[0])
for name in sys.argv[3:]:
    print(name, stand_in.stand_in_count(name.encode()))
"""
    monkeypatch.setenv("STAND_IN_FAIL", f"{function}:801")
    counted = ("hipMemCreate", "hipMemRelease", "hipMemAddressReserve", "hipMemAddressFree", "hipMemUnmap")
    ran = subprocess.run(
        [sys.executable, "-c", code, str(library), str(library.parent), *counted],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    remark, *lines = ran.stdout.splitlines()
    assert remark.startswith(f"no mapped memory, ordinary memory instead: {function} failed with")
    made, released, reserved, freed, undone = (int(line.split()[-1]) for line in lines)
    order = ["hipMemCreate", "hipMemAddressReserve", "hipMemMap", "hipMemSetAccess"].index(function)
    assert (made, reserved) == (1, min(order, 1)), "functions that fail count as called"
    assert (released, freed, undone) == (order > 0, order > 1, order > 2)


@pytest.fixture(scope="module")
def listing(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The probes for gfx942, as assembly."""
    directory = tmp_path_factory.mktemp("probe")
    for name, text in native.kernel_sources().items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    entry, out = directory / "kernel" / "probe" / "gfx942.h", directory / "probe.s"
    subprocess.run([*ziglang().clang, *OPTIONS, "-S", f"-I{directory}", str(entry), "-o", str(out)], check=True)
    return out.read_text()


def test_gfx942_times_reads_alone(listing: str) -> None:
    """Between two looks at the clock there is one read, which has come to its end."""
    lines = [line.split("//")[0].split(";")[0].strip() for line in listing.splitlines()]
    code = [line for line in lines if line and not line.startswith((".", "#"))]
    memory = [line for line in code if re.match(r"s_memtime|s_waitcnt|global_|flat_|buffer_|s_load|ds_", line)]
    (read,) = [i for i, line in enumerate(memory) if line.startswith("global_load_dword ")]
    assert memory[read].endswith("off sc0 sc1")
    around = [line.split()[0] + " " + " ".join(line.split()[1:2]) for line in memory[read - 2 : read + 3]]
    assert [word.split()[0] for word in around] == [
        "s_memtime", "s_waitcnt", "global_load_dword", "s_waitcnt", "s_memtime",
    ]  # fmt: skip
    assert memory[read - 1] == "s_waitcnt lgkmcnt(0)" and "vmcnt(0)" in memory[read + 1]


def test_gfx942_moves_words_as_the_resident_program_does(listing: str) -> None:
    words = re.findall(r"\b(buffer_(?:load|store)_\S+) .*", listing)
    policies = re.findall(r"\bbuffer_(?:load|store)_dwordx4 .*sc0 sc1", listing)
    assert set(words) == {"buffer_load_dwordx4", "buffer_store_dwordx4"} and len(policies) == len(words)
    assert "HW_REG_XCC_ID" in listing and "s_sleep" in listing
    assert kernels(listing)["mono_probe"].spilled_scalars == 0


def test_probes_compile_for_hopper() -> None:
    report = native.gpu_report("cuda")
    if report.compiler_error:
        pytest.skip(report.compiler_error)
    probes.compile_probes("cuda", "sm_90a")
    with pytest.raises(probes.ProbeError, match="there are no probes for sm_80"):
        probes.compile_probes("cuda", "sm_80")
