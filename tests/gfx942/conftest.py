"""Compilers, and the programs that the selected tests want."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator

import pytest
from gfx942.builds import Build, Builds, Listing


def why_not(compiler: str) -> str:
    """Why a compiler cannot be used here; empty if it can."""
    if compiler == "ziglang":
        found = importlib.util.find_spec("ziglang") is not None
        return "" if found else "no compiler for gfx942: pip install ziglang"
    version = compiler.removeprefix("clang")
    missing = [tool for tool in (compiler, f"ld.lld{version}") if shutil.which(tool) is None]
    return f"no {' and no '.join(missing)}: apt-get install {compiler} lld{version}" if missing else ""


@pytest.fixture(scope="session")
def builds(request: pytest.FixtureRequest) -> Iterator[Builds]:
    values = [
        value for item in request.session.items if hasattr(item, "callspec") for value in item.callspec.params.values()
    ]
    wanted = dict.fromkeys(value for value in values if isinstance(value, Build))
    builds = Builds(build for build in wanted if not why_not(build.compiler))
    yield builds
    builds.close()


@pytest.fixture
def listing(builds: Builds, build: Build) -> Listing:
    """The program of a parameter named ``build``."""
    if why := why_not(build.compiler):
        pytest.skip(why)
    return builds[build]
