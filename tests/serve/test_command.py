"""``jax-mono serve`` as a user starts and ends it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from jax_mono.cli import main


def test_from_start_to_ctrl_c(checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jax_mono", "serve", "-c", str(checkpoint), "--port", "0", "--name", "mine"]
    command += ["--dtype", "float32", "--blocks", "1", "--context", "64"]
    environment = os.environ | {"JAX_MONO_API_KEY": "secret"}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            said = [next(line for line in process.stderr if "is served on" in line)]
            url = re.search(r"http://[\d.:]+", said[0])
            assert url is not None, said
            headers = {"Authorization": "Bearer secret"}
            body = {"prompt": "a", "max_tokens": 3, "temperature": 0, "ignore_eos": True}
            answer = httpx.post(f"{url[0]}/v1/completions", json=body, headers=headers, timeout=60).json()
            assert (answer["model"], answer["usage"]["completion_tokens"]) == ("mine", 3)
            assert httpx.get(f"{url[0]}/v1/models").status_code == 401
            (model,) = httpx.get(f"{url[0]}/v1/models", headers=headers).json()["data"]
            facts = model["jax_mono"]
            assert (facts["context"], facts["dtype"], facts["blocks"]) == (64, "float32", 1)
            assert facts["limit_tokens_per_s"] == facts["read_bytes_per_s"] / facts["bytes_per_token"] > 0
        finally:
            process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(30) == 130
        assert rest.splitlines()[-1] == "jax-mono: interrupted"


def test_others_need_a_key(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAX_MONO_API_KEY", raising=False)
    for host in ("0.0.0.0", "::", "192.168.0.1", "example.org"):
        assert main(["serve", "--host", host]) == 2
        assert "add --api-key KEY" in capsys.readouterr().err


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert main(["serve", "--port", str(other.getsockname()[1])]) == 1
    assert "choose another --port" in capsys.readouterr().err


def test_a_context_that_the_model_does_not_have(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "-c", str(checkpoint), "--port", "0", "--context", "4096"]) == 2
    assert "longest context of 512" in capsys.readouterr().err


def test_the_library_needs_nothing_of_the_server(tmp_path: Path) -> None:
    code = """
import importlib, sys
for name in ("decoder", "loading", "tokenizer", "checkpoint", "cli", "cli.chat", "serve.prefixes"):
    importlib.import_module(f"jax_mono.{name}")
print(sorted({"starlette", "uvicorn", "pydantic", "prometheus_client"} & set(sys.modules)))
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"
