"""Instructions of a program for gfx942 between hand-offs, as :mod:`jax_mono.simulate.programs` has them.

``python -m jax_mono.gfx942.handoff_code --help``. The compiler says what instructions were made of and which loops they
lie in (:mod:`jax_mono.gfx942.lines`). Told here, by the text of source lines: what belongs to which hand-off, how often
loops go round, and what is not taken.
"""

from __future__ import annotations

import argparse
import functools
import math
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from jax_mono import gpus
from jax_mono.cli import options
from jax_mono.cli.models import find_config
from jax_mono.cut import default_blocks
from jax_mono.flow import Visible
from jax_mono.gfx942.lines import WITH_LINES, Block, blocks, statements
from jax_mono.gfx942.toolchain import COMPUTE_UNITS, Toolchain, assembly, sizes, ziglang
from jax_mono.plan import GPU, Plan, make_plan
from jax_mono.topology import MI300X

_THREADS, _LANES, _BATCH = 512, 64, 8

_LAYER = re.compile(r"(qkv|attention|o|up|down|mix)_stage\(|past_sums\(")
_PARTS = (  # the first that fits the lines on an instruction's way
    ("product", r"product<kStage>\(s,(?!.*receive\(\);)"),
    ("receive residual_mlp", r"qkv_stage\(.*norm_input\("),
    ("publish qkv", r"qkv_stage\("),
    ("publish attention", r"attention_stage\(.*(attend\(s,|publish\(h,|attention_payload\()"),
    ("receive qkv", r"attention_stage\("),
    ("receive attention", r"o_stage\("),
    ("receive residual_attention", r"up_stage\(.*norm_input\("),
    ("publish activation", r"up_stage\("),
    ("receive activation", r"down_stage\("),
    ("push", r"mix_stage\(.*!immediate\) push_sums\("),
    ("publish residual", r"mix_stage\(.*mix_rows\("),
    ("receive inbox", r"past_sums\("),
    ("receive lanes", r"head_stage\(.*lane_inverses\("),
    ("receive final_sum", r"head_stage\(.*norm_words\("),
    ("publish final_sum", r"head_stage\(.*sum_lanes\(.*publish\(h,"),
    ("receive final_inbox", r"head_stage\(.*sum_lanes\("),
    ("publish summary", r"publish_summary\("),
    ("receive summary", r"sample_stage\(.*return read_summaries\("),
)
_NOT_TAKEN = re.compile(  # in layers after the first, with delayed sums, and by a greedy choice
    r"norm_embedding\(|if \(pushed\) push|take_sums\(s, layer, module|philox\(|gumbel\(|token == target"
    r"|/ r\.(repetition_penalty|temperature)|logits_(run|tag|at)|channels\[peer\]\.logits"
)
_ROUNDS = "take<kAhead>("
_LATE = re.compile(r"join_parts\(.*(swapped|exp_below|of_lane|from_float|joined|highest|factor|unpack\(words)")
"""Lies before the call of a wait, and is run after it."""


@dataclass(frozen=True)
class Count:
    """What a program runs.

    Attributes:
        instructions: Of a wave that has something to do everywhere, by part: what it does to ``publish`` or ``receive``
            a channel, the latter without ``early``, which is before the first look; ``push``: sums to other devices;
            ``rounds``: two rounds of attention after the first; ``product``: its loops once.
        layer_bytes: Of the code of a layer.
        taken_bytes: Of that, without what is not taken.
        end_bytes: Taken once per token, after the last layer.
        all_bytes: Of the kernel.
    """

    instructions: dict[str, int]
    layer_bytes: int
    taken_bytes: int
    end_bytes: int
    all_bytes: int


