"""The script that measures prefill: a record per length, whose figures agree with each other."""

from __future__ import annotations

import json

import bench_prefill
import pytest

from jax_mono.models.presets import preset


def test_a_record_per_length(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench_prefill", "--model", "tiny-laneformer", "--tokens", "24,40", "--context", "64", "--side", "128"]
    monkeypatch.setattr("sys.argv", [*command, "--runs", "2"])
    assert bench_prefill.main() == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["tokens"] for row in rows] == [24, 40]
    for row in rows:
        assert row["prefill_tokens_per_s"] * row["prefill_s"] == pytest.approx(row["tokens"])
        assert row["fraction"] == pytest.approx(row["flops_per_s"] / row["matrix_flops_per_s"])
        assert row["first_token_s"] > 0

    monkeypatch.setattr("sys.argv", [*command, "--context", "40"])
    with pytest.raises(SystemExit):
        bench_prefill.main()
    assert "no room for 40 tokens" in capsys.readouterr().err


def test_weights_that_a_prompt_is_multiplied_with() -> None:
    """All parameters but embedding, head and norms."""
    config = preset("laneformer-2b")
    norms = (2 * config.num_layers + 1) * config.hidden_size
    tables = 2 * config.vocab_size * config.hidden_size
    assert bench_prefill.layer_weights(config) == config.num_parameters - norms - tables
