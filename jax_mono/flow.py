"""What each block does for one token, step by step: the plan as a program.

The resident program (``ffi/kernel/program.h``) runs the same steps in the same order; here they are data, for whatever
reasons about hand-offs without running them: the simulator, and the checks of the hand-off protocol under a weak memory
model. Which words a step writes follows from :func:`jax_mono.handoffs.writers`; which words it reads is told here.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from jax_mono.config import Module
from jax_mono.handoffs import MODULES, Runs, exchange, part_words, writers
from jax_mono.plan import MAX_DEVICES, Plan, Span, Stage, StageName

TokenKind = Literal["fed", "sampled", "filtered"]
"""A token of the prompt, which skips the LM head; one chosen from summaries; one chosen from all logits."""


@dataclass(frozen=True, eq=False)
class Receive:
    """Waits for words in the exchange memory of the block's own device.

    Attributes:
        channel: A name of :func:`jax_mono.handoffs.exchange`.
        layer: Whose channel; None for one that exists once per token.
        words: int64 indices within the channel.
        copy: Which copy of it: that of the block's die, 0 if there is but one.
    """

    channel: str
    layer: int | None
    words: np.ndarray
    copy: int


@dataclass(frozen=True, eq=False)
class Publish:
    """Writes words into the exchange memory of a device, into all copies of the channel.

    Attributes:
        channel: A name of :func:`jax_mono.handoffs.exchange`.
        layer: Whose channel; None for one that exists once per token.
        device: Whose memory.
        words: int64 indices within the channel.
    """

    channel: str
    layer: int | None
    device: int
    words: np.ndarray


@dataclass(frozen=True)
class Attend:
    """Reads keys and values of positions of one KV head.

    Attributes:
        positions: How many.
    """

    positions: int


@dataclass(frozen=True)
class Product:
    """Multiplies the block's tiles of a stage with the activations.

    Attributes:
        stage: Which stage.
        weights: Weights that are streamed for it, padding included.
    """

    stage: StageName
    weights: int


@dataclass(frozen=True)
class Moment:
    """The block has come to a moment that a trace notes.

    Attributes:
        mark: A name of :data:`jax_mono.trace.MARKS`.
        layer: Its layer, or None where it comes once per token.
    """

    mark: str
    layer: int | None


Step = Receive | Publish | Attend | Product | Moment


def token_steps(plan: Plan, device: int, block: int, position: int, kind: TokenKind = "sampled") -> tuple[Step, ...]:
    """Steps of one block for one token, in program order.

    Within a step the order of words is open: a block may be many threads.

    Args:
        plan: The plan.
        device: The block's device.
        block: Its number.
        position: Of the token in the sequence; decides which splits of attention have something to do.
        kind: How the token after it is found.

    Returns:
        The steps.
    """
    return tuple(Flow(plan, device).steps(block, position, kind))


class Flow:
    """Makes the steps of the blocks of one device.

    Args:
        plan: The plan.
        device: The device.
    """

    def __init__(self, plan: Plan, device: int) -> None:
        self.plan, self.device = plan, device
        self.share, self.runs = plan.devices[device], Runs.of(plan)
        self._pushed = {
            (module, source)
            for module in MODULES
            for layer in range(plan.config.num_layers)
            if (source := plan.config.mixing(module, layer).source) is not None and plan.num_devices > 1
        }
        self._written = [_written(plan, peer) for peer in range(plan.num_devices)]
        self._channels = exchange(plan, device).channels

    def steps(self, block: int, position: int, kind: TokenKind) -> Iterator[Step]:
        """Steps of one block for one token; see :func:`token_steps`."""
        yield Moment("begun", None)
        for layer in range(self.plan.config.num_layers):
            yield from self._qkv(block, layer)
            yield from self._attention(block, layer, position)
            yield from self._past_sums(block, layer, "attention")
            yield from self._o(block, layer, position)
            yield from self._mix(block, layer, "attention")
            yield from self._up(block, layer)
            yield from self._past_sums(block, layer, "mlp")
            yield from self._down(block, layer)
            yield from self._mix(block, layer, "mlp")
        if kind != "fed":
            yield from self._head(block)
        yield from self._publish_all(block, "summary")
        if kind == "filtered":
            yield from self._publish_all(block, "logits")
        yield Moment("summarised", None)
        yield from self._choose(block, kind)
        yield Moment("chosen", None)

    def _receive(self, block: int, channel: str, layer: int | None, words: np.ndarray) -> Receive:
        copied = self._channels[channel].copies > 1
        return Receive(channel, layer, words, self.plan.placement.die_of(block) if copied else 0)

    def _publish(self, block: int, channel: str, layer: int | None, device: int | None = None) -> Publish:
        to = self.device if device is None else device
        return Publish(channel, layer, to, self._written[to][channel][self.device, block])

    def _publish_all(self, block: int, channel: str) -> Iterator[Step]:
        for device in range(self.plan.num_devices):
            yield self._publish(block, channel, None, device)

    def _product(self, block: int, stage: StageName) -> Product:
        made = self.share.stages[stage]
        return Product(stage, made.shares[block].count * made.tile_words)

    def _lanes(self, block: int, channel: str, layer: int | None, lanes: Span) -> Iterator[Step]:
        """Whole vectors over the hidden size."""
        if lanes.count:
            vector = self.plan.num_blocks * self.runs.hidden
            yield self._receive(block, channel, layer, np.arange(lanes.first * vector, lanes.stop * vector))

    def _from_peers(self, block: int, channel: str, layer: int | None) -> Iterator[Step]:
        """The words that the peers' blocks of the same number write."""
        written, peers = self._written[self.device][channel], range(self.plan.num_devices)
        runs = [written[peer, block] for peer in peers if peer != self.device]
        if runs:
            yield self._receive(block, channel, layer, np.concatenate(runs))

    def _qkv(self, block: int, layer: int) -> Iterator[Step]:
        if layer > 0:  # the first layer reads an embedding
            yield from self._lanes(block, "residual_mlp", layer - 1, touched_lanes(self.share.stages["qkv"], block))
        yield Moment("qkv_input", layer)
        yield self._product(block, "qkv")
        yield self._publish(block, "qkv", layer)
        yield Moment("qkv_product", layer)

    def _attention(self, block: int, layer: int, position: int) -> Iterator[Step]:
        plan, run = self.plan, self.share.attention[block]
        visible = Visible.of(plan, layer, position)
        item_words = plan.config.queries_per_kv * part_words(plan)
        for item in range(run.first, run.stop):
            head, split = divmod(item, plan.kv_splits)
            if split not in visible.splits:
                continue
            owner = visible.last_chunk % plan.kv_splits == split
            yield self._receive(block, "qkv", layer, self.head_words(head, owner))
            yield Moment("heads_received", layer)
            yield Attend(visible.positions(plan, split))
            yield Publish("attention", layer, self.device, np.arange(item * item_words, (item + 1) * item_words))
        yield Moment("attended", layer)

    def head_words(self, head: int, owner: bool) -> np.ndarray:
        """Words of the rows of one KV head: its queries, and for the owner of the position its key and value."""
        config, stage = self.plan.config, self.share.stages["qkv"]
        heads = self.share.kv_heads.count // self.share.lanes.count
        lane, in_lane = divmod(head, heads)
        size, group = config.head_dim, config.queries_per_kv
        rows = [Span(in_lane * group * size, group * size)]
        if owner:
            rows += [Span((heads * group + in_lane) * size, size), Span((heads * (group + 1) + in_lane) * size, size)]
        tiles = {
            lane * stage.tiles_per_lane + row // self.plan.tile.rows
            for span in rows
            for row in range(span.first, span.stop)
        }
        return np.concatenate([np.arange(t * self.runs.tile, (t + 1) * self.runs.tile) for t in sorted(tiles)])

    def _o(self, block: int, layer: int, position: int) -> Iterator[Step]:
        plan = self.plan
        splits = sorted(Visible.of(plan, layer, position).splits)
        item_words = plan.config.queries_per_kv * part_words(plan)
        items = np.asarray([head * plan.kv_splits + s for head in range(self.share.kv_heads.count) for s in splits])
        if len(items):
            words = (items[:, None] * item_words + np.arange(item_words)).ravel()
            yield self._receive(block, "attention", layer, words)
        yield Moment("o_input", layer)
        yield self._product(block, "o")
        yield Moment("o_product", layer)

    def _past_sums(self, block: int, layer: int, module: Module) -> Iterator[Step]:
        source = self.plan.config.mixing(module, layer).source
        if source is not None and source != layer:
            yield from self._from_peers(block, f"inbox_{module}", source)

    def _mix(self, block: int, layer: int, module: Module) -> Iterator[Step]:
        source = self.plan.config.mixing(module, layer).source
        inbox, pushed = f"inbox_{module}", (module, layer) in self._pushed
        peers = [peer for peer in range(self.plan.num_devices) if peer != self.device]
        pushes = [self._publish(block, inbox, layer, peer) for peer in peers] if pushed else []
        if source == layer:
            yield from pushes
            yield from self._from_peers(block, inbox, layer)
        yield self._publish(block, f"residual_{module}", layer)
        if source != layer:
            yield from pushes
        yield Moment(f"{module}_mixed", layer)

    def _up(self, block: int, layer: int) -> Iterator[Step]:
        yield from self._lanes(block, "residual_attention", layer, touched_lanes(self.share.stages["up"], block))
        yield Moment("up_input", layer)
        yield self._product(block, "up")
        yield self._publish(block, "activation", layer)
        yield Moment("up_product", layer)

    def _down(self, block: int, layer: int) -> Iterator[Step]:
        yield self._receive(block, "activation", layer, np.arange(self.plan.num_blocks * self.runs.activation))
        yield Moment("down_input", layer)
        yield self._product(block, "down")
        yield Moment("down_product", layer)

    def _head(self, block: int) -> Iterator[Step]:
        lanes, last = self.plan.config.lanes, self.plan.config.num_layers - 1
        if lanes is None or lanes.head == "per_lane":
            yield from self._lanes(block, "residual_mlp", last, touched_lanes(self.share.stages["head"], block))
        else:
            if lanes.head == "mean_of_norms":  # every lane's norm needs the whole lane
                yield from self._lanes(block, "residual_mlp", last, Span(0, self.share.lanes.count))
            for peer in range(self.plan.num_devices):
                if peer != self.device:
                    yield self._publish(block, "final_inbox", None, peer)
            yield from self._from_peers(block, "final_inbox", None)
            yield self._publish(block, "final_sum", None)
            yield from self._lanes(block, "final_sum", None, Span(0, 1))
        yield Moment("head_input", None)
        yield self._product(block, "head")
        yield Moment("head_product", None)

    def _choose(self, block: int, kind: TokenKind) -> Iterator[Step]:
        def everything(channel: str) -> Receive:
            return self._receive(block, channel, None, np.arange(self._channels[channel].words))

        if kind != "filtered":
            yield everything("summary")
        elif block == 0:
            yield everything("summary")
            yield everything("logits")
            yield self._publish(block, "choice", None)
        else:
            yield everything("choice")


