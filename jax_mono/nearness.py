"""Nearness: how much of what the blocks of a device hand each other for attention stays within a die, or on a side."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jax_mono.flow import Flow
from jax_mono.handoffs import exchange, writers
from jax_mono.plan import Plan


@dataclass(frozen=True)
class Nearness:
    """Words of query, key and value rows, counted once for every block that reads them.

    Attributes:
        words: All that are read on all devices in one layer, on average over the positions of a full cache.
        die: Fraction of them whose reader belongs on the writer's die.
        side: Fraction of them whose reader belongs on the writer's side.
    """

    words: float
    die: float
    side: float


def attention_nearness(plan: Plan) -> Nearness:
    """Counts the hand-offs from the blocks that multiply a head's rows to those that hold its positions."""
    placement, splits = plan.placement, plan.kv_splits
    dies = np.array([placement.die_of(block) for block in range(plan.num_blocks)])
    sides = np.array([placement.side_of(block) for block in range(plan.num_blocks)])
    words = same_die = same_side = 0.0
    for device in range(plan.num_devices):
        written_by = np.empty(exchange(plan, device).channels["qkv"].words, np.int64)
        for _, block, run in writers(plan, device, "qkv"):
            written_by[run] = block
        flow, homes = Flow(plan, device), _homes(plan, device)
        for head, readers in homes.items():
            queries, all_rows = (flow.head_words(head, owner) for owner in (False, True))
            weight = np.full(len(all_rows), 1 / splits)  # keys and values: one split holds the position
            weight[np.isin(all_rows, queries)] = 1
            writing = written_by[all_rows]
            words += weight.sum() * len(readers)
            same_die += sum(weight[dies[writing] == dies[block]].sum() for block in readers)
            same_side += sum(weight[sides[writing] == sides[block]].sum() for block in readers)
    return Nearness(words, same_die / words if words else 1.0, same_side / words if words else 1.0)


def _homes(plan: Plan, device: int) -> dict[int, list[int]]:
    """Per KV head of a device, the block of each of its splits."""
    homes: dict[int, list[int]] = {}
    for block, items in enumerate(plan.devices[device].attention):
        for item in range(items.first, items.stop):
            homes.setdefault(item // plan.kv_splits, []).append(block)
    return homes
