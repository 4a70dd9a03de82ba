"""Random and chosen models and machine shapes, for tests of plans, tapes and hand-offs."""

from __future__ import annotations

from hypothesis import strategies as st

from jax_mono.config import Lanes, ModelConfig
from jax_mono.plan import Plan, TileFormat, make_plan

TILE = TileFormat()


@st.composite
def dense_configs(draw: st.DrawFn) -> ModelConfig:
    """Dense models of odd sizes: any number of heads, widths that fill no whole tile or chunk."""
    family = draw(st.sampled_from(["llama", "qwen2", "qwen3"]))
    kv_heads = draw(st.integers(1, 5))
    return ModelConfig(
        family=family,
        vocab_size=draw(st.integers(57, 200)),
        hidden_size=draw(st.integers(9, 170)),
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
        hidden_size=draw(st.integers(9, 100)),
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
    """A plan for 1 to 8 devices of 1 to 20 blocks, as many as the model has tiles of hidden rows."""
    if draw(st.booleans()):
        config, devices = draw(dense_configs()), draw(st.sampled_from([1, 2, 3, 4, 8]))
    else:
        config, devices = draw(laneformer_configs()), draw(st.sampled_from([1, 2, 4, 8]))
    blocks = draw(st.integers(1, min(20, TILE.row_tiles(config.hidden_size))))
    return make_plan(config, devices=devices, blocks=blocks, kv_splits=draw(st.sampled_from([None, None, 1, 3])))
