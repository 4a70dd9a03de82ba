"""Blocks find out where they are: which of the plan's they become, wherever hardware puts them. On fibers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_host.stand_in import Device
from jax.typing import DTypeLike
from kernel.common import make_decoder, some_tokens
from tiny import tiny

from jax_mono.plan import GPU
from jax_mono.topology import MI300X, Figure

TEXT = some_tokens(4)
TWO, THREE = Figure(2, "reported"), Figure(3, "reported")
THREE_DIES = dataclasses.replace(MI300X, name="three dies", dies=THREE, units_per_die=TWO, io_dies=THREE)
ROUND_ROBIN = "0,1,2"
PLACES = {
    "round robin": ROUND_ROBIN,
    "backwards": "2,2,1,1,0,0",
    "crowded": "2,1,2,1,1,2",
    "all on one": "1",
    "a die that the plan does not know": "3,4,2",
}


@pytest.fixture(scope="module")
def usual() -> dict[int, np.ndarray]:
    """Logits with blocks where they belong, by number of devices; whoever needs them first fills them in."""
    return {}


def scores(monkeypatch: pytest.MonkeyPatch, places: str, *, devices: int = 1) -> np.ndarray:
    monkeypatch.setenv("FIBER_DIES", places)
    decoder = make_decoder(
        tiny("llama"), devices=devices, blocks=6 // devices, dtype=jnp.bfloat16, target=GPU, topology=THREE_DIES
    )
    logits = decoder.score(TEXT, logits=True).logits
    assert logits is not None
    return logits


def claimed(path: Path) -> list[tuple[int, ...]]:
    """Device, launched as, die, block."""
    return [tuple(int(word) for word in line.split()) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_every_block_of_the_plan_is_claimed_once_wherever_blocks_are(
    fibers: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, usual: dict[int, np.ndarray], places: str
) -> None:
    if 1 not in usual:
        usual[1] = scores(monkeypatch, ROUND_ROBIN)
    monkeypatch.setenv("FIBER_ROLES", str(tmp_path / "roles"))
    assert np.array_equal(scores(monkeypatch, places), usual[1])
    claims = claimed(tmp_path / "roles")
    assert sorted(block for *_, block in claims) == list(range(6))
    assert sorted(launched for _, launched, *_ in claims) == list(range(6))
    for die in range(3):  # two blocks belong on each: as many of them as are there are its own
        there = [block for _, _, own, block in claims if own % 3 == die]
        assert sum(block // 2 == die for block in there) == min(2, len(there))


def test_each_device_deals_its_own_blocks(fibers: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usual = scores(monkeypatch, ROUND_ROBIN, devices=2)
    monkeypatch.setenv("FIBER_ROLES", str(tmp_path / "roles"))
    assert np.array_equal(scores(monkeypatch, "2,2,1", devices=2), usual)
    roles = sorted((device, block) for device, _, _, block in claimed(tmp_path / "roles"))
    assert roles == [(device, block) for device in range(2) for block in range(3)]


def test_a_block_that_never_starts_ends_the_call(fibers: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_MONO_WAIT_LIMIT_MS", "1000")
    with pytest.raises(jax.errors.JaxRuntimeError, match="not all blocks of device 0 started within 1000 ms"):
        scores(monkeypatch, "0,0,0,1,2,-")


@pytest.mark.parametrize(
    ("family", "dtype", "granule_bytes", "pattern"),
    [
        ("qwen3", jnp.float16, 2048, (0, 0, 1, 1)),
        ("laneformer", jnp.bfloat16, 4096, (1, 0, 0, 1)),
    ],
)
def test_tapes_in_granules_are_the_same_weights(
    fibers: Device,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    dtype: DTypeLike,
    granule_bytes: int,
    pattern: tuple[int, ...],
) -> None:
    """Through prefill and the resident program; the LM head is read for some of the tokens only."""
    monkeypatch.setenv("FIBER_DIES", "1,0")
    granule = Figure(granule_bytes, "reported")
    topology = dataclasses.replace(THREE_DIES, dies=TWO, io_dies=TWO, granule_bytes=granule)
    found = []
    for chosen in (pattern, (0,)):
        decoder = make_decoder(tiny(family), blocks=4, dtype=dtype, target=GPU, topology=topology, pattern=chosen)
        assert decoder.plan.placement.pattern == chosen
        output = decoder.generate(TEXT, max_new_tokens=3, top_logprobs=4)
        found.append([(token.id, token.logprob) for step in output.top for token in step])
    assert found[0] == found[1]


def test_a_cpu_has_its_tapes_in_one_piece() -> None:
    topology = dataclasses.replace(THREE_DIES, dies=TWO, io_dies=TWO)
    decoder = make_decoder(tiny("llama"), blocks=4, dtype=jnp.bfloat16, target=GPU, topology=topology, pattern=(0, 1))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"the plan's tapes take turns in memory.*without a topology"):
        decoder.score(TEXT)
