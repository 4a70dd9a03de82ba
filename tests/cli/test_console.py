"""Progress on a terminal, with and without rich; nothing where nobody looks."""

from __future__ import annotations

import pytest

from jax_mono.cli import console
from jax_mono.extras import MissingExtraError


@pytest.mark.parametrize("rich", [True, False])
def test_progress(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, rich: bool) -> None:
    if not rich:

        def missing(module: str, extra: str) -> None:
            raise MissingExtraError(module)

        monkeypatch.setattr(console, "require", missing)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with console.progress("packing", 100) as on_tensor:
        on_tensor("embed", 50)
    shown = capsys.readouterr()
    assert "packing" in shown.err and shown.out == ""
    assert rich or "50%" in shown.err


@pytest.mark.parametrize("quiet", [True, False])
def test_nobody_looks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, quiet: bool) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: quiet)
    with console.progress("packing", 100, quiet=quiet) as on_tensor:
        on_tensor("embed", 50)
    assert capsys.readouterr() == ("", "")


def test_json_has_no_infinities(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_json({"a": [float("-inf"), 1.5, {"b": float("nan")}], 3: "é"}, indent=None)
    assert capsys.readouterr().out == '{"a": [null, 1.5, {"b": null}], "3": "é"}\n'
