"""These tests run on JAX's default device if JAX_MONO_TEST_GPU is set.

JAX_MONO_TEST_GPU=1 python -m pytest tests/gpu
JAX_MONO_TEST_GPU=1 python -m pytest tests/gpu -v -m "not slow"      without what takes minutes

Two rehearsals show without a GPU that the tests are right, with fewer tokens and repetitions: one with the CPU's
programs, one with the GPUs' own stage code on fibers, through the ROCm driver's side and a stand-in for the driver.

JAX_MONO_TEST_GPU=1 JAX_PLATFORMS=cpu python -m pytest tests/gpu
JAX_MONO_TEST_GPU=fibers python -m pytest tests/gpu

Pytest with its own dependencies suffices; no plugin is needed.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from gpu import rehearsal
from gpu.specs import Spec, compile_together
from gpu_host import stand_in
from jax._src.dispatch import runtime_tokens

from jax_mono import native, stream

HERE = Path(__file__).parent
LIMIT = 300
"""Seconds that a test may take, its fixtures included."""

ON = bool(os.environ.get("JAX_MONO_TEST_GPU"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)


def pytest_runtestloop(session: pytest.Session) -> None:
    """Compiles what the selected tests name, before they begin: their parameters, and constants of their modules."""
    items = [item for item in session.items if HERE in item.path.parents]
    if not ON or not items or session.config.option.collectonly:
        return
    if rehearsal.KIND:
        return
    if jax.default_backend() == "cpu":
        pytest.exit("JAX finds no GPU; set JAX_PLATFORMS=cpu to rehearse these tests on the CPU", returncode=1)
    specs: dict[Spec, None] = {}
    for item in items:
        named = getattr(item, "callspec", None)
        values = [*vars(item.module).values(), *(named.params.values() if named else ())]
        specs |= dict.fromkeys(value for value in values if isinstance(value, Spec))
    started = time.monotonic()
    count, failed = compile_together(specs)
    print(f"\n{count} programs compiled in {time.monotonic() - started:.0f} s, {failed} of them refused", flush=True)


@pytest.fixture(scope="session", autouse=True)
def machine(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Where the custom calls go: JAX's default device, or the stand-in whose devices run programs on fibers."""
    if rehearsal.KIND != "fibers":
        return
    library = stand_in.build(tmp_path_factory.mktemp("stand_in"))
    os.environ |= stand_in.environment(library, tmp_path_factory.mktemp("settings"))
    os.environ["JAX_MONO_KERNELS"] = str(stand_in.fiber_kernels(tmp_path_factory.mktemp("fibers")))
    os.environ["STAND_IN_ARCHITECTURE"] = "fibers"
    native.register()
    native._gpu = "rocm"
    jax.ffi.ffi_call = stand_in.fake_ffi_call(stand_in.Device(library))


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_stderr] = os.dup(2)  # before the output of tests is caught


_stderr = pytest.StashKey[int]()


@pytest.fixture(autouse=True)
def bounded(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test lasts for ever, and none leaves a call or a session behind."""
    alone = not request.config.pluginmanager.hasplugin("timeout")
    if alone:
        faulthandler.dump_traceback_later(LIMIT, exit=True, file=request.config.stash[_stderr])
    opened = native.library().mono_sessions_open()
    yield
    until = time.monotonic() + 30
    while stream._running and time.monotonic() < until:
        time.sleep(0.002)
    assert not stream._running, "a call is still running"
    gc.collect()
    assert native.library().mono_sessions_open() == opened, "a session is still open"
    runtime_tokens.clear()  # calls that failed would fail once more at exit
    if alone:
        faulthandler.cancel_dump_traceback_later()
