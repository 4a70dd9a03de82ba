"""The API against its own description: whatever is sent, the answer is one that the description knows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from serve.conftest import serving
from serve.synthetic import SyntheticDecoder

from jax_mono.serve.service import Limits

# Whether a request that follows the schema fits into the context, no schema can say.
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,"
    "negative_data_rejection,missing_required_header,unsupported_method"
)


def test_schemathesis_finds_nothing(tmp_path: Path) -> None:
    pytest.importorskip("schemathesis")
    with serving(SyntheticDecoder(rate=1e6, context=512), limits=Limits(deadline_s=20)) as served:
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"{served.url}/openapi.json"]
        command += ["-u", served.url, "--checks", CHECKS, "-n", "12", "--max-time", "15", "--seed", "1"]
        command += ["--phases", "coverage,fuzzing"]
        ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
        assert "/v1/completions" in httpx.get(f"{served.url}/openapi.json").text
        assert served.post("completions", prompt="a", max_tokens=2).status_code == 200


def test_whole_numbers_may_be_written_with_a_point() -> None:
    with serving(SyntheticDecoder(rate=1e6)) as served:
        body = {"prompt": "a", "max_tokens": 3.0, "n": 2.0, "seed": 1.0, "stop_token_ids": [300.0]}
        assert served.post("completions", **body).json()["usage"]["completion_tokens"] == 6
        assert served.post("completions", prompt="a", max_tokens=3.5).status_code == 400
        assert served.post("completions", prompt="a", max_tokens="3").status_code == 400
        assert served.post("completions", prompt="a", n=True).status_code == 400
