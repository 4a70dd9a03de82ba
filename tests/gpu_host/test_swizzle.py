"""The resident program reads swizzled tapes as if they were not, to the last bit. On fibers."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_host.stand_in import Device
from jax.typing import DTypeLike
from kernel.common import make_decoder, some_tokens
from tiny import tiny

from jax_mono.config import ModelConfig
from jax_mono.decoder import Decoder
from jax_mono.granules import Swizzle
from jax_mono.plan import GPU
from jax_mono.record import constants_layout
from jax_mono.swizzle import swizzled
from jax_mono.topology import MI300X, AddressHash, Figure

TEXT = some_tokens(4)
CROSSING = tiny("llama", hidden_size=96)
"""Pieces of three chunks, in granules of one."""


def placed(
    config: ModelConfig,
    *,
    ways: int,
    granule: int,
    region: int,
    devices: int = 1,
    blocks: int = 8,
    dtype: DTypeLike = jnp.bfloat16,
) -> Decoder:
    """A model on so many sides, exchanged from one region of memory to the next."""
    bits = range(ways.bit_length() - 1)
    topology = dataclasses.replace(
        MI300X,
        name=f"{ways} dies",
        dies=Figure(ways, "reported"),
        io_dies=Figure(ways, "reported"),
        interleave_ways=Figure(ways, "reported"),
        granule_bytes=Figure(granule, "reported"),
        address_hash=AddressHash(tuple(granule << bit | region << bit for bit in bits), "reported"),
    )
    decoder = make_decoder(config, devices=devices, blocks=blocks, dtype=dtype, target=GPU, topology=topology)
    assert decoder.plan.placement.region_periods == region // granule // ways
    assert min(decoder.plan.tape_regions) > 1 and decoder.plan.tape_regions[0] > 5
    return decoder


def exchanged(decoder: Decoder, seed: int = 0) -> None:
    """Gives a decoder's tapes a swizzle drawn at random."""
    draw, plan = np.random.default_rng(seed), decoder.plan
    tables = [
        Swizzle(
            draw.integers(0, plan.placement.region_periods, plan.num_devices),
            draw.integers(0, len(plan.placement.pattern), (plan.num_devices, count)),
        )
        for count in plan.tape_regions
    ]
    before = np.array(decoder.tapes.layers)
    decoder.tapes = swizzled(plan, decoder.tapes, *tables)
    assert (np.asarray(decoder.tapes.layers) != before).any()


def words(decoder: Decoder) -> list[tuple[int, float]]:
    """Through prefill and the resident program; the LM head is read for some of the tokens only."""
    output = decoder.generate(TEXT, max_new_tokens=3, top_logprobs=4)
    return [(token.id, token.logprob) for step in output.top for token in step]


@pytest.mark.filterwarnings("ignore:tapes on cpu")
@pytest.mark.parametrize(
    ("config", "dtype", "ways", "granule", "region", "devices"),
    [
        (CROSSING, jnp.bfloat16, 4, 512, 8192, 1),
        (tiny("qwen3"), jnp.float16, 2, 2048, 4096, 1),  # a region is a period
        (tiny("laneformer"), jnp.bfloat16, 2, 1024, 4096, 2),
    ],
    ids=["pieces that cross into another region", "regions of one period", "two devices"],
)
def test_swizzled_tapes_are_the_same_weights(
    fibers: Device,
    monkeypatch: pytest.MonkeyPatch,
    config: ModelConfig,
    dtype: DTypeLike,
    ways: int,
    granule: int,
    region: int,
    devices: int,
) -> None:
    monkeypatch.setenv("FIBER_DIES", "3,1,0,2")
    decoder = placed(
        config, ways=ways, granule=granule, region=region, devices=devices, blocks=8 // devices, dtype=dtype
    )
    usual = words(decoder)
    for seed in range(3):
        exchanged(decoder, seed)
        assert words(decoder) == usual


MUTANTS = {
    "the table": ("simt/set_course.h", "u32(swizzle[1 + first + i]) % u32(Shape::period)", "0u"),
    "the region after a piece's first": ("simt/walk.h", "byte < left_ ? 0 : change_", "0"),
    "where in a region tapes begin": ("simt/set_course.h", "return period % arch::kRegionPeriods", "return 0"),
    "where in a region the array begins": ("simt/set_course.h", "u32(swizzle[0])", "0u"),
    "the head's own part": ("simt/walk.h", "(head ? kLayersRegions : 0)", "0"),
}


@pytest.mark.filterwarnings("ignore:tapes on cpu")
@pytest.mark.parametrize("vocab", range(160, 160 + 8 * len(MUTANTS), 8), ids=MUTANTS)
def test_a_kernel_that_ignores_a_part_of_it_is_noticed(
    fibers: Device, kernels: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, vocab: int
) -> None:
    name, right, wrong = list(MUTANTS.values())[(vocab - 160) // 8]
    changed = tmp_path / "kernels"
    shutil.copytree(kernels, changed)
    source = changed / "kernel" / name
    assert source.read_text().count(right) == 1
    source.write_text(source.read_text().replace(right, wrong))
    monkeypatch.setenv("JAX_MONO_KERNELS", str(changed))
    monkeypatch.setenv("FIBER_DIES", "3,1,0,2")
    # A plan that no other test has: a process keeps its programs by their plans.
    decoder = placed(CROSSING.replace(vocab_size=vocab), ways=4, granule=512, region=8192)
    usual = words(decoder)
    exchanged(decoder)
    assert words(decoder) != usual


@pytest.mark.filterwarnings("ignore:tapes on cpu")
def test_a_piece_must_not_reach_beyond_the_next_region(fibers: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = placed(tiny("llama"), ways=4, granule=512, region=2048)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a piece of 1024 weights must reach no farther than the next"):
        decoder.score(TEXT)


@pytest.mark.filterwarnings("ignore:tapes on cpu")
def test_no_table_leads_out_of_the_tapes(fibers: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIBER_DIES", "3,1,0,2")
    decoder = placed(tiny("llama"), ways=4, granule=512, region=8192)
    usual = decoder.score(TEXT).logprobs
    first = constants_layout(decoder.plan)["layers_swizzle"]
    constants = decoder.tapes.constants.at[:, first:].add(4.0e6)  # a multiple of region and period
    decoder.tapes = dataclasses.replace(decoder.tapes, constants=constants)
    np.testing.assert_array_equal(decoder.score(TEXT).logprobs, usual)
