"""Presets are the published models."""

from __future__ import annotations

import jax
import pytest

from jax_mono.config import ConfigError
from jax_mono.models import PRESETS, abstract_params, preset

# As published: sizes of the released weights, a tied embedding counted once.
PARAMETERS = {
    "laneformer-2b": 2_320_069_632,
    "llama-2-7b": 6_738_415_616,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "qwen2.5-coder-0.5b": 494_032_768,
    "qwen2.5-coder-1.5b": 1_543_714_304,
    "qwen2.5-coder-3b": 3_085_938_688,
    "qwen2.5-coder-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}


def test_every_preset_has_a_published_size() -> None:
    assert {name.removesuffix("-instruct") for name in PRESETS} == set(PARAMETERS)


@pytest.mark.parametrize("name", PRESETS)
def test_number_of_parameters(name: str) -> None:
    assert preset(name).num_parameters == PARAMETERS[name.removesuffix("-instruct")]


@pytest.mark.parametrize("name", ["laneformer-2b", "qwen2.5-coder-0.5b", "qwen3-0.6b", "smollm2-135m"])
def test_modules_have_that_many_parameters_too(name: str) -> None:
    leaves = jax.tree.leaves(abstract_params(preset(name)))
    assert sum(leaf.size for leaf in leaves) == PARAMETERS[name]


def test_laneformer_2b() -> None:
    config = preset("Laneformer-2B")
    assert config.lanes is not None and (config.lanes.count, config.lanes.delay) == (8, 2)
    assert config.sliding_windows == (512,) * 10 + (0,) * 5
    assert config.rope_interleaved and not config.tie_word_embeddings


@pytest.mark.parametrize("name", [name for name in PRESETS if name.endswith("-instruct")])
def test_instruct_variants_differ_in_special_tokens_only(name: str) -> None:
    instruct, base = preset(name), preset(name.removesuffix("-instruct"))
    assert instruct.eos_token_ids != base.eos_token_ids
    assert instruct.replace(bos_token_id=base.bos_token_id, eos_token_ids=base.eos_token_ids) == base


def test_unknown_names_get_a_hint() -> None:
    with pytest.raises(ConfigError, match=r"no preset 'llama3\.2-1b'; did you mean .*llama-3\.2-1b"):
        preset("llama3.2-1b")
    with pytest.raises(ConfigError, match=r"known: .*laneformer-2b"):
        preset("???")
