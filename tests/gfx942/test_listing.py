"""Programs of real models for MI300X: what the compiler made of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from gfx942.builds import Build, Listing
from gfx942.claims import CLAIMS

from jax_mono.models.presets import PRESETS

Claim = Callable[[Listing], None]

# An instruct variant has the program of its base model.
BUILDS = [
    *(Build(model) for model in PRESETS if not model.endswith("-instruct")),
    *(Build("laneformer-2b", devices) for devices in (4, 2, 1)),
    Build("qwen2.5-coder-7b", 1),  # pieces of 16 chunks
    Build("smollm2-135m", topology=None),
    *(Build(model, dtype="float16") for model in ("laneformer-2b", "qwen2.5-coder-7b", "qwen3-8b", "smollm2-360m")),
]
SECOND_OPINIONS = [Build("laneformer-2b", compiler="clang-19")]


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.__name__)
@pytest.mark.parametrize("build", [*BUILDS, *SECOND_OPINIONS], ids=str)
def test_claim(listing: Listing, claim: Claim) -> None:
    claim(listing)