def trips(plan: Plan, position: int) -> tuple[tuple[str, int], ...]:
    """How often loops go round, by what they were made of; others do once."""
    splits, group = len(Visible.of(plan, 0, position).splits), plan.config.queries_per_kv
    waves = _THREADS // _LANES
    return (
        (r"publish_summary\(.*peer < s\.header\.num_devices", plan.num_devices),
        (r"peer < s\.header\.num_devices", plan.num_devices - 1),
        (r"done < kBatches", math.ceil(splits / _BATCH)),
        (r"i < kSharers", 2 * waves // math.ceil(group / 2) // 4),
        (r"combined\(value, kWarp, op", int(math.log2(_LANES))),
        (r"combined\(.*, kWarps, op", int(math.log2(waves))),
        (r"for_each\(blocks, \[&\]\(i32 b\)", math.ceil(plan.num_devices * plan.num_blocks / _THREADS)),
    )


def listed(plan: Plan, dtype: str, toolchain: Toolchain) -> list[Block]:
    """Compiles a plan's program and takes it apart."""
    listing = assembly(plan, dtype, toolchain, options=WITH_LINES)
    return blocks(listing, sizes(listing, toolchain), gpus.kernel_sources())


def count(found: Sequence[Block], plan: Plan, *, position: int = 48) -> Count:
    """Counts what a token of a program runs.

    Args:
        found: The program, :func:`listed`.
        plan: Of the same program.
        position: Of the token: attention joins as many parts as chunks of positions are visible.
    """
    rules, loops = trips(plan, position), statements(found)

    def of(said: str) -> int:
        return next((times for text, times in rules if re.search(text, said)), 1)

    rounds = {loop: max(of(said) for said in texts) for loop, texts in loops.items()}
    sums: Counter[str] = Counter()
    looked: set[str] = set()  # receives whose first look is behind
    layer = taken = end = 0.0
    for block in found:
        often = math.prod(rounds.get(loop, 1) for loop in block.loops)
        for _, way in block.lines:
            said, each = " ".join(way), block.size / len(block.lines)
            part, in_layer, is_taken = _place(said)
            layer += each * in_layer
            if block.waits:
                looked.add(part)
            elif part and is_taken:
                taken += each * in_layer
                end += each * (not in_layer)
                if _ROUNDS in said:
                    sums["rounds"] += often
                    continue
                early = part.startswith("receive") and part not in looked and not _LATE.search(said)
                sums[f"{part} early" if early else part] += often * _share(said, plan)
    made = {part: round(sums[part]) for part in sums}
    return Count(made, round(layer), round(taken), round(end), sum(block.size for block in found))


@functools.lru_cache(maxsize=1 << 15)
def _place(said: str) -> tuple[str, bool, bool]:
    """The part that lines belong to, or none; whether it is one of a layer; whether it is taken."""
    part = next((part for part, text in _PARTS if re.search(text, said)), "")
    return part, _LAYER.search(said) is not None, _NOT_TAKEN.search(said) is None


def _share(said: str, plan: Plan) -> float:
    """Of instructions that stand side by side, which part is run."""
    if "shrink" in said:
        return 0  # in rounds, and batches of splits, after the first
    if "if (peer == s.device_index) values" in said:
        return 1 / plan.num_devices
    return 1


def main(argv: Sequence[str] | None = None) -> int:
    """Counts, and prints what came out; returns the exit code."""
    parser = argparse.ArgumentParser("python -m jax_mono.gfx942.handoff_code", description=__doc__)
    parser.add_argument("--model", default="laneformer-2b", help="a preset, or a checkpoint (laneformer-2b)")
    parser.add_argument("--devices", metavar="N", type=options.count, default=8, help="devices of the plan (8)")
    parser.add_argument("--blocks", metavar="N", type=options.count, help="of each; if absent as many as there can be")
    parser.add_argument("--position", metavar="N", type=options.count, default=48, help="of the token (48)")
    arguments = parser.parse_args(argv)
    config = find_config(arguments.model)
    per_device = arguments.blocks or default_blocks(config, 1, COMPUTE_UNITS)
    plan = make_plan(config, devices=arguments.devices, blocks=per_device, target=GPU, topology=MI300X)
    made = count(listed(plan, "bfloat16", ziglang()), plan, position=arguments.position)
    for part in sorted(made.instructions):
        print(f"{part:<34}{made.instructions[part]:>7,}")
    print(f"{made.layer_bytes:,} bytes in a layer, {made.taken_bytes:,} taken; {made.end_bytes:,} after the last one")
    return 0


if __name__ == "__main__":
    sys.exit(main())
