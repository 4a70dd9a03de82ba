"""A plan for people: as text, and as a picture (extra ``plot``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jax_mono.config import Module
from jax_mono.extras import require
from jax_mono.handoffs import MODULES, exchange
from jax_mono.nearness import attention_nearness
from jax_mono.plan import STAGES, DevicePlan, Plan, Stage
from jax_mono.spans import Span

BYTES_PER_WEIGHT = 2
"""Pictures and texts count bfloat16 weights."""


@dataclass(frozen=True)
class BlockShare:
    """What one block owns, as ranges for people; an empty string where it owns nothing.

    Attributes:
        qkv: Rows of the device's q, k and v, lane by lane.
        attention: KV heads, and the part of their positions where several blocks share a head.
        hidden: Rows of the residual stream; it computes them in ``o`` and ``down`` and keeps them.
        neurons: Neurons of the feed-forward, over all devices.
        vocabulary: Rows of the LM head, over all devices.
        words: Weights it reads for one token, padding included.
    """

    qkv: str
    attention: str
    hidden: str
    neurons: str
    vocabulary: str
    words: int


@dataclass(frozen=True)
class Totals:
    """A plan in numbers.

    Attributes:
        words: Weights that all blocks read for one token, padding included.
        busiest: Of these the most that any block reads.
        idlest: The least that any block reads.
        balance: Mean over maximum of the blocks' weights; 1 is perfectly even.
        shares: Fraction of the weights per stage.
        waits: Hand-offs that follow one another in a token, the choice of the next one included.
    """

    words: int
    busiest: int
    idlest: int
    balance: float
    shares: dict[str, float]
    waits: int


@dataclass(frozen=True)
class Handoffs:
    """Words that change hands in one layer, on device 0; the plan's target says how many bytes a word has.

    Attributes:
        qkv: q, k and v of the new token.
        attention: Partial attention of every query head and part.
        residual: Residual stream after a module.
        activation: Activations of the feed-forward.
        peers: Words that arrive from other devices after a module that exchanges; as many leave.
    """

    qkv: int
    attention: int
    residual: int
    activation: int
    peers: int

    @property
    def local(self) -> int:
        """Words that the device's blocks hand to each other in one layer."""
        return self.qkv + self.attention + 2 * self.residual + self.activation


def block_shares(plan: Plan, device: int) -> list[BlockShare]:
    """Says for every block of a device what it owns."""
    share, rows = plan.devices[device], plan.tile.rows
    return [
        BlockShare(
            qkv=_ranges(_rows(share.stages["qkv"], block, rows)),
            attention=_items(plan, share.kv_heads.first, share.attention[block]),
            hidden=_ranges(_rows(share.stages["o"], block, rows)),
            neurons=_ranges(share.neurons.first + _neurons(share, block, rows)),
            vocabulary=_ranges(share.vocab.first + _rows(share.stages["head"], block, rows)),
            words=plan.block_words(device, block),
        )
        for block in range(plan.num_blocks)
    ]


def totals(plan: Plan) -> Totals:
    """Adds up a plan."""
    words = [plan.block_words(device, block) for device in range(plan.num_devices) for block in range(plan.num_blocks)]
    stages: dict[str, int] = dict.fromkeys(STAGES, 0)
    for share in plan.devices:
        for name in STAGES:
            stage = share.stages[name]
            stages[name] += stage.tiles * stage.tile_words * (1 if name == "head" else plan.config.num_layers)
    peers = plan.num_devices > 1
    at_once = sum(
        plan.config.mixing(module, layer).source == layer
        for module in MODULES
        for layer in range(plan.config.num_layers)
    )
    return Totals(
        words=sum(words),
        busiest=max(words),
        idlest=min(words),
        balance=sum(words) / len(words) / max(words),
        shares={name: count / sum(words) for name, count in stages.items()},
        waits=5 * plan.config.num_layers + peers * at_once + sums_lanes(plan) * (1 + peers) + 1,
    )


def handoffs(plan: Plan) -> Handoffs:
    """Counts the words of one layer's hand-offs."""
    channels = exchange(plan, 0).channels
    return Handoffs(
        qkv=channels["qkv"].words,
        attention=channels["attention"].words,
        residual=channels["residual_mlp"].words,
        activation=channels["activation"].words,
        peers=channels["inbox_mlp"].words * (plan.num_devices - 1) // plan.num_devices,
    )


def sums_lanes(plan: Plan) -> bool:
    """Whether the LM head reads a sum over all lanes, which takes a hand-off of its own."""
    return plan.config.lanes is not None and plan.config.lanes.head != "per_lane"


