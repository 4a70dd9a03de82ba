"""The plan: which device and block owns which rows, heads, neurons and vocabulary.

A plan is a pure function of the model configuration and the shape of the machine. It is data: nothing is
scheduled at run time, every block knows its share of every stage before the first token. ``tape`` turns a plan
into weight layouts, ``record`` turns it into the words that the resident program reads.

Vocabulary used throughout:

* A *device* holds whole lanes of a Laneformer, or a range of KV heads, neurons and vocabulary rows of a dense
  model (tensor parallelism). A dense model's share on a device is treated as one lane.
* A *block* is one resident worker of a device: a thread on CPU, a thread block on a GPU.
* A *stage* is one matrix product of a layer (``qkv``, ``o``, ``up``, ``down``) or the LM head (``head``). Its
  rows are cut into *tiles* of ``TileFormat.rows`` rows; blocks own contiguous runs of tiles.
* ``qkv``, ``up`` and ``head`` are column parallel: a tile belongs to one lane and reads that lane's activations.
  ``o`` and ``down`` are row parallel: a tile holds the same hidden rows of all lanes of the device side by side,
  so one block owns a hidden row for good and can keep its residual to itself.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jax_mono.config import ConfigError, ModelConfig
from jax_mono.locality import attention_spans, head_splits, row_spans, tile_heads
from jax_mono.placement import Placement, place
from jax_mono.spans import Span, even_counts, fill, spans, spread_counts
from jax_mono.split import DeviceShare, device_shares
from jax_mono.tile import TileFormat
from jax_mono.topology import Topology

StageName = Literal["qkv", "o", "up", "down", "head"]
LAYER_STAGES: tuple[StageName, ...] = ("qkv", "o", "up", "down")
STAGES: tuple[StageName, ...] = (*LAYER_STAGES, "head")

MAX_DEVICES = 16
"""Devices in one gang; bounds the peers' tables of the resident program."""


@dataclass(frozen=True)
class Target:
    """What a kind of processor asks of a plan.

    Attributes:
        name: ``cpu`` or ``gpu``.
        word_bytes: Bytes of an exchange word, as many as the target moves at once.
        floats_per_word: float32 values that a word carries beside its tag.
        weights_per_word: Values of the weight dtype that a word carries.
        kv_chunk: Consecutive positions that one split of a KV head owns before the next split takes over.
    """

    name: str
    word_bytes: int
    floats_per_word: int
    weights_per_word: int
    kv_chunk: int


CPU = Target("cpu", word_bytes=8, floats_per_word=1, weights_per_word=1, kv_chunk=16)
GPU = Target("gpu", word_bytes=16, floats_per_word=3, weights_per_word=6, kv_chunk=16)


@dataclass(frozen=True)
class Stage:
    """One product of one device.

    Attributes:
        name: Which product.
        rows: Rows per lane (column parallel) or hidden rows (row parallel), without padding.
        cols: Columns per lane, without padding.
        lanes: Lanes of this device that take part.
        row_parallel: Whether a tile holds all lanes side by side instead of belonging to one lane.
        tiles: Row tiles on this device.
        tile_words: Words of the tape in one tile, padding included; one per weight unless tapes are compressed.
        shares: Per block, the run of tiles it owns. Runs follow each other in the order of the blocks, but not those of
            ``qkv`` where a device has several dies.
        offsets: Per block, where its run starts in the block's layer tape (or head tape), in words.
    """

    name: StageName
    rows: int
    cols: int
    lanes: int
    row_parallel: bool
    tiles: int
    tile_words: int
    shares: tuple[Span, ...]
    offsets: tuple[int, ...]

    @property
    def empty(self) -> bool:
        """Whether there is nothing of it here: a device without heads has no attention."""
        return self.tiles == 0 or self.tile_words == 0

    @property
    def tiles_per_lane(self) -> int:
        """Tiles of one lane; for a row parallel stage all tiles serve all lanes."""
        return self.tiles if self.row_parallel else self.tiles // self.lanes


@dataclass(frozen=True)
class DevicePlan:
    """The share of one device.

    Attributes:
        lanes: Lanes it holds; a dense model counts as one lane on every device.
        kv_heads: Global KV heads it holds, lane-major. May be empty on a dense model with few heads.
        neurons: Global feed-forward neurons it holds, lane-major.
        vocab: Global rows of the LM head it holds.
        stages: The five products by name.
        layer_words: Longest layer tape of its blocks, in words; whole granules of memory.
        head_words: Longest head tape of its blocks, likewise.
        attention: Per block, its run of attention items; item = local KV head * kv_splits + split.
    """

    lanes: Span
    kv_heads: Span
    neurons: Span
    vocab: Span
    stages: dict[StageName, Stage]
    layer_words: int
    head_words: int
    attention: tuple[Span, ...]


