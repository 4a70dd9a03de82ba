"""The process in which a sample runs. A script of its own: started in isolated mode, imports nothing of this package.

Reads a request from standard input (see ``sandbox.run``), takes limits upon itself, confines itself, runs the sample
and writes a verdict to the pipe that the request names. A sample that ends the process writes none.
"""

from __future__ import annotations

import copy
import json
import os
import resource
import sys
import types
from typing import Any

RTOL = 1e-7
"""Relative tolerance of floats, as in EvalPlus (``evalplus/eval/__init__.py``)."""
ATOL = 1e-6
"""Absolute tolerance where the expected value is a float and the problem has none, as there."""


def main() -> None:
    """Serves one request."""
    request = json.load(sys.stdin)
    for name, value in request["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    sys.setrecursionlimit(5000)
    if request["confined"]:
        sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
        import confine

        del sys.path[0], sys.modules["confine"]
        try:
            confine.confine(os.getcwd())
        except confine.ConfinementError as error:
            _answer(request, "unconfined", str(error))
            return
    try:
        if "inputs" in request:
            _compare(request)
        else:
            _run(request["program"])
    except BaseException as error:
        _answer(request, "failed", f"{type(error).__name__}: {error}"[:500])
    else:
        _answer(request, "passed", "")


def _answer(request: dict[str, Any], verdict: str, detail: str) -> None:
    os.write(request["pipe"], json.dumps([request["nonce"], verdict, detail]).encode())
    os._exit(0)  # nothing of the sample runs after its verdict


def _run(program: str) -> dict[str, Any]:
    module = types.ModuleType("sample")
    sys.modules["sample"] = module
    exec(compile(program, "<sample>", "exec"), module.__dict__)
    return module.__dict__


def _compare(request: dict[str, Any]) -> None:
    """Runs reference and sample on the same inputs. The reference goes first: samples cannot touch what it returned."""
    name, inputs = request["entry_point"], request["inputs"]
    reference = _run(request["reference"])
    expected = [reference[name](*copy.deepcopy(arguments)) for arguments in inputs]
    os.write(request["pipe"], b"\n")  # the sample's clock starts
    function = _run(request["program"])[name]
    for index, (arguments, wanted) in enumerate(zip(inputs, expected, strict=True)):
        found = function(*copy.deepcopy(arguments))
        if name == "find_zero":  # any root will do: EvalPlus evaluates the polynomial there
            holds = abs(reference["poly"](*arguments, found)) <= request["atol"]
        else:
            holds = _equal(found, wanted, request["atol"])
        if not holds:
            raise AssertionError(f"input {index}: returned {found!r:.80}, expected {wanted!r:.80}")


def _equal(found: Any, wanted: Any, atol: float) -> bool:
    try:
        if found == wanted:
            return True
    except Exception:
        return False
    if atol == 0 and _has_floats(wanted):
        atol = ATOL
    return atol != 0 and type(found) is type(wanted) and _close(found, wanted, atol)


def _has_floats(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return bool(value) and all(isinstance(entry, float) for entry in value)
    return isinstance(value, float)


def _close(found: Any, wanted: Any, atol: float) -> bool:
    if isinstance(wanted, list | tuple):
        return (
            isinstance(found, list | tuple)
            and len(found) == len(wanted)
            and all(_close(one, other, atol) for one, other in zip(found, wanted, strict=True))
        )
    numbers = isinstance(found, int | float) and isinstance(wanted, int | float)
    return numbers and abs(found - wanted) <= atol + RTOL * abs(wanted)


if __name__ == "__main__":
    main()
