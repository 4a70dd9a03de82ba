"""Two problems in the formats of HumanEval and HumanEval+."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

ADD = {
    "task_id": "Toy/0",
    "prompt": 'def add(a, b):\n    """ a + b\n    """\n',
    "entry_point": "add",
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
}
HALF = {
    "task_id": "Toy/1",
    "prompt": "def half(x):\n",
    "entry_point": "half",
    "canonical_solution": "    return x / 2\n",
    "test": "def check(candidate):\n    assert abs(candidate(3) - 1.5) < 1e-3\n",
}
INPUTS = {
    "Toy/0": {"base_input": [[1, 2]], "plus_input": [[-1, 1], [10**30, 1]], "atol": 0},
    "Toy/1": {"base_input": [[3]], "plus_input": [[1.0], [7]], "atol": 0},
}


def write_problems(directory: Path) -> tuple[Path, Path]:
    """Writes both files, the second compressed."""
    rows = (ADD, HALF)
    base, plus = directory / "problems.jsonl", directory / "plus.jsonl.gz"
    base.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plus.write_bytes(gzip.compress("".join(json.dumps(row | INPUTS[row["task_id"]]) + "\n" for row in rows).encode()))
    return base, plus