@dataclass(frozen=True)
class Plan:
    """Who owns what, for all devices and blocks. Made by :func:`make_plan`.

    Attributes:
        config: The model.
        num_devices: Devices that share the model.
        num_blocks: Resident blocks on each device.
        tile: Weight tile format.
        target: The kind of processor it is made for.
        kv_splits: Over how many blocks the positions of one KV head are spread.
        devices: One share per device.
        hidden: Per block, the tiles of hidden rows it owns; the same on every device.
        placement: On which die of its device a block belongs.
    """

    config: ModelConfig
    num_devices: int
    num_blocks: int
    tile: TileFormat
    target: Target
    kv_splits: int
    devices: tuple[DevicePlan, ...]
    hidden: tuple[Span, ...]
    placement: Placement

    def __hash__(self) -> int:
        parts = (self.num_devices, self.num_blocks, self.tile, self.target, self.kv_splits, self.placement)
        return hash((self.config, *parts))

    @property
    def layer_words(self) -> int:
        """Words in the longest layer tape of any block."""
        return max(device.layer_words for device in self.devices)

    @property
    def head_words(self) -> int:
        """Words in the longest head tape of any block."""
        return max(device.head_words for device in self.devices)

    @property
    def tape_granules(self) -> tuple[int, int]:
        """Granules of memory of a block's layer tapes together, and of its head tape."""
        granule = self.placement.granule_words
        return self.config.num_layers * self.layer_words // granule, self.head_words // granule

    @property
    def tape_regions(self) -> tuple[int, int]:
        """Regions of memory that a device's layer tapes, and its head tapes, touch at most; see :class:`Placement`."""
        layers, head = self.tape_granules
        return self.placement.regions(layers), self.placement.regions(head)

    @property
    def max_kv_heads(self) -> int:
        """KV heads on the fullest device; at least 1, so that no array is empty."""
        return max(1, *(device.kv_heads.count for device in self.devices))

    @property
    def max_vocab(self) -> int:
        """LM head rows on the fullest device."""
        return max(device.vocab.count for device in self.devices)

    def block_words(self, device: int, block: int) -> int:
        """Words (padding included) that a block reads for one token; one per weight unless tapes are compressed."""
        stages = self.devices[device].stages
        layer = sum(stages[name].shares[block].count * stages[name].tile_words for name in LAYER_STAGES)
        return self.config.num_layers * layer + stages["head"].shares[block].count * stages["head"].tile_words


def make_plan(
    config: ModelConfig,
    *,
    devices: int = 1,
    blocks: int = 1,
    tile: TileFormat | None = None,
    target: Target = CPU,
    kv_splits: int | None = None,
    topology: Topology | None = None,
    pattern: Sequence[int] | None = None,
) -> Plan:
    """Plans a model for ``devices`` devices of ``blocks`` resident blocks each.

    Args:
        config: The model.
        devices: Devices that share the model. A Laneformer's lanes must divide evenly among them.
        blocks: Blocks per device; at most one per tile of hidden rows.
        tile: Weight tile format; None takes the CPU's.
        target: The kind of processor.
        kv_splits: Blocks among which one KV head's positions are spread; None takes what is best, see
            :func:`jax_mono.locality.head_splits`.
        topology: What the devices are, if it matters where on them a block runs; see :mod:`jax_mono.placement`.
        pattern: Sides of the device to which consecutive granules of its memory belong, over one period; None takes the
            topology's.

    Returns:
        The plan; equal arguments give equal plans.

    Raises:
        ConfigError: The model cannot be cut like this; the message says what would work.
    """
    if pattern is not None:
        pattern = tuple(pattern)
    return _make_plan(config, devices, blocks, tile or TileFormat(), target, kv_splits, topology, pattern)


