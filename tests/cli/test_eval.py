"""``jax-mono eval``: scores and samples of small random models, by both implementations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from evals.toy_problems import write_problems

from jax_mono.evals import confine
from jax_mono.evals.problems import read_problems
from jax_mono.evals.writing import encode
from jax_mono.tokenizer import Tokenizer

UNCONFINED = [] if confine.landlock_version() else ["--unconfined"]


def test_bits_of_kernel_and_flax(run, laneformer: Path, tmp_path: Path) -> None:
    (tmp_path / "text.py").write_text("the quick brown fox jumps over the lazy dog\n" * 4)
    common = ["eval", "bits", "-c", laneformer, "--text", tmp_path / "text.py", "--dtype", "float32", "--json"]
    kernel = run(*common, "--context", "32", "--blocks", "1", "--devices", "2").record
    flax = run(*common, "--context", "32", "--backend", "flax").record
    assert kernel["bytes"] == flax["bytes"] == 4 * 44 and kernel["tokens"] > 32
    assert kernel["bits_per_byte"] == pytest.approx(flax["bits_per_byte"], rel=1e-5)
    ran = run("eval", "bits", "-c", laneformer, "--text", tmp_path / "text.py", "--context", "1")
    assert ran.code == 2 and "--context" in ran.err


def test_the_answer_to_a_chat_begins_with_the_prompt(chat_model: Path, tmp_path: Path) -> None:
    problem = read_problems(write_problems(tmp_path)[0])[0]
    tokenizer = Tokenizer.open(chat_model)
    text = tokenizer.decode(encode(problem, tokenizer, "chat"), skip_special_tokens=False)
    question, answer = text.split("<|assistant|>")
    assert question.startswith("<|user|>") and problem.stem in question
    assert answer == f"```python\n{problem.stem}"
    assert tokenizer.decode(encode(problem, tokenizer, "completion")) == problem.stem


def test_humaneval_ends_and_goes_on(run, chat_model: Path, tmp_path: Path) -> None:
    base, plus = write_problems(tmp_path)
    out = tmp_path / "out"
    common = ["eval", "humaneval", "-c", chat_model, "--problems", base, "--plus", plus, "--out", out, "-n", "8"]
    common += ["--context", "128", "--blocks", "1", "--style", "completion", "--dtype", "float32", *UNCONFINED]
    ran = run(*common, "--limit", "1")
    assert ran.code == 0, ran.err
    assert "HumanEval+ pass@1" in ran.out
    first = (out / "samples.jsonl").read_text()
    record = run(*common, "--backend", "both", "--json").record
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert (out / "samples.jsonl").read_text().startswith(first)
    assert [row["task_id"] for row in rows] == ["Toy/0", "Toy/1"]
    assert all(row["solution"].startswith("def ") for row in rows)
    assert (record["problems"], record["samples"]) == (2, 1)
    assert record["agreement"]["tokens"] == record["tokens"] > 0
    assert record["agreement"]["different_tokens"] == 0
    assert json.loads((out / "summary.json").read_text())["base"] == record["base"]

    other = run(*common, "--temperature", "0.5")
    assert other.code == 2 and "Choose another --out" in other.err


def test_humaneval_samples(run, chat_model: Path, tmp_path: Path) -> None:
    base, _ = write_problems(tmp_path)
    common = ["eval", "humaneval", "-c", chat_model, "--problems", base, "--limit", "1", "-n", "8", "--json"]
    common += ["--context", "128", "--blocks", "1", "--style", "completion", "--samples", "2", *UNCONFINED]
    record = run(*common, "--temperature", "1.5", "-k", "1,2,5", "--out", tmp_path / "out").record
    assert set(record["base"]) == {"pass@1", "pass@2"} and "plus" not in record
    rows = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert rows[0]["tokens"] != rows[1]["tokens"]
    refused = run(*common, "--out", tmp_path / "other")
    assert refused.code == 2 and "--temperature" in refused.err
