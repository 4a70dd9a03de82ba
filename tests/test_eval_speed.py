"""The script that measures requests: a line each, medians, a picture."""

from __future__ import annotations

import json
from pathlib import Path

import eval_speed
from cli.conftest import write_checkpoint
from tiny import tiny


def test_a_line_per_request(tmp_path: Path, monkeypatch, capsys) -> None:
    model = write_checkpoint(tmp_path / "model", tiny("llama", vocab_size=320))
    command = ["eval_speed", "-c", str(model), "--prompt-tokens", "4,40", "--new-tokens", "6", "--repeat", "2"]
    monkeypatch.setattr("sys.argv", [*command, "--blocks", "1", "--out", str(tmp_path / "out")])
    assert eval_speed.main() == 0, capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "out" / "requests.jsonl").read_text().splitlines()]
    assert [(row["prompt_tokens"], row["new_tokens"], row["repeat"]) for row in rows] == [
        (4, 6, 0),
        (4, 6, 1),
        (40, 6, 0),
        (40, 6, 1),
    ]
    assert all(0 < row["first_token_s"] < row["total_s"] and row["tokens_per_s"] > 0 for row in rows)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [row["requests"] for row in summary["requests"]] == [2, 2] and summary["dtype"] == "bfloat16"
    assert "<svg" in (tmp_path / "out" / "summary.svg").read_text()

    monkeypatch.setattr("sys.argv", ["eval_speed", "-c", str(model), "--new-tokens", "500", "--out", str(tmp_path)])
    assert eval_speed.main() == 1 and "ask for fewer" in capsys.readouterr().err
