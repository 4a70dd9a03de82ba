"""These tests run on JAX's default device if JAX_MONO_TEST_GPU is set.

JAX_MONO_TEST_GPU=1 python -m pytest tests/gpu
JAX_MONO_TEST_GPU=1 JAX_PLATFORMS=cpu python -m pytest tests/gpu     a rehearsal with the CPU's programs
"""

from __future__ import annotations

import os
from pathlib import Path

import jax
import pytest
from gpu.specs import Spec, compile_together, rehearsal

HERE = Path(__file__).parent

if os.environ.get("JAX_MONO_TEST_GPU"):
    # Interpreters that tests start use the same GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session", autouse=True)
def compiled_programs(request: pytest.FixtureRequest) -> None:
    """Compiles what the selected tests name: their parameters, and the constants of their modules."""
    if jax.default_backend() == "cpu":
        if "cpu" not in os.environ.get("JAX_PLATFORMS", ""):
            pytest.fail("JAX finds no GPU; set JAX_PLATFORMS=cpu to rehearse these tests on the CPU")
        assert rehearsal()
        return
    specs: dict[Spec, None] = {}
    for item in request.session.items:
        if HERE not in item.path.parents:
            continue
        named = getattr(item, "callspec", None)
        values = [*vars(item.module).values(), *(named.params.values() if named else ())]
        specs |= dict.fromkeys(value for value in values if isinstance(value, Spec))
    compile_together(specs)
