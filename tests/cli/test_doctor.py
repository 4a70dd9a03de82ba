"""``jax-mono doctor``: says that all is well here, and what is not when something is broken."""

from __future__ import annotations

import re

import jax

from jax_mono import native, settings
from jax_mono.cli import doctor, machine
from jax_mono.native import NativeError


def test_all_is_well(run) -> None:
    ran = run("doctor")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.rstrip().endswith("Decoding on CPU works.")
    for words in (jax.__version__, native.cpu_variant(), "CPU only", "generate the same 8 tokens"):
        assert words in ran.out
    for name in re.findall(r"JAX_MONO_\w+", settings.__doc__ or ""):
        assert name in ran.out


def test_json(run) -> None:
    ran = run("doctor", "--json")
    assert ran.code == 0 and ran.record["works"] is True
    sections = {finding["section"] for finding in ran.record["findings"]}
    assert sections == {"software", "machine", "environment", "native library", "jax", "gpu", "extras", "self-test"}


def test_a_library_that_does_not_load(run, monkeypatch) -> None:
    def fail() -> None:
        raise NativeError("libjax_mono.so does not exist; install the package")

    monkeypatch.setattr(native, "library", fail)
    ran = run("doctor")
    assert ran.code == 1 and "! library: libjax_mono.so does not exist" in ran.out


def test_settings_that_make_no_sense(run, monkeypatch) -> None:
    monkeypatch.setenv("JAX_MONO_WAIT_LIMIT_MS", "soon")
    ran = run("doctor")
    assert ran.code == 1 and "JAX_MONO_WAIT_LIMIT_MS is 'soon'" in ran.out


def test_what_is_missing_comes_with_a_remedy(run, monkeypatch) -> None:
    monkeypatch.setitem(doctor._EXTRAS, "plot", ("no_such_module",))
    monkeypatch.setattr(machine, "huge_pages", lambda: "never")
    monkeypatch.setattr(doctor, "_requirements", lambda: {"jax": [(">=", "99.0")], "python": [(">=", "3.11")]})
    ran = run("doctor")
    assert ran.code == 1
    assert "pip install 'jax-mono[plot]'" in ran.out
    assert "tee /sys/kernel/mm/transparent_hugepage/enabled" in ran.out
    assert f"! jax: {jax.__version__} (needs >=99.0)" in ran.out


def test_comparing_versions() -> None:
    assert doctor._bounds(">=3.11,<3.14") == [(">=", "3.11"), ("<", "3.14")]
    assert doctor._holds("3.13.2", "<", "3.14") and not doctor._holds("3.14.0rc1", "<", "3.14")
    assert doctor._holds("0.10.2", ">=", "0.10.2") and not doctor._holds("0.9.2", ">=", "0.10.2")
