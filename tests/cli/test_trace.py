"""``jax-mono trace``: from a call to table, JSON and picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def test_trace_of_a_generation(run, chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "call.trace"
    monkeypatch.setenv("JAX_MONO_TRACE", str(file))
    monkeypatch.setenv("JAX_MONO_TRACE_TOKENS", "0,3")
    assert run("generate", "-c", chat_model, "--prompt", "the", "--blocks", "2", "--max-new-tokens", "2").code == 0
    ran = run("trace", file, "--out", tmp_path / "trace.json", "--picture", tmp_path / "token.svg", "--token", "1")
    assert ran.code == 0 and ran.out.startswith("1 device × 2 blocks, 3 layers; tokens 0–2 of the call, ")
    assert ran.err == "".join(f"jax-mono: wrote {tmp_path / name}\n" for name in ("trace.json", "token.svg"))
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert "<svg" in (tmp_path / "token.svg").read_text()
    ran = run("trace", file, "--picture", tmp_path / "token.svg", "--token", "9")
    assert ran.code == 2 and "token 9 is not in the trace, which has 0 to 2" in ran.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere/call.trace"], "/nowhere/call.trace: no such file or directory"),
        ([__file__], "is not a trace; set JAX_MONO_TRACE=FILE"),
        ([__file__, "--token", "1"], "add --picture FILE"),
    ],
)
def test_bad_input(run, arguments: list[str], message: str) -> None:
    ran = run("trace", *arguments)
    assert (ran.code, ran.out) == (2, "") and message in ran.err
