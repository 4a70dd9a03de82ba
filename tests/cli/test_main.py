"""What all commands have in common: help, exit codes, one line per error."""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import jax_mono
from jax_mono import cli
from jax_mono.cli import options
from jax_mono.extras import MissingExtraError

COMMANDS = sorted(cli.COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(run, command: str) -> None:
    ran = run(command, "--help")
    assert (ran.code, ran.err) == (0, "")
    assert f"  jax-mono {command}" in ran.out  # an example
    assert "None" not in ran.out and "[]" not in ran.out


@pytest.mark.parametrize("command", ["bench", "generate", "logits", "parity", "serve"])
def test_the_default_is_the_model_that_ships(run, command: str) -> None:
    assert "(default: mini-coder)" in " ".join(run(command, "--help").out.split())


def test_a_conversation_has_a_model_that_was_tuned_for_it(run) -> None:
    assert "(default: smollm2-135m-instruct)" in " ".join(run("chat", "--help").out.split())


def test_help_needs_no_jax(tmp_path: Path) -> None:
    code = """
import sys
from jax_mono.cli import main
assert main(["--help"]) == 0 and main(["generate", "--help"]) == 0
print(sorted({"jax", "numpy", "rich", "tokenizers"} & set(sys.modules)))
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"


def test_installed_command_and_module(tmp_path: Path) -> None:
    script = shutil.which("jax-mono", path=os.path.dirname(sys.executable))
    commands = [[sys.executable, "-m", "jax_mono"]] + ([[script]] if script else [])
    for command in commands:
        ran = subprocess.run([*command, "--version"], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert ran.stdout == f"jax-mono {jax_mono.__version__}\n"
    arguments = ["plan", "tiny", "--blocks", "2"]
    ran = subprocess.run([*commands[-1], *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "block" in ran.stdout
    ran = subprocess.run([*commands[-1], "plan", "tinny"], cwd=tmp_path, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("jax-mono: error: there is no preset 'tinny'")
    assert ran.stderr.count("\n") == 1


def test_a_platform_that_is_not_there(tmp_path: Path) -> None:
    environment = os.environ | {"JAX_PLATFORMS": "cuda"}
    command = [sys.executable, "-m", "jax_mono", "plan", "tiny"]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 2
    assert ran.stderr.splitlines()[-1].startswith("jax-mono: error: JAX")
    assert "set JAX_PLATFORMS=cpu" in ran.stderr


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["generate", "--nonsense"], ["generate", "--devices", "0"]])
def test_usage_errors(run, arguments: list[str]) -> None:
    ran = run(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert "error: " in ran.err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("the cause; the remedy\nmore"), 2, "the cause; the remedy"),
        (MissingExtraError("install it"), 2, "install it"),
        (FileNotFoundError(2, "No such file", "a.npy"), 2, "a.npy: no such file"),
        (jax.errors.JaxRuntimeError("ABORTED: jax_mono: device 0\n..."), 1, "ABORTED: jax_mono: device 0"),
        (OSError(28, "No space left", "b"), 1, "b: no space left"),
        (KeyboardInterrupt(), 130, None),
    ],
)
def test_errors_are_one_line(run, monkeypatch, error: BaseException, code: int, line: str | None) -> None:
    def fail(_: object) -> int:
        raise error

    monkeypatch.setattr(importlib.import_module("jax_mono.cli.plan"), "run", fail)
    ran = run("plan", "tiny")
    expected = "jax-mono: interrupted\n" if line is None else f"jax-mono: error: {line}\n"
    assert (ran.code, ran.out, ran.err) == (code, "", expected)
    if code != 130:
        with pytest.raises(type(error)):
            run("plan", "tiny", "--debug")


def test_bugs_keep_their_traceback(run, monkeypatch) -> None:
    def fail(_: object) -> int:
        raise KeyError("a bug")

    monkeypatch.setattr(importlib.import_module("jax_mono.cli.plan"), "run", fail)
    with pytest.raises(KeyError):
        run("plan", "tiny")


def test_values_of_options() -> None:
    assert options.counts("1, 2,16") == [1, 2, 16]
    assert options.naturals("0,50256") == [0, 50256]
    assert options.seconds("1.5") == 1.5
    refused = [(options.count, "0"), (options.counts, "1,,2"), (options.natural, "-1"), (options.natural, "1.0")]
    refused += [(options.seconds, text) for text in ("0", "nan", "inf", "soon")]
    for parse, text in refused:
        with pytest.raises(argparse.ArgumentTypeError, match="is not a"):
            parse(text)