def arrivals(plan: Plan) -> list[int | None]:
    """Says per layer which layer's sums are added after it, as seen after the feed-forward (or the attention)."""
    lanes = plan.config.lanes
    module: Module = "attention" if lanes is not None and not lanes.mlp_comm else "mlp"
    return [plan.config.mixing(module, layer).source for layer in range(plan.config.num_layers)]


def arrival_words(plan: Plan) -> str:
    """Says when sums of other lanes or devices are added."""
    sources = arrivals(plan)
    at_once = [layer for layer, source in enumerate(sources) if source == layer]
    delays = {layer - source for layer, source in enumerate(sources) if source is not None} - {0}
    if not delays:
        return "added at once" if at_once else "never added"
    later = f"added {_count(max(delays), 'layer')} later"
    if not at_once:
        return later
    also = "also " if any(source in at_once and layer != source for layer, source in enumerate(sources)) else ""
    return f"{later}, those of layers {_ranges(np.asarray(at_once))} {also}at once"


def shown(count: int, most: int) -> list[int | None]:
    """Chooses which of ``count`` things to show: all, or the first ones, None for a gap, and the last."""
    return [*range(count)] if count <= most else [*range(most - 1), None, count - 1]


def bounds(span: Span) -> str:
    """Writes a span as ``first–last``."""
    return _ranges(np.arange(span.first, span.stop))


def number_of_bytes(words: int) -> str:
    """Writes the size of ``words`` weights in a fitting unit."""
    size = float(words * BYTES_PER_WEIGHT)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.4g} {unit}"
        size /= 1000
    return f"{size:.4g} GB"


def title(plan: Plan) -> str:
    """Names the model and the machine of a plan."""
    size = plan.config.num_parameters
    count = f"{size / 1e9:.2f} billion" if size >= 1e9 else f"{size / 1e6:.1f} million"
    family = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "laneformer": "Laneformer"}[plan.config.family]
    return f"{family}, {count} parameters, on {_count(plan.num_devices, 'device')} × {_count(plan.num_blocks, 'block')}"


def plan_text(plan: Plan) -> str:
    """Describes a plan: totals, hand-offs, and who owns what. Long lists of devices and blocks are shortened.

    Args:
        plan: The plan.

    Returns:
        Lines of at most about 110 characters, without a trailing newline.
    """
    config, sums = plan.config, totals(plan)
    lanes = f"{config.num_lanes} lanes with delay {config.lanes.delay}, " if config.lanes else ""
    stages = ", ".join(f"{name} {fraction:.1%}" for name, fraction in sums.shares.items())
    lines = [
        title(plan),
        f"{config.num_layers} layers, {lanes}hidden size {config.hidden_size:,}, {config.num_heads} query and "
        f"{config.num_kv_heads} KV heads of {config.head_dim}, {config.intermediate_size:,} neurons, "
        f"vocabulary {config.vocab_size:,}",
        "",
        f"read per token     {number_of_bytes(sums.words)} of bfloat16 weights: {stages}",
        f"read per block     {number_of_bytes(sums.idlest)} to {number_of_bytes(sums.busiest)}, balance "
        f"{sums.balance:.1%}",
        f"weight tile        {plan.tile.rows} × {plan.tile.cols}",
        f"attention          {_positions(plan)}",
        *_place_lines(plan),
        f"hand-offs in turn  {sums.waits} per token",
        "",
        *_handoff_lines(plan),
    ]
    for device in shown(plan.num_devices, 8):
        lines.append("")
        if device is None:
            lines.append(f"… {plan.num_devices - 8} more devices")
        else:
            lines += _device_lines(plan, device)
    return "\n".join(lines)


def draw_plan(plan: Plan, path: str | Path) -> None:
    """Draws a plan: the tapes, one layer with its hand-offs, and when sums of other lanes or devices arrive.

    Args:
        plan: The plan.
        path: Where to write; the suffix ``.svg`` or ``.png`` decides the format.

    Raises:
        ValueError: Another suffix.
        MissingExtraError: matplotlib is not installed.
    """
    path = Path(path)
    if path.suffix not in (".svg", ".png"):
        raise ValueError(f"{path} must end in .svg or .png")
    require("matplotlib", "plot")
    from jax_mono.picture import draw  # needs matplotlib

    draw(plan, path)


def _handoff_lines(plan: Plan) -> Iterator[str]:
    words, sources = handoffs(plan), arrivals(plan)
    channels = exchange(plan, 0).channels
    yield f"hand-offs of one layer within device 0, in words of {plan.target.word_bytes} bytes"
    yield f"  qkv → attention     {words.qkv:>9,}"
    yield f"  attention → o       {words.attention:>9,}"
    yield f"  o → up              {words.residual:>9,}"
    yield f"  up → down           {words.activation:>9,}"
    yield f"  down → next layer   {words.residual:>9,}"
    sent = {source for source in sources if source is not None}
    if plan.num_devices > 1 and sent:
        yield f"from other devices after attention and after the feed-forward, {arrival_words(plan)}"
        yield f"  {f'{len(sent)} layers, each':<20}{words.peers:>9,}"
    yield "once per token"
    if sums_lanes(plan):
        yield f"  last layer → head   {channels['final_sum'].words + words.peers:>9,}"
    yield f"  head → next token   {channels['summary'].words:>9,}"


