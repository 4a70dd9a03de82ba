"""What every test runs under: eight CPU devices, no GPU unless asked for."""

from __future__ import annotations

import os

import pytest

# JAX reads these once, when it is first imported.
flags = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()
GPU = bool(os.environ.get("JAX_MONO_TEST_GPU"))
if not GPU:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if GPU:
        return
    skip = pytest.mark.skip(reason="needs a GPU; set JAX_MONO_TEST_GPU=1 to run it")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
