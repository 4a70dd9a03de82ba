"""Random and chosen models and machine shapes, for tests of plans, tapes and hand-offs."""

from __future__ import annotations

import dataclasses

from hypothesis import strategies as st

from jax_mono.config import Lanes, ModelConfig
from jax_mono.plan import CPU, GPU, Plan, TileFormat, make_plan
from jax_mono.topology import MI300X, Figure, Topology

TILE = TileFormat()
MOST_BLOCKS = {"cpu": 20, "gpu": 132}
"""By target; an H100 has 132 multiprocessors."""


def dies(count: int, sides: int) -> Topology:
    """A device of that many dies, each with room for all blocks that tests use."""
    return dataclasses.replace(
        MI300X,
        name=f"{count} dies",
        dies=Figure(count, "reported"),
        units_per_die=Figure(MOST_BLOCKS["gpu"], "reported"),
        io_dies=Figure(sides, "reported"),
    )


SEVERAL_DIES = (dies(2, 1), dies(2, 2), dies(3, 3), dies(4, 2), dies(8, 4))


def widths(usual: int) -> st.SearchStrategy[int]:
    """Hidden sizes: small ones, and some with a tile for each of the most blocks there are."""
    return st.one_of(st.integers(9, usual), st.integers(9, usual), st.integers(8 * 131 + 1, 8 * 140))


@st.composite
def dense_configs(draw: st.DrawFn) -> ModelConfig:
    """Dense models of odd sizes: any number of heads, widths that fill no whole tile or chunk."""
    family = draw(st.sampled_from(["llama", "qwen2", "qwen3"]))
    kv_heads = draw(st.integers(1, 5))
    return ModelConfig(
        family=family,
        vocab_size=draw(st.integers(57, 200)),
        hidden_size=draw(widths(170)),
        intermediate_size=draw(st.integers(8, 300)),
        num_layers=draw(st.integers(1, 3)),
        num_heads=kv_heads * draw(st.integers(1, 4)),
        num_kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 6)),
        max_position_embeddings=64,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        tie_word_embeddings=draw(st.booleans()),
    )


@st.composite
def laneformer_configs(draw: st.DrawFn) -> ModelConfig:
    """Laneformers with 8 lanes."""
    kv_heads = 8 * draw(st.integers(1, 2))
    return ModelConfig(
        family="laneformer",
        vocab_size=8 * draw(st.integers(8, 20)),
        hidden_size=draw(widths(100)),
        intermediate_size=8 * draw(st.integers(1, 40)),
        num_layers=draw(st.integers(1, 3)),
        num_heads=kv_heads * draw(st.integers(1, 3)),
        num_kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 4)),
        max_position_embeddings=64,
        rope_interleaved=True,
        tie_word_embeddings=draw(st.booleans()),
        lanes=Lanes(count=8, head=draw(st.sampled_from(["mean_of_norms", "norm_of_sum", "per_lane"]))),
    )


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """A plan of either target for 1 to 8 devices, with at most as many blocks as the model has tiles of hidden rows.

    GPUs may have several dies.
    """
    if draw(st.booleans()):
        config, devices = draw(dense_configs()), draw(st.sampled_from([1, 2, 3, 4, 8]))
    else:
        config, devices = draw(laneformer_configs()), draw(st.sampled_from([1, 2, 4, 8]))
    target = draw(st.sampled_from([CPU, GPU]))
    blocks = draw(st.integers(1, min(MOST_BLOCKS[target.name], TILE.row_tiles(config.hidden_size))))
    splits = draw(st.sampled_from([None, None, 1, 3]))
    topology = draw(st.sampled_from([None, *SEVERAL_DIES])) if target is GPU else None
    return make_plan(config, devices=devices, blocks=blocks, target=target, kv_splits=splits, topology=topology)
