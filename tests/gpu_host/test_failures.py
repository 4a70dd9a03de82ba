"""Whatever goes wrong on the way to a GPU ends in one error that names it and says what to do."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from gpu_host.stand_in import ARCHITECTURE, Device
from kernel.common import Form, call_kernel, make_decoder, make_request, some_tokens
from tiny import tiny

from jax_mono import native
from jax_mono.call import LostHandoff, Mode
from jax_mono.decode import Finish
from jax_mono.decoder import Decoder

TEXT = some_tokens(4)
KernelError = jax.errors.JaxRuntimeError
_numbers = itertools.count()


def fresh(blocks: int = 1, devices: int = 1, form: Form = "threads") -> Decoder:
    """A plan that was not loaded before."""
    return make_decoder(
        tiny("laneformer", norm_eps=1e-5 + next(_numbers) * 1e-7), devices=devices, blocks=blocks, form=form
    )


@pytest.fixture
def new_program(device: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Sources that were not compiled before, and an empty cache; returns the program's source."""
    entry = tmp_path / "kernels" / "kernel" / "entry" / f"{ARCHITECTURE}.h"
    entry.parent.mkdir(parents=True)
    entry.write_text(f"// {tmp_path}\n")
    monkeypatch.setenv("JAX_MONO_KERNELS", str(tmp_path / "kernels"))
    monkeypatch.setenv("JAX_MONO_CACHE", str(tmp_path / "cache"))
    return entry


def test_the_compiler_s_log_is_shown(device: Device, new_program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = fresh()
    monkeypatch.setenv("STAND_IN_LOG", "entry.h(7): error: expected ';'")
    with pytest.raises(KernelError, match=r"hipRTC 7.0 could not compile mono_host with --offload-arch=host -std=c"):
        decoder.score(TEXT)
    with pytest.raises(KernelError, match=r"entry.h\(7\): error: expected ';'"):
        decoder.score(TEXT)
    monkeypatch.delenv("STAND_IN_LOG")
    assert np.isfinite(decoder.score(TEXT).logprobs).all()


def test_an_architecture_without_a_program(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_ARCHITECTURE", "gfx803")
    with pytest.raises(KernelError, match="there is no program for gfx803; this library has programs for host"):
        fresh().score(TEXT)


def test_sources_that_are_not_there(device: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JAX_MONO_KERNELS", str(tmp_path / "nothing"))
    with pytest.raises(KernelError, match=r"JAX_MONO_KERNELS is '.*/nothing', which holds no headers .*; unset it, or"):
        fresh().score(TEXT)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            "hipModuleLoadData:209",
            r"hipModuleLoadData failed with hipErrorNoBinaryForGpu \(209\); the program was compi",
        ),
        ("hipModuleGetFunction:500", "the program for host has no kernel mono_decode"),
        ("hipMalloc:2", r"hipMalloc failed with hipErrorOutOfMemory \(2\); the GPU's memory is full: free some"),
        ("hipExtMallocWithFlags:2", r"hipExtMallocWithFlags failed with hipErrorOutOfMemory \(2\)"),
        (
            "hipGetDevicePropertiesR0600:101",
            r"hipGetDevicePropertiesR0600 failed with hipErrorInvalidDevice \(101\); there",
        ),
        ("hipMemsetD8Async:1", r"hipMemsetD8Async failed with hipErrorInvalidValue \(1\); see"),
        ("hipModuleLaunchCooperativeKernel:720", r"hipErrorCooperativeLaunchTooLarge \(720\); not all blocks fit"),
        ("hipMemcpyDtoHAsync:700", r"hipMemcpyDtoHAsync failed with hipErrorIllegalAddress \(700\); the program went"),
    ],
)
def test_functions_that_fail(device: Device, monkeypatch: pytest.MonkeyPatch, script: str, message: str) -> None:
    decoder = fresh()
    device.script = script
    with pytest.raises(KernelError, match=message):
        decoder.score(TEXT)
    device.script = ""
    assert np.isfinite(decoder.score(TEXT).logprobs).all()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("hipMalloc:2:1", "hipMalloc failed with hipErrorOutOfMemory"),
        ("hipModuleLoadData:200:0", "hipModuleLoadData failed with hipErrorInvalidImage"),
        (
            "hipDeviceEnablePeerAccess:217:1",
            r"hipErrorPeerAccessUnsupported \(217\); the GPUs cannot reach each other's mem",
        ),
        ("hipModuleLaunchCooperativeKernel:701:1", "hipModuleLaunchCooperativeKernel failed with hipErrorUnknown"),
    ],
)
def test_one_gpu_of_several_fails(device: Device, script: str, message: str) -> None:
    """All of them report what failed first, at once, and the next call works."""
    decoder = fresh(devices=2, form="mesh")
    device.script = script
    started = time.monotonic()
    with pytest.raises(KernelError, match=message):
        decoder.score(TEXT)
    assert time.monotonic() - started < 6  # without waiting for any limit
    device.script = ""
    assert np.isfinite(decoder.score(TEXT).logprobs).all()


