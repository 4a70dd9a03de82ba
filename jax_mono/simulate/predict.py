"""Tables of predictions: what a number depends on, and how it grows with the model."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jax_mono.config import ConfigError, ModelConfig
from jax_mono.cut import default_blocks, default_devices
from jax_mono.models.presets import preset
from jax_mono.plan import GPU, Plan, make_plan
from jax_mono.simulate.engine import simulate
from jax_mono.simulate.timing import INSTRUCTION_BYTES, Timing

_FEW, _MORE = 6, 10
"""Layers of the models that a longer one is extrapolated from."""


@dataclass(frozen=True)
class Prediction:
    """One cell of a table.

    Attributes:
        tokens_per_second: What is predicted.
        floor: What the longest tape alone would allow.
    """

    tokens_per_second: float
    floor: float


def plan_on(
    config: ModelConfig,
    timing: Timing,
    *,
    gpus: int,
    groups: int | None = None,
    blocks: int | None = None,
    placed: bool = True,
) -> tuple[Plan, int]:
    """The plan that the resident program would run.

    Args:
        config: The model.
        timing: The GPU.
        gpus: How many of them share the model.
        groups: Groups of blocks of one GPU, each a device of the plan; None takes what one GPU is divided into by
            :func:`jax_mono.cut.default_devices`, and one of each of several GPUs.
        blocks: Of a group; None takes one per compute unit, or a few less (:func:`jax_mono.cut.default_blocks`).
        placed: Whether tapes lie on the blocks' sides of the GPU.

    Returns:
        The plan, and how many of its devices share a GPU.
    """
    topology = timing.topology
    if groups is None:
        groups = default_devices(config, on_cpu=False) if gpus == 1 else 1
    if blocks is None:
        blocks = default_blocks(config, groups, topology.units)
    pattern = None if placed else (0,)
    plan = make_plan(config, devices=gpus * groups, blocks=blocks, target=GPU, topology=topology, pattern=pattern)
    return plan, groups


def predict(config: ModelConfig, gpus: int, timing: Timing, *, position: int = 48, tokens: int = 2) -> Prediction:
    """Predicts one number."""
    plan, groups = plan_on(config, timing, gpus=gpus)
    made = simulate(plan, timing, groups=groups, position=position, tokens=tokens)
    return Prediction(made.tokens_per_second, 1e9 / made.stream_ns)


def sensitivity(
    config: ModelConfig,
    devices: int,
    timing: Timing,
    *,
    handoffs_us: Sequence[float] = (0.5, 1.0, 1.5, 2.0, 3.0),
    rates: Sequence[float] = (4.0, 4.4, 4.8),
    report: Callable[[str], None] = lambda _: None,
) -> dict[tuple[float, float], Prediction]:
    """Varies the two numbers that nobody here could measure.

    Args:
        config: The model.
        devices: Devices that share it.
        timing: What else is known of the device.
        handoffs_us: Idle hand-offs on one device, microseconds; those between devices grow alike.
        rates: Of the memory, TB/s: others reached 4.0 to 4.4 with tapes laid anywhere, 4.8 on the blocks' sides.
        report: Told what comes next.

    Returns:
        Predictions by hand-off and rate.
    """
    table = {}
    for handoff in handoffs_us:
        for rate in rates:
            report(f"hand-off {handoff:g} us, {rate:g} TB/s")
            table[handoff, rate] = predict(
                config, devices, with_rate(timing.with_handoff(1e3 * handoff), rate), tokens=1
            )
    return table


def with_rate(timing: Timing, rate: float) -> Timing:
    """Another bandwidth, in TB/s, wherever tapes lie; what one block can take grows alike."""
    part = 1e3 * rate / timing.placed_rate.value
    return timing.replace(stream_rate=1e3 * rate, placed_rate=1e3 * rate, block_rate=timing.block_rate.value * part)


def with_code(timing: Timing, us_per_kb: float) -> Timing:
    """Another time of code, in microseconds per 64 instructions, which are a KB on Hopper."""
    return timing.replace(code_ns=us_per_kb * INSTRUCTION_BYTES)


def needed_handoff(table: dict[tuple[float, float], Prediction], rate: float, wanted: float) -> float | None:
    """The longest hand-off of a table with which a number is reached, by interpolation of the times of a token.

    Returns:
        Microseconds; None if not even the shortest will do.
    """
    column = sorted((handoff, 1 / made.tokens_per_second) for (handoff, of), made in table.items() if of == rate)
    if column[0][1] > 1 / wanted:
        return None
    for (short, fast), (long, slow) in itertools.pairwise(column):
        if slow > 1 / wanted:
            return short + (long - short) * (1 / wanted - fast) / (slow - fast)
    return column[-1][0]


def _dense(layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, head_dim: int, vocab: int) -> ModelConfig:
    return ModelConfig(
        family="llama",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=4096,
    )


GROWTH: dict[str, ModelConfig] = {
    "laneformer 2B": preset("laneformer-2b"),
    "8B dense": preset("llama-3.1-8b"),
    # Of mixtures, what one token reads: the weights of the chosen experts side by side, without routing.
    "30B-A3B, active part": _dense(48, 2048, 8 * 768, 32, 4, 128, 151936),
    "70B dense": _dense(80, 8192, 28672, 64, 8, 128, 128256),
    "120B-A5B, active part": _dense(36, 2880, 4 * 2880, 64, 8, 64, 201088),
}
"""Models of a table of growth."""


def grow(
    timing: Timing, devices: Sequence[int] = (2, 4, 8, 16), *, report: Callable[[str], None] = lambda _: None
) -> dict[tuple[str, int], Prediction | None]:
    """Predicts all models of :data:`GROWTH` on several numbers of devices.

    A model of many layers is extrapolated from two with few: each further layer costs the same.

    Args:
        timing: The device.
        devices: How many of them.
        report: Told what comes next.

    Returns:
        By name and devices; None where the weights do not fit into the devices' memory or cannot be cut so.
    """
    table: dict[tuple[str, int], Prediction | None] = {}
    for name, config in GROWTH.items():
        for count in devices:
            report(f"{name} on {count}")
            fits = 2 * config.num_parameters < 0.9 * count * timing.topology.memory_bytes.value
            try:
                table[name, count] = _extrapolate(config, count, timing) if fits else None
            except ConfigError:
                table[name, count] = None
    return table


def _extrapolate(config: ModelConfig, devices: int, timing: Timing) -> Prediction:
    if config.num_layers <= _MORE:
        return predict(config, devices, timing)

    def shortened(layers: int) -> Prediction:
        windows = config.sliding_windows[-layers:]
        made = dataclasses.replace(config, num_layers=layers, sliding_windows=windows)
        return predict(made, devices, timing)

    few, more = shortened(_FEW), shortened(_MORE)

    def line(at_few: float, at_more: float) -> float:
        return 1 / (1 / at_more + (config.num_layers - _MORE) * (1 / at_more - 1 / at_few) / (_MORE - _FEW))

    return Prediction(line(few.tokens_per_second, more.tokens_per_second), line(few.floor, more.floor))