@functools.lru_cache(maxsize=MAX_DEVICES)
def _written(plan: Plan, device: int) -> dict[str, dict[tuple[int, int], np.ndarray]]:
    """Words of every channel of a device, by (writing device, writing block)."""
    return {
        name: {(source, block): words for source, block, words in writers(plan, device, name)}
        for name in exchange(plan, device).channels
    }


@dataclass(frozen=True)
class Visible:
    """Positions that a token attends to, in chunks; mirrors ``Visible`` in ffi/kernel/attention.h.

    Attributes:
        first: First position.
        last: Last position, the token's own.
        first_chunk: Chunk of the first position.
        last_chunk: Chunk of the last position.
        splits: Splits that hold any of them.
    """

    first: int
    last: int
    first_chunk: int
    last_chunk: int
    splits: frozenset[int]

    @classmethod
    def of(cls, plan: Plan, layer: int, position: int) -> Visible:
        """What the token at ``position`` sees in ``layer``."""
        window, chunk = plan.config.sliding_windows[layer], plan.target.kv_chunk
        first = position - window + 1 if 0 < window <= position else 0
        chunks = range(first // chunk, position // chunk + 1)
        return cls(first, position, chunks[0], chunks[-1], frozenset(c % plan.kv_splits for c in chunks))

    def positions(self, plan: Plan, split: int) -> int:
        """How many of them a split owns."""
        size, count = plan.target.kv_chunk, 0
        for chunk in range(self.first_chunk, self.last_chunk + 1):
            if chunk % plan.kv_splits == split:
                count += min(self.last + 1, (chunk + 1) * size) - max(self.first, chunk * size)
        return count


def touched_lanes(stage: Stage, block: int) -> Span:
    """Lanes that a block's tiles of a column parallel stage read."""
    tiles = stage.shares[block]
    if tiles.count == 0:
        return Span(0, 0)
    first = tiles.first // stage.tiles_per_lane
    return Span(first, (tiles.stop - 1) // stage.tiles_per_lane - first + 1)
