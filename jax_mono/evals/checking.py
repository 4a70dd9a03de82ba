"""Runs samples and says which are right."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jax_mono.evals import sandbox
from jax_mono.evals.pass_at_k import pass_at_k
from jax_mono.evals.problems import Problem
from jax_mono.evals.writing import read_lines


def check_sample(problem: Problem, solution: str, limits: sandbox.Limits) -> dict[str, Any]:
    """Runs one sample on the tests of HumanEval and, if it has them, the inputs of HumanEval+.

    Args:
        problem: The problem.
        solution: A whole program.
        limits: What it may use.

    Returns:
        ``base`` and ``plus`` (None without additional inputs), each a status, and ``detail``. As in EvalPlus, a sample
        is right in the sense of HumanEval+ only if it is in that of HumanEval.

    Raises:
        SandboxError: This machine cannot confine a process.
    """
    program = f"{solution}\n\n{problem.test}\n\ncheck({problem.entry_point})\n"
    base = sandbox.run({"program": program}, limits)
    row = {"base": base.status, "plus": None, "detail": base.detail}
    if problem.plus_inputs is None:
        return row
    if base.status != "passed":
        return row | {"plus": base.status}
    request = {
        "program": solution,
        "reference": problem.plus_solution,
        "entry_point": problem.entry_point,
        "inputs": problem.plus_inputs,
        "atol": problem.atol,
    }
    plus = sandbox.run(request, limits)
    return row | {"plus": plus.status, "detail": plus.detail}


def check(
    problems: Sequence[Problem],
    samples: Sequence[Mapping[str, Any]],
    directory: Path,
    limits: sandbox.Limits,
    workers: int = 1,
    on_result: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Runs the samples that have no result yet.

    Args:
        problems: The problems.
        samples: Lines of ``samples.jsonl``.
        directory: Where ``results.jsonl`` is or will be.
        limits: What a sample may use.
        workers: Samples at a time.
        on_result: Called with each result.

    Returns:
        A result for each sample, in their order: ``task_id``, ``sample``, ``base``, ``plus``, ``detail``.

    Raises:
        SandboxError: This machine cannot confine a process.
    """
    by_id = {problem.task_id: problem for problem in problems}
    file = directory / "results.jsonl"
    done = {(row["task_id"], row["sample"]): row for row in read_lines(file)}

    def key(sample: Mapping[str, Any]) -> tuple[str, int]:
        return sample["task_id"], sample["sample"]

    def checked(sample: Mapping[str, Any]) -> dict[str, Any]:
        row = done.get(key(sample))
        problem = by_id[sample["task_id"]]
        if row is None or (row["plus"] is None and problem.plus_inputs is not None):
            names = {"task_id": sample["task_id"], "sample": sample["sample"]}
            return names | check_sample(problem, sample["solution"], limits)
        return row

    results = []
    with ThreadPoolExecutor(workers) as pool, file.open("a", encoding="utf-8") as lines:
        try:
            for sample, row in zip(samples, pool.map(checked, samples), strict=True):
                if done.get(key(sample)) != row:
                    lines.write(json.dumps(row) + "\n")
                    lines.flush()
                results.append(row)
                on_result(row)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return results


def summary(results: Sequence[Mapping[str, Any]], ks: Sequence[int]) -> dict[str, Any]:
    """Sums up results.

    Args:
        results: What :func:`check` returned; every problem has equally many samples.
        ks: For which k pass@k is estimated; those beyond the number of samples are left out.

    Returns:
        ``problems``, ``samples`` per problem, and ``pass@k`` per k for ``base`` and, where known, ``plus``: means over
        problems.
    """
    problems: dict[str, list[Mapping[str, Any]]] = {}
    for row in results:
        problems.setdefault(row["task_id"], []).append(row)
    samples = min(map(len, problems.values()))
    record: dict[str, Any] = {"problems": len(problems), "samples": samples}
    for name in ("base", "plus"):
        if any(row[name] is None for row in results):
            continue
        right = [sum(row[name] == "passed" for row in rows[:samples]) for rows in problems.values()]
        record[name] = {
            f"pass@{k}": sum(pass_at_k(samples, correct, k) for correct in right) / len(right)
            for k in ks
            if k <= samples
        }
    return record


def table(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """A table in Markdown, one line per model.

    Args:
        rows: Names and what :func:`summary` returned.
    """
    names = {"base": "HumanEval", "plus": "HumanEval+"}
    columns = list(dict.fromkeys((kind, k) for _, record in rows for kind in names for k in record.get(kind, {})))
    head = ["model", "problems", "samples", *(f"{names[kind]} {k}" for kind, k in columns)]
    lines = [head, ["---"] * len(head)]
    for name, record in rows:
        scores = [record.get(kind, {}).get(k) for kind, k in columns]
        cells = ["–" if score is None else f"{100 * score:.1f} %" for score in scores]
        lines.append([name, str(record["problems"]), str(record["samples"]), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