@functools.lru_cache(maxsize=64)
def _make_plan(
    config: ModelConfig,
    devices: int,
    blocks: int,
    tile: TileFormat,
    target: Target,
    kv_splits: int | None,
    topology: Topology | None,
    pattern: tuple[int, ...] | None,
) -> Plan:
    _check_shape(config, devices, blocks, tile)
    placement = place(blocks, topology, pattern)
    if len(placement.roles) > 1 and target is not GPU:
        raise ConfigError(f"a plan for CPUs has no dies; plan for {topology and topology.name} with target=GPU")
    hidden_tiles = tile.row_tiles(config.hidden_size)
    # Over several dies evenly, because each has its own memory to read from.
    deal = even_counts if len(placement.roles) == 1 else spread_counts
    hidden = spans(deal(hidden_tiles, blocks))
    shares = device_shares(config, devices, tile)
    if kv_splits is None:
        chunks = -(-config.max_position_embeddings // target.kv_chunk)
        kv_splits = head_splits(placement, [share.kv_heads.count for share in shares], chunks)
    if kv_splits < 1:
        raise ConfigError(f"kv_splits is {kv_splits}, must be at least 1")
    plans = tuple(_device_plan(config, share, placement, tile, hidden, kv_splits) for share in shares)
    return Plan(
        config=config,
        num_devices=devices,
        num_blocks=blocks,
        tile=tile,
        target=target,
        kv_splits=kv_splits,
        devices=plans,
        hidden=hidden,
        placement=placement,
    )


def _check_shape(config: ModelConfig, devices: int, blocks: int, tile: TileFormat) -> None:
    if not 1 <= devices <= MAX_DEVICES:
        raise ConfigError(f"devices is {devices}, must be between 1 and {MAX_DEVICES}")
    if config.lanes is not None and config.num_lanes % devices:
        fits = [n for n in range(1, config.num_lanes + 1) if config.num_lanes % n == 0]
        raise ConfigError(f"{config.num_lanes} lanes do not divide over {devices} devices; use one of {fits}")
    if blocks < 1:
        raise ConfigError(f"blocks is {blocks}, must be at least 1")
    most = tile.row_tiles(config.hidden_size)
    if blocks > most:
        raise ConfigError(
            f"{blocks} blocks are too many for hidden_size {config.hidden_size}: every block must own a tile of "
            f"{tile.rows} hidden rows, so at most {most}"
        )
    if config.lanes is None:
        # Every device needs a share of the neurons and the vocabulary; heads may run out.
        most = min(config.intermediate_size, tile.row_tiles(config.vocab_size))
        if devices > most:
            raise ConfigError(f"{devices} devices are too many for this model, at most {most}")


def _device_plan(
    config: ModelConfig,
    share: DeviceShare,
    placement: Placement,
    tile: TileFormat,
    hidden: tuple[Span, ...],
    kv_splits: int,
) -> DevicePlan:
    blocks = len(hidden)
    lanes = share.lanes.count
    heads_per_lane = share.kv_heads.count // lanes
    neurons_per_lane = share.neurons.count // lanes
    hidden_size = config.hidden_size
    per_lane_head = config.lanes is not None and config.lanes.head == "per_lane"

    def column_parallel(name: StageName, rows: int, stage_lanes: int) -> tuple[int, int, Stage]:
        tiles = tile.row_tiles(rows) * stage_lanes
        words = tile.part_words(hidden_size)
        return tiles, words, Stage(name, rows, hidden_size, stage_lanes, False, tiles, words, (), ())

    def row_parallel(name: StageName, cols: int) -> tuple[int, int, Stage]:
        tiles = tile.row_tiles(hidden_size)
        words = lanes * tile.part_words(cols)
        return tiles, words, Stage(name, hidden_size, cols, lanes, True, tiles, words, (), ())

    attention_width = heads_per_lane * config.queries_per_kv * config.head_dim
    qkv_rows = heads_per_lane * (config.queries_per_kv + 2) * config.head_dim
    drafts = {
        "qkv": column_parallel("qkv", qkv_rows, lanes),
        "o": row_parallel("o", attention_width),
        # Gate and up rows alternate in half tiles, so that one tile holds whole neurons.
        "up": column_parallel("up", 2 * _round_up(neurons_per_lane, tile.rows // 2), lanes),
        "down": row_parallel("down", neurons_per_lane),
        "head": column_parallel(
            "head", share.vocab.count // (lanes if per_lane_head else 1), lanes if per_lane_head else 1
        ),
    }

    # Hidden rows are the same for o and down. A stage lasts as long as on its busiest block: qkv is dealt evenly. Up,
    # the longest, evens out the layer, and the head the token.
    given: dict[str, tuple[Span, ...]] = {"o": hidden, "down": hidden}
    load = [sum(given[name][block].count * drafts[name][1] for name in given) for block in range(blocks)]
    attention = attention_spans(placement, share.kv_heads.count, kv_splits)
    heads = tile_heads(lanes, heads_per_lane, config.queries_per_kv, config.head_dim, tile.rows)
    for name in ("qkv", "up"):
        tiles, words, _ = drafts[name]
        if name == "qkv" and tiles and len(placement.roles) > 1:
            given[name] = row_spans(placement, heads, attention, kv_splits, load)
        else:
            at_least = tiles // blocks if name == "qkv" else 0
            given[name] = spans(fill(load, tiles, words, at_least, even=len(placement.roles) > 1))
        load = [done + span.count * words for done, span in zip(load, given[name], strict=True)]
    tiles, words, _ = drafts["head"]
    given["head"] = spans(fill([done * config.num_layers for done in load], tiles, words))

    position = [0] * blocks
    stages: dict[StageName, Stage] = {}
    for name in STAGES:
        tiles, words, draft = drafts[name]
        if name == "head":
            layer_words, position = placement.rounded(max(position)), [0] * blocks
        stages[name] = Stage(
            name=name,
            rows=draft.rows,
            cols=draft.cols,
            lanes=draft.lanes,
            row_parallel=draft.row_parallel,
            tiles=tiles,
            tile_words=words,
            shares=given[name],
            offsets=tuple(position),
        )
        position = [done + span.count * words for done, span in zip(position, given[name], strict=True)]
    return DevicePlan(
        lanes=share.lanes,
        kv_heads=share.kv_heads,
        neurons=share.neurons,
        vocab=share.vocab,
        stages=stages,
        layer_words=layer_words,
        head_words=placement.rounded(max(1, *position)),
        attention=attention,
    )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
