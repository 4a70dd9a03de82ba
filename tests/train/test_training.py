"""Training: the loss falls, an interrupted run ends as an uninterrupted one, two devices do what one does."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
import train_mini_coder
from mini_coder.recipe import COMMUNICATIONS, Settings, toy
from mini_coder.results import smooth
from mini_coder.run import RunError, evaluate, read_log, train
from mini_coder.training import State, data_mesh, learning_rate, place

from jax_mono.checkpoint import open_checkpoint

SETTINGS = Settings(steps=12, batch=8, micro=4, length=64, peak=1e-2, warmup=2, compute="float32")


def assert_same(one: State, other: State, **tolerance: float) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[State, Path]:
    """A run without interruption, on one device."""
    directory = tmp_path_factory.mktemp("run")
    return train(toy(), SETTINGS, data, directory, devices=1), directory


def test_the_loss_falls(finished: tuple[State, Path], data: Path) -> None:
    state, directory = finished
    rows = read_log(directory)
    assert [row["step"] for row in rows] == list(range(SETTINGS.steps))
    assert rows[0]["loss"] == pytest.approx(math.log(512), rel=0.15)  # before the first step: a uniform guess
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    record = evaluate(toy(), SETTINGS, state, data, directory, devices=1)
    about = json.loads((data / "manifest.json").read_text())["held_out"]
    assert record["held_out_tokens"] == about["bytes"]  # each token of the toy language is one byte
    nats = record["bits_per_byte"] * math.log(2)
    assert 0.5 * rows[-1]["loss"] < nats < 1.1 * rows[-1]["loss"]  # ends of documents, hard to guess, do not count
    assert json.loads((directory / "result.json").read_text()) == record


def test_resuming_is_exact(finished: tuple[State, Path], data: Path, tmp_path: Path) -> None:
    train(toy(), SETTINGS, data, tmp_path, devices=1, stop_after=5)
    with (tmp_path / "log.jsonl").open("a") as lines:  # as if more steps had been run and lost
        lines.write('{"step": 5, "lost": true}\n')
    state = train(toy(), SETTINGS, data, tmp_path, devices=1)
    assert_same(state, finished[0], rtol=0, atol=0)
    keys = ("step", "loss", "norm", "rate")
    ours, theirs = ([[row[key] for key in keys] for row in read_log(path)] for path in (tmp_path, finished[1]))
    assert ours == theirs
    with pytest.raises(RunError, match="other settings"):
        train(toy(), SETTINGS.replace(peak=1e-3), data, tmp_path, devices=1)


def test_two_devices_do_what_one_does(finished: tuple[State, Path], data: Path, tmp_path: Path) -> None:
    state = train(toy(), SETTINGS, data, tmp_path, devices=2, stop_after=4)
    pairs = zip(read_log(tmp_path), read_log(finished[1]), strict=False)
    for ours, theirs in pairs:
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert all(array.sharding.is_fully_replicated for array in state.params.values())


def test_batches_that_cannot_be_dealt() -> None:
    with pytest.raises(ValueError, match="--micro"):
        place(np.zeros((6, 9), np.int32), SETTINGS, data_mesh(1))


def test_learning_rate() -> None:
    settings = SETTINGS.replace(steps=110, warmup=10, peak=2.0, floor=0.1)
    rates = [learning_rate(settings, step) for step in range(111)]
    assert rates[0] == pytest.approx(0.2) and max(rates) == rates[10] == 2.0
    assert rates[60] == pytest.approx(1.1) and rates[110] == pytest.approx(0.2)
    assert learning_rate(settings.replace(steps=1), 0) == 2.0


def test_smoothing() -> None:
    assert smooth([4.0, 2.0, 0.0, 1.0], width=2) == [4.0, 3.0, 1.0, 0.5]


def test_the_command_trains_and_exports(data: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    tokenizer = data / "tokenizer"
    tokenizer.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tokenizer / name).write_text("{}")
    for name in COMMUNICATIONS:  # the twins are there already
        (tmp_path / name).mkdir()
        record = {"bits_per_byte": 1.5 if name == "none" else 1.0, "last_training_loss": 2.0}
        (tmp_path / name / "result.json").write_text(json.dumps(record))
    command = ["train", "--toy", "--only", "mini-coder", "--data", data, "--out", tmp_path, "--devices", "1"]
    command += ["--batch", "8", "--micro", "4", "--ship-steps", "3", "--compute", "float32"]
    monkeypatch.setattr("sys.argv", [str(part) for part in command])
    assert train_mini_coder.main() == 0, capsys.readouterr().err
    table = (tmp_path / "twins.md").read_text()
    assert "| two layers later | 1.0000 | +0.00 % |" in table and "| never | 1.5000 | +50.00 % |" in table
    assert "<svg" in (tmp_path / "twins.svg").read_text() and (tmp_path / "mini-coder" / "loss.svg").exists()
    assert json.loads((tmp_path / "mini-coder" / "result.json").read_text())["tokens"] == 3 * 8 * 64
    shipped = open_checkpoint(tmp_path / "mini-coder" / "model")
    assert shipped.config == toy() and {str(shipped.dtype(path)) for path in shipped.paths()} == {"bfloat16"}
