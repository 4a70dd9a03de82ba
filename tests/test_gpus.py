"""What GPUs can run is known before any weights are read; the GPUs are made up."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from kernel.common import make_mesh, params_of
from tiny import tiny

from jax_mono import decoder as decoder_module
from jax_mono import gpus, native, packing
from jax_mono.cli import machine
from jax_mono.config import ConfigError
from jax_mono.decoder import Decoder
from jax_mono.models.source import ArraySource
from jax_mono.plan import CPU, GPU, Plan
from jax_mono.topology import H100, MI300X

HOPPER = native.Gpu("NVIDIA H100 80GB HBM3", "sm_90a", 132, 232448)
AMPERE = native.Gpu("NVIDIA A100-SXM4-40GB", "sm_80", 108, 166912)


def gpu(ordinal: int | None = 0) -> SimpleNamespace:
    """A JAX device."""
    return SimpleNamespace(platform="gpu", local_hardware_id=ordinal, id=0)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[native.Gpu]:
    """The GPUs of this machine, as its driver shows them; JAX uses the first."""
    found = [HOPPER]
    monkeypatch.setattr(native, "gpu_platform", lambda: "cuda")
    monkeypatch.setattr(native, "gpu_report", lambda platform: native.GpuReport(found, "", "NVRTC 13.0", "", ""))
    for module in (packing, decoder_module):
        monkeypatch.setattr(module, "home", gpu)
    return found


def test_programs_that_the_library_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "sm_90a" in gpus.architectures()
    assert gpus.why_not(HOPPER) == ""
    why = gpus.why_not(AMPERE)
    assert why.startswith("NVIDIA A100-SXM4-40GB is sm_80, and this library has programs for")
    assert "sm_90a (NVIDIA Hopper: H100, H200, GH200)" in why
    (tmp_path / "kernel/entry").mkdir(parents=True)
    (tmp_path / "kernel/entry/sm_80.h").write_text("")
    monkeypatch.setenv("JAX_MONO_KERNELS", str(tmp_path))
    assert gpus.architectures() == ("sm_80",)
    assert gpus.why_not(AMPERE) == "" != gpus.why_not(HOPPER)


def test_gpus_whose_dies_are_known() -> None:
    def mi300x(units: int) -> native.Gpu:
        return native.Gpu("AMD Instinct MI300X", "gfx942", units, 65536)

    assert gpus.topology_of(HOPPER) is H100
    assert gpus.topology_of(mi300x(304)) is MI300X
    assert gpus.topology_of(mi300x(38)) is None, "one die of eight, in another partition mode"
    assert gpus.topology_of(AMPERE) is None


def test_weights_that_run(here: list[native.Gpu]) -> None:
    for dtype in (jnp.bfloat16, "float16"):
        gpus.check(gpu(), dtype)
    with pytest.raises(
        ConfigError, match="GPUs take bfloat16 and float16 weights, not float32; use one of these, or set"
    ):
        gpus.check(gpu(), "float32")
    cpu = jax.devices("cpu")[0]
    for dtype in (jnp.bfloat16, "float32"):
        gpus.check(cpu, dtype)
    with pytest.raises(ConfigError, match="float16 weights run on GPUs only"):
        gpus.check(cpu, "float16")


def test_gpus_that_have_no_program(here: list[native.Gpu]) -> None:
    here[:] = [HOPPER, AMPERE]
    gpus.check(gpu(0), "bfloat16")
    for dtype in gpus.DTYPES:
        with pytest.raises(
            native.NativeError, match=r"A100-SXM4-40GB is sm_80, .*; set JAX_PLATFORMS=cpu to decode on"
        ):
            gpus.check(gpu(1), dtype)


def test_gpus_that_the_driver_does_not_show(here: list[native.Gpu], monkeypatch: pytest.MonkeyPatch) -> None:
    here.clear()
    with pytest.raises(
        native.NativeError, match=r"cannot be used: the driver shows 0 GPUs; run jax-mono doctor, or set"
    ):
        gpus.check(gpu(None), "bfloat16")
    monkeypatch.setattr(native, "gpu_platform", lambda: None)
    with pytest.raises(native.NativeError, match="JAX's platform 'gpu' has no resident program; set JAX_PLATFORMS=cpu"):
        gpus.check(gpu(), "bfloat16")


class Planned(Exception):
    """Packing was about to begin."""


@pytest.fixture
def plan_of(monkeypatch: pytest.MonkeyPatch):
    """Makes a decoder as far as its plan."""

    def stop(plan: Plan, *_: object, **__: object) -> None:
        raise Planned(plan)

    monkeypatch.setattr(decoder_module, "pack", stop)
    config = tiny("llama", hidden_size=2048)

    def plan(**options: object) -> Plan:
        source = SimpleNamespace(config=config)
        with pytest.raises(Planned) as stopped:
            Decoder.from_source(source, **options)  # type: ignore[arg-type]
        return stopped.value.args[0]

    return plan


def test_a_gpu_is_used_where_jax_has_one(here: list[native.Gpu], plan_of) -> None:
    plan = plan_of()
    assert (plan.target, plan.num_devices, plan.num_blocks) == (GPU, 1, 128)
    plan = plan_of(devices=4, dtype="float16")  # of one GPU
    assert (plan.target, plan.num_devices, plan.num_blocks) == (GPU, 4, 32)
    assert plan_of(blocks=7).num_blocks == 7
    plan = plan_of(mesh=make_mesh(2), blocks=1)  # of the CPU, whatever JAX prefers
    assert (plan.target, plan.num_devices) == (CPU, 2)


def test_float32_is_refused_before_anything_is_read(here: list[native.Gpu]) -> None:
    config = tiny("llama")
    source = ArraySource(config, params_of(config))
    source.tensor = lambda *_: pytest.fail("a tensor was read")  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="GPUs take bfloat16 and float16 weights, not float32"):
        Decoder.from_source(source, dtype=jnp.float32)


def test_the_default_device_is_where_arrays_go() -> None:
    assert packing.home() == jax.devices()[0]
    other = jax.devices("cpu")[3]
    with jax.default_device(other):
        assert packing.home() == other == next(iter(jnp.zeros(1).devices()))
        config = tiny("llama", num_layers=1)
        decoder = Decoder.from_source(ArraySource(config, params_of(config)), blocks=1)
        assert decoder.tapes.layers.devices() == {other}
        assert len(decoder.generate([1], max_new_tokens=4).tokens) == 4
    with jax.default_device("cpu"):
        assert packing.home() == jax.devices("cpu")[0]


def test_the_command_line_takes_the_most_exact_weights(here: list[native.Gpu]) -> None:
    asked = Namespace(dtype=None)
    machine.settle_dtype(asked)
    assert asked.dtype == "bfloat16"
    with pytest.raises(ConfigError, match="GPUs take"):
        machine.settle_dtype(Namespace(dtype="float32"))
    machine.settle_dtype(Namespace(dtype="float32"), kernel=False)
    assert machine.variant() == "sm_90a"


def test_the_command_line_on_the_cpu() -> None:
    asked = Namespace(dtype=None)
    machine.settle_dtype(asked)
    assert asked.dtype == "float32"
    with pytest.raises(ConfigError, match="float16 weights run on GPUs only"):
        machine.settle_dtype(Namespace(dtype="float16"))
    assert machine.variant() == native.cpu_variant()


def test_a_mesh_of_more_devices_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.device_mesh(2).devices.tolist() == jax.devices()[:2]
    with pytest.raises(
        ConfigError, match="--form mesh needs 9 JAX devices, there are 8; remove --xla_force_host_platfo"
    ):
        machine.device_mesh(9)
    monkeypatch.setattr(jax, "devices", lambda: [gpu()])
    with pytest.raises(
        ConfigError, match="needs 2 JAX devices, there are 1; use --form threads, where one GPU runs all"
    ):
        machine.device_mesh(2)
