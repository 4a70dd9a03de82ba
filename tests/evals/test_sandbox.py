"""The sandbox: right is told from wrong, and what a sample may not do fails."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jax_mono.evals import confine, sandbox
from jax_mono.evals.sandbox import Limits, SandboxError, Verdict

LIMITS = Limits(seconds=20.0)
confined = pytest.mark.skipif(confine.landlock_version() == 0, reason="this kernel has no Landlock")


def run(program: str, **limits: object) -> Verdict:
    return sandbox.run({"program": program}, Limits(**({"seconds": 20.0} | limits)))


@confined
@pytest.mark.parametrize(
    ("program", "status", "word"),
    [
        ("import math, threading\nthreading.Thread(target=print).start()\nassert math.pi > 3", "passed", ""),
        ("open('own', 'w').write('x')", "passed", ""),
        ("assert 1 == 2, 'no'", "failed", "AssertionError: no"),
        ("def f(:", "failed", "SyntaxError"),
        ("raise SystemExit(0)", "failed", "SystemExit"),
        ("import os\nos._exit(0)", "died", "without a verdict"),
        ("import ctypes\nctypes.string_at(0)", "died", "without a verdict"),
        ("input()", "failed", "EOFError"),
        ("x = bytearray(4 << 30)", "failed", "MemoryError"),
        ("open('own', 'wb').write(bytes(9 << 20))", "failed", "OSError"),
        ("import socket\nsocket.socket()", "failed", "PermissionError"),
        ("import os\nos.fork()", "failed", "PermissionError"),
        ("import subprocess\nsubprocess.run(['true'])", "failed", "PermissionError"),
        ("import os\nos.kill(os.getppid(), 9)", "failed", "PermissionError"),
        ("import os\nassert not {'PYTHONPATH', 'XLA_FLAGS'} & set(os.environ)", "passed", ""),
    ],
)
def test_what_a_sample_may_do(program: str, status: str, word: str) -> None:
    verdict = run(program)
    assert verdict.status == status, verdict
    assert word in verdict.detail


@confined
def test_files_elsewhere_stay_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "mine"
    file.write_text("untouched")
    for program in (
        f"open({str(file)!r}, 'w')",
        f"import os\nos.remove({str(file)!r})",
        f"import os\nos.chmod({str(file)!r}, 0)",
        f"import os\nos.rename({str(file)!r}, 'mine')",
        f"import os\nos.mkdir({str(tmp_path / 'new')!r})",
        f"import os\nos.truncate({str(file)!r}, 0)",
    ):
        assert run(program).status == "failed", program
    assert file.read_text() == "untouched" and os.listdir(tmp_path) == ["mine"]


@confined
def test_time_is_up() -> None:
    verdict = run("while True: pass", seconds=1.0)
    assert verdict.status == "timeout" and 1.0 <= verdict.seconds < 10.0


@confined
def test_what_a_sample_prints_is_no_verdict() -> None:
    assert run("import os\nfor fd in range(1, 60):\n try: os.write(fd, b'[null, \"passed\", \"\"]')\n"
               " except OSError: pass\nos._exit(0)").status == "died"  # fmt: skip


def compare(program: str, reference: str, inputs: list, atol: float = 0.0) -> str:
    request = {"program": program, "reference": reference, "entry_point": "f", "inputs": inputs, "atol": atol}
    return sandbox.run(request, LIMITS).status


@confined
def test_comparing_with_a_reference() -> None:
    half = "def f(x): return x / 2"
    assert compare("def f(x): return x * 0.5", half, [[1], [3]]) == "passed"
    assert compare("def f(x): return x // 2", half, [[2], [3]]) == "failed"
    assert compare("def f(x): return x / 2 + 1e-9", half, [[2]]) == "passed"  # floats: 1e-6 unless told otherwise
    assert compare("def f(x): return x / 2 + 1e-5", half, [[2]]) == "failed"
    assert compare("def f(x): return x / 2 + 1e-5", half, [[2]], atol=1e-4) == "passed"
    assert compare("def f(x): return [x[0] + 1e-9]", "def f(x): return [float(x[0])]", [[[1]]]) == "passed"
    assert compare("def f(x): return 1", "def f(x): return '1'", [[0]]) == "failed"
    # Neither sees what the other did to its arguments.
    assert compare("def f(x): return sum(x)", "def f(x):\n s = sum(x)\n x.clear()\n return s", [[[1, 2]]]) == "passed"


def test_a_kernel_that_cannot_confine_is_an_error_with_a_remedy(monkeypatch, tmp_path: Path) -> None:
    child = Path(sandbox.__file__).with_name("sandbox_child.py").read_text()
    (tmp_path / "child.py").write_text(child)
    (tmp_path / "confine.py").write_text(
        "class ConfinementError(RuntimeError): pass\ndef confine(directory): raise ConfinementError('no Landlock')\n"
    )
    monkeypatch.setattr(sandbox, "_CHILD", tmp_path / "child.py")
    with pytest.raises(SandboxError, match=r"no Landlock.*--unconfined"):
        run("pass")
    assert run("pass", confined=False).status == "passed"
