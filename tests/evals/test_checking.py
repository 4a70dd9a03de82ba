"""Problems, samples, results and pass@k."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from evals.toy_problems import ADD, write_problems

from jax_mono.evals import checking, confine, writing
from jax_mono.evals.pass_at_k import pass_at_k
from jax_mono.evals.problems import ProblemsError, read_problems
from jax_mono.evals.sandbox import Limits

LIMITS = Limits(seconds=20.0, confined=confine.landlock_version() > 0)


def test_pass_at_k_counts_subsets() -> None:
    for n, c in ((1, 0), (1, 1), (5, 0), (5, 2), (6, 6), (7, 3)):
        outcomes = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(outcomes, k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    for arguments in ((3, 4, 1), (3, 1, 4), (3, 1, 0)):
        with pytest.raises(ValueError):
            pass_at_k(*arguments)


def test_problems(tmp_path: Path) -> None:
    base, plus = write_problems(tmp_path)
    add, half = read_problems(base, plus)
    assert (add.task_id, add.atol, len(add.plus_inputs)) == ("Toy/0", 0.0, 3)
    assert half.plus_solution.endswith("return x / 2\n") and read_problems(base)[0].plus_inputs is None
    assert add.stem.endswith('"""')
    for content, message in (("", "no problems"), ("{", "JSON"), ('{"task_id": 1}', "has no prompt")):
        (tmp_path / "bad.jsonl").write_text(content)
        with pytest.raises(ProblemsError, match=message):
            read_problems(tmp_path / "bad.jsonl")
    with pytest.raises(ProblemsError, match="no such file"):
        read_problems(tmp_path / "missing.jsonl")
    (tmp_path / "other.jsonl").write_text(json.dumps(ADD | {"task_id": "Toy/9"}))
    with pytest.raises(ProblemsError, match="Toy/9 is not there"):
        read_problems(tmp_path / "other.jsonl", plus)


def test_completions_end_with_the_function() -> None:
    assert writing.truncate("    return 1\n\ndef g():") == ("    return 1\n", True)
    assert writing.truncate("    if x:\n        return 1\n") == ("    if x:\n        return 1\n", False)


def samples(*solutions: Sequence[str]) -> list[dict[str, object]]:
    return [
        {"task_id": f"Toy/{task}", "sample": index, "solution": solution}
        for task, texts in enumerate(solutions)
        for index, solution in enumerate(texts)
    ]


def test_results_are_kept(tmp_path: Path, monkeypatch) -> None:
    problems = read_problems(*write_problems(tmp_path))
    right, special = "def add(a, b):\n    return a + b", "def add(a, b):\n    return 3"
    rows = samples([right, special], ["def half(x):\n    return x // 2", "def half(x):\n    return x / 2"])
    results = checking.check(problems, rows, tmp_path, LIMITS, workers=2)
    statuses = [(row["base"], row["plus"]) for row in results]
    assert statuses == [("passed", "passed"), ("passed", "failed"), ("failed", "failed"), ("passed", "passed")]
    record = checking.summary(results, [1, 2, 10])
    assert record["base"] == {"pass@1": 0.75, "pass@2": 1.0} and record["plus"] == {"pass@1": 0.5, "pass@2": 1.0}
    text = checking.table([("toy", record)])
    assert "HumanEval+ pass@2" in text and "| toy | 2 | 2 | 75.0 % | 100.0 % | 50.0 % | 100.0 % |" in text

    monkeypatch.setattr(checking.sandbox, "run", lambda *_: pytest.fail("ran again"))
    assert checking.check(problems, rows, tmp_path, LIMITS) == results


def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert writing.read_lines(file) == [{"a": 1}, {"a": 2}]
    assert file.read_text() == '{"a": 1}\n{"a": 2}\n'
    file.write_text('{"a": 1}\n{"a"\n')
    with pytest.raises(writing.SamplesError, match="remove it"):
        writing.read_lines(file)