def _positions(plan: Plan) -> str:
    if plan.kv_splits == 1:
        return "one block has all positions of a KV head"
    return f"{plan.kv_splits} blocks share a KV head's positions, {plan.target.kv_chunk} at a time in turn"


def _place_lines(plan: Plan) -> Iterator[str]:
    """Where blocks belong, if the device has several dies."""
    counts = [span.count for span in plan.placement.roles]
    if len(counts) == 1:
        return
    each = str(counts[0]) if counts[0] == counts[-1] else f"{counts[-1]} or {counts[0]}"
    near = attention_nearness(plan)
    yield (
        f"dies               {len(counts)} of {each} blocks on {_count(plan.placement.num_sides, 'side')}; "
        f"attention reads {near.die:.0%} of its rows from its die, {near.side:.0%} from its side"
    )
    yield (
        f"hand-offs          {len(counts)} copies of what many blocks read, one per die; "
        f"at most {max(counts)} blocks poll a word"
    )
    rows, words = plan.placement.tape_rows, plan.config.num_layers * plan.layer_words + plan.head_words
    idle = 1 - totals(plan).words / (plan.num_devices * rows * words)
    if plan.placement.interleaved:
        size, period = number_of_bytes(plan.placement.granule_words), len(plan.placement.pattern)
        yield f"tapes              a granule of {size} in every {period}; {idle:.1%} of their memory holds no weights"
    else:
        yield f"tapes              in one piece; {idle:.1%} of their memory holds no weights"


def _device_lines(plan: Plan, device: int) -> Iterator[str]:
    share, shares = plan.devices[device], block_shares(plan, device)
    lanes = f"lanes {bounds(share.lanes)}, " if plan.config.lanes else ""
    yield (
        f"device {device}: {lanes}KV heads {bounds(share.kv_heads)}, neurons {bounds(share.neurons)}, "
        f"vocabulary {bounds(share.vocab)}"
    )
    table = [("block", "qkv rows", "KV heads", "hidden rows", "neurons", "vocabulary", "read per token")]
    for block in shown(plan.num_blocks, 12):
        if block is None:
            table.append(("…",) * 7)
            continue
        own = shares[block]
        ranges = (own.qkv, own.attention, own.hidden, own.neurons, own.vocabulary)
        table.append((str(block), *(text or "–" for text in ranges), number_of_bytes(own.words)))
    yield from _aligned(table)


def _aligned(table: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        yield "  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))


def _rows(stage: Stage, block: int, tile_rows: int) -> np.ndarray:
    """Rows of a stage that a block owns, lane by lane and without padding."""
    return _cut(stage, block, tile_rows, stage.rows)


def _neurons(share: DevicePlan, block: int, tile_rows: int) -> np.ndarray:
    """Neurons that a block owns, counted from the device's first; half of a tile's rows are gates."""
    return _cut(share.stages["up"], block, tile_rows // 2, share.neurons.count // share.lanes.count)


def _cut(stage: Stage, block: int, per_tile: int, per_lane: int) -> np.ndarray:
    tiles = np.arange(stage.shares[block].first, stage.shares[block].stop)[:, None]
    at = tiles % stage.tiles_per_lane * per_tile + np.arange(per_tile)
    return (tiles // stage.tiles_per_lane * per_lane + at)[at < per_lane]


def _items(plan: Plan, first_head: int, span: Span) -> str:
    """Names attention items; item = KV head × parts + part."""
    if not span.count:
        return ""
    splits = plan.kv_splits
    heads = _range(first_head + span.first // splits, first_head + (span.stop - 1) // splits)
    if span.count % splits == 0:
        return heads
    if span.first // splits == (span.stop - 1) // splits:
        return f"{heads}, part {_range(span.first % splits + 1, (span.stop - 1) % splits + 1)}/{splits}"
    return f"{heads}, {span.count} parts"


def _ranges(values: np.ndarray) -> str:
    if not len(values):
        return ""
    ends = np.flatnonzero(np.diff(values) != 1)
    firsts, lasts = values[np.r_[0, ends + 1]], values[np.r_[ends, len(values) - 1]]
    return ", ".join(_range(int(first), int(last)) for first, last in zip(firsts, lasts, strict=True))


def _range(first: int, last: int) -> str:
    return f"{first:,}" if first == last else f"{first:,}–{last:,}"


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
