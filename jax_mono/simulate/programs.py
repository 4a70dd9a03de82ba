"""What the simulator must know of a program: how it reads hand-offs, and how much code it runs around them.

Instructions are those on the way of a warp or wave, without what is not taken: slow paths of divisions, calls of waits,
traces.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal


@dataclass(frozen=True)
class Work:
    """What a block does around a hand-off, beside waiting.

    Attributes:
        barriers: Barriers of the block after the words have come, those of reductions included.
        code: Instructions from then to the end of the stage's input.
        early: Instructions between what came before and the first look; the words travel meanwhile.
        each: Instructions beside ``code`` for each split whose part is joined; 0 where ``code`` has them.
    """

    barriers: int
    code: int = 0
    early: int = 0
    each: int = 0


@dataclass(frozen=True)
class Program:
    """How a program reads hand-offs, and how much code it runs.

    Attributes:
        name: For tables.
        threads: Of a block that read.
        warp: Threads that poll together.
        batch: Words that a thread asks for before it looks at the first, by channel; others take ``usual_batch``.
        usual_batch: The same for other channels.
        polls: ``together``: a thread asks again for all words that are not there. ``last``: it waits for the last of
            them, then asks for all again.
        pause_ns: Between two polls.
        clusters: Blocks that share the polls of a hand-off among them.
        work: By channel, what belongs to a receive.
        code: By channel, instructions that make the words which are published there; of an inbox for each peer, or none
            where the next receive has them.
        product_barriers: Barriers of a product.
        kv_positions: Positions whose keys and values a block asks for at once; 0 for a program without arithmetic,
            which does not read them, looks up no embedding and does not ask the host.
        kv_code: Instructions for each further so many positions, which wait for their keys and values.
        cached: Whether a layer's code stays in an instruction cache. What is fetched takes longer under load.
        late_sums: Whether delayed sums are taken in after the product, not before it.
    """

    name: str
    threads: int
    warp: int
    batch: MappingProxyType[str, int]
    usual_batch: int
    polls: Literal["together", "last"]
    pause_ns: float
    clusters: int = 1
    work: MappingProxyType[str, Work] = field(default_factory=lambda: MappingProxyType({}))
    code: MappingProxyType[str, int] = field(default_factory=lambda: MappingProxyType({}))
    product_barriers: int = 0
    kv_positions: int = 0
    kv_code: int = 0
    cached: bool = False
    late_sums: bool = False

    @property
    def computes(self) -> bool:
        """Whether it computes anything, or only moves weights and words."""
        return self.kv_positions > 0


_ALL = 1 << 20

# Instructions on the way of a warp, counted in the machine code of laneformer-2b's plan of 4 devices of 32 blocks
# (nvdisasm with line numbers), without what is not taken: slow paths of divisions, calls of waits, traces. To a
# tenth in layers; which paths sampling takes is an estimate.
_WORK = MappingProxyType(
    {
        "residual_attention": Work(3, code=246, early=318),  # pushed sums, addresses, the norm's scale; then the norm
        "residual_mlp": Work(3, code=246, early=315),
        "qkv": Work(2, code=80, early=280),  # keys and values of the first positions are asked for early
        "attention": Work(4, code=280, early=75),
        "activation": Work(1, code=193, early=42),
        "inbox_attention": Work(0, code=55, early=75),  # of one warp, as if the others waited for it
        "inbox_mlp": Work(0, code=55, early=75),
        "final_inbox": Work(1, code=320, early=360),
        "final_sum": Work(3, code=246, early=178),
        "summary": Work(4, code=580, early=40),
        "logits": Work(12, code=2500),
        "choice": Work(0),
    }
)

RESIDENT = Program(
    "resident program",
    threads=256,
    warp=32,
    batch=MappingProxyType(
        {"residual_attention": _ALL, "residual_mlp": _ALL, "final_sum": _ALL, "activation": 2, "qkv": 1}
    ),
    usual_batch=4,
    polls="last",
    pause_ns=32,
    work=_WORK,
    code=MappingProxyType(
        {
            "qkv": 70,
            "attention": 430,
            "residual_attention": 90,
            "activation": 165,
            "residual_mlp": 90,
            "final_sum": 60,
            "summary": 700,
        }
    ),
    product_barriers=2,
    kv_positions=64,  # two rounds of 32
    kv_code=620,
)
"""ffi/kernel as it is on Hopper: Link::wait_for and read, hold_and_store, o_stage, attend."""

# The same on the way of a wave of gfx942, laneformer-2b's plan of 8 devices of 304 blocks, as printed by
# `python -m jax_mono.gfx942.handoff_code`; at position 48, where four splits are joined.
_GFX942_WORK = {
    "residual_attention": Work(2, code=442, early=357),
    "residual_mlp": Work(2, code=443, early=359),
    "qkv": Work(2, code=91, early=401),
    "attention": Work(1, code=105, early=431, each=14),
    "activation": Work(1, code=216, early=97),
    "inbox_attention": Work(0, code=170, early=283),
    "inbox_mlp": Work(0, code=170, early=283),
    # Before it, lane_inverses receives a residual_mlp, with which it does less than others.
    "final_inbox": Work(1, code=233, early=632 + 113 - 443),
    "final_sum": Work(2, code=286, early=125),
    "summary": Work(4, code=1228, early=207),
}

GFX942 = dataclasses.replace(
    RESIDENT,
    threads=512,
    warp=64,
    work=MappingProxyType({**_WORK, **_GFX942_WORK}),
    code=MappingProxyType(
        {
            "qkv": 108,
            "attention": 684,
            "residual_attention": 135,
            "activation": 252,
            "residual_mlp": 135,
            "final_sum": 100,
            "summary": 1316,
            "inbox_attention": 46,
            "inbox_mlp": 46,
        }
    ),
    kv_positions=128,
    kv_code=580,
    cached=True,  # 42 of 64 KB
)
"""The resident program on MI300X. What a choice from all logits runs was not counted."""

SKELETON = Program(
    "skeleton",
    threads=512,
    warp=32,
    batch=MappingProxyType({}),
    usual_batch=_ALL,
    polls="together",
    # All threads must have the vector before the product, and all warps the product before it is published.
    work=MappingProxyType(dict.fromkeys(_WORK, Work(1))),
    product_barriers=1,
    pause_ns=100,
    clusters=2,
    late_sums=True,
)
"""Throw-away programs that moved the real bytes in the real order and computed nothing: no norms, no softmax. Their
code was short enough to stay in the caches."""