def test_gpus_that_are_connected_already(device: Device) -> None:
    device.script = "hipDeviceEnablePeerAccess:704"
    assert np.isfinite(fresh(devices=2, form="mesh").score(TEXT).logprobs).all()


def test_more_blocks_than_fit(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_MULTIPROCESSORS", "3")
    monkeypatch.setenv("STAND_IN_OCCUPANCY", "2")
    message = r"the plan runs 8 blocks on one GPU, and stand-in GPU \(host\) holds 6 of them at once; plan fewer blocks"
    with pytest.raises(KernelError, match=message):
        fresh(devices=2, blocks=4).score(TEXT)
    fresh(devices=2, blocks=3).score(TEXT)


@pytest.mark.parametrize("form", ["threads", "mesh"])
def test_a_lost_hand_off(device: Device, monkeypatch: pytest.MonkeyPatch, form: Form) -> None:
    decoder = fresh(devices=2, blocks=2, form=form)
    monkeypatch.setenv("JAX_MONO_WAIT_LIMIT_MS", "300")
    lost = LostHandoff(device=1, block=1, layer=2, channel="qkv rows")
    with pytest.raises(KernelError, match="waited longer than 300 ms for 'qkv rows' in layer 2, epoch 1"):
        decoder.score(TEXT, lost=lost)
    monkeypatch.undo()


def test_values_are_checked_before_anything_is_launched(device: Device) -> None:
    decoder = fresh()
    for changes, message in (
        ({"budget": 5}, "a budget of 5 tokens for room for 4"),
        ({"history": np.array([-2, 1], np.int32)}, "token -2 is outside the vocabulary of 128"),
        ({"session": 2**30}, "session 1073741824 is closed"),
        ({"temperature": -1.0}, "temperature >= 0"),
    ):
        launched = device.count("hipModuleLaunchCooperativeKernel")
        with pytest.raises(KernelError, match=message):
            call_kernel(decoder, make_request(**changes), mode=Mode.GENERATE, room=4)
        assert device.count("hipModuleLaunchCooperativeKernel") == launched


def test_a_session_that_no_gpu_can_reach(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = fresh()
    monkeypatch.setattr(native, "_gpu", None)
    session = native.Session(4)
    with pytest.raises(
        KernelError, match=f"session {session.id} was not opened for ROCm; call jax_mono.native.register"
    ):
        call_kernel(decoder, make_request(session=session.id), mode=Mode.GENERATE, room=4)
    session.close()


def test_a_session_without_memory(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = native.library().mono_sessions_open()
    monkeypatch.setenv("STAND_IN_FAIL", "hipHostMalloc:2")
    with pytest.raises(native.NativeError, match=r"hipHostMalloc failed with hipErrorOutOfMemory \(2\)"):
        native.Session(1 << 20)  # more than an earlier session may have left
    assert native.library().mono_sessions_open() == opened


def test_a_deadline_ends_the_call(device: Device) -> None:
    output = fresh().generate(TEXT, max_new_tokens=100, stop=[], deadline=1e-6)
    assert output.finish == Finish.DEADLINE
    assert len(output.tokens) <= 1


def test_what_there_is(device: Device, library: Path) -> None:
    report = native.gpu_report("rocm")
    assert report.gpus == [native.Gpu("stand-in GPU", ARCHITECTURE, 304, 65536)] * 8
    assert (report.driver_error, report.compiler, report.compiler_error) == ("", "hipRTC 7.0", "")


REPORT = "import sys; from jax_mono import native; print(native.gpu_report(sys.argv[1]))"


@pytest.mark.parametrize(
    ("platform", "changes", "words"),
    [
        (
            "cuda",
            {},
            ["no CUDA driver (/nowhere/x.so:", "JAX_MONO_DRIVER", "no NVRTC (/nowhere/y.so", "JAX_MONO_COMPILER"],
        ),
        ("rocm", {}, ["no HIP runtime (/nowhere/x.so:", "install ROCm 6 or 7", "no hipRTC (/nowhere/y.so:"]),
        (
            "cuda",
            {"JAX_MONO_DRIVER": "LIBRARY"},
            ["is no CUDA driver that can be used: it has no function cuGetErrorName"],
        ),
        ("rocm", {"JAX_MONO_DRIVER": "LIBRARY", "STAND_IN_DEVICES": "0"}, ["gpus=[]", "driver_error=''"]),
        (
            "rocm",
            {"JAX_MONO_DRIVER": "LIBRARY", "STAND_IN_FAIL": "hipInit:3"},
            ["hipInit failed with", "did not start"],
        ),
    ],
    ids=str,
)
def test_what_is_missing(library: Path, platform: str, changes: dict[str, str], words: list[str]) -> None:
    missing = {"JAX_MONO_DRIVER": "/nowhere/x.so", "JAX_MONO_COMPILER": "/nowhere/y.so"}
    changes = {name: value.replace("LIBRARY", str(library)) for name, value in changes.items()}
    process = subprocess.run(
        [sys.executable, "-c", REPORT, platform],
        env={**os.environ, **missing, **changes},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    for word in words:
        assert word in process.stdout
