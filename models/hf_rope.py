"""Rotary embedding keys of ``config.json``, in all their spellings."""

from __future__ import annotations

from typing import Any

from jax_mono.config import ConfigError, ModelConfig, RopeScaling
from jax_mono.models.keys import Keys


def parse_rope(keys: Keys, max_positions: int) -> tuple[float, RopeScaling | None]:
    """Reads base and scaling of the rotary frequencies.

    Understands ``rope_theta`` + ``rope_scaling``, ``rope_parameters`` (which holds both), and the Laneformer
    spelling ``rope_scaling_args``.

    Args:
        keys: The configuration.
        max_positions: ``max_position_embeddings``, the default of the original context.

    Returns:
        The base, and the scaling or None.

    Raises:
        ConfigError: If a kind of scaling or a key of it is not supported, or two spellings disagree.
    """
    theta = keys.number("rope_theta", None)
    outer_original = keys.integer("original_max_position_embeddings", None)
    thetas = [] if theta is None else [theta]
    scalings = []
    for name in ("rope_scaling", "rope_parameters"):
        raw = keys.take(name, None)
        if raw is not None:
            keys.check(isinstance(raw, dict), name, raw, "is not an object")
            inner = Keys(raw, f"{keys.where}: {name}")
            inner_theta = inner.number("rope_theta", None)
            thetas += [] if inner_theta is None else [inner_theta]
            scalings.append(_scaling(inner, outer_original, max_positions))
    raw = keys.take("rope_scaling_args", None)
    if raw is not None:
        keys.check(isinstance(raw, dict), "rope_scaling_args", raw, "is not an object")
        scalings.append(_lane_scaling(Keys(raw, f"{keys.where}: rope_scaling_args")))

    for name, values in (("rope_theta", thetas), ("rope scaling", scalings)):
        if any(value != values[0] for value in values):
            raise ConfigError(f"{keys.where}: {name} is given more than once and differs: {values}")
    return (thetas[0] if thetas else 10000.0), (scalings[0] if scalings else None)


def _scaling(keys: Keys, outer_original: int | None, max_positions: int) -> RopeScaling | None:
    old, kind = keys.take("type", None), keys.take("rope_type", None)
    if old is not None and kind is not None and old != kind:
        raise ConfigError(f"{keys.where}: type is {old!r} but rope_type is {kind!r}")
    kind = kind or old or "default"
    keys.neutral("partial_rotary_factor", 1.0)
    if kind == "default":
        keys.finish()
        return None
    keys.check(
        kind in ("linear", "llama3", "yarn"),
        "rope_type",
        kind,
        "is not supported; known: linear, llama3, yarn",
    )

    original = keys.integer("original_max_position_embeddings", outer_original)
    if None not in (original, outer_original) and original != outer_original:
        raise ConfigError(f"{keys.where}: original_max_position_embeddings differs from the one outside")
    if original is None:
        # A scaling that knows no original context takes the whole one, as transformers does.
        original = 0 if kind == "linear" else max_positions
    fields: dict[str, Any] = {"factor": keys.number("factor"), "original_max_position_embeddings": original}
    if kind == "llama3":
        fields |= {
            "low_freq_factor": keys.number("low_freq_factor"),
            "high_freq_factor": keys.number("high_freq_factor"),
        }
    if kind == "yarn":
        fields["beta_fast"] = keys.number("beta_fast", 32.0)
        fields["beta_slow"] = keys.number("beta_slow", 1.0)
        fields["attention_factor"] = keys.number("attention_factor", None)
        keys.neutral("truncate", True)
    keys.finish()
    return RopeScaling(kind=kind, **fields)


def _lane_scaling(keys: Keys) -> RopeScaling:
    scaling = RopeScaling(
        kind="llama3",
        factor=keys.number("scaling_factor"),
        low_freq_factor=keys.number("low_freq_factor"),
        high_freq_factor=keys.number("high_freq_factor"),
        original_max_position_embeddings=keys.integer("original_max_position_embeddings"),
    )
    keys.finish()
    return scaling


def rope_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Writes the rotary keys that ``parse_rope`` reads back.

    Args:
        config: The model.

    Returns:
        ``rope_theta`` and ``rope_scaling`` (``rope_scaling_args`` for the Laneformer's one kind).
    """
    scaling = config.rope_scaling
    if scaling is None:
        return {"rope_theta": config.rope_theta, "rope_scaling": None}
    raw: dict[str, Any] = {"factor": scaling.factor}
    if scaling.original_max_position_embeddings:
        raw["original_max_position_embeddings"] = scaling.original_max_position_embeddings
    if scaling.kind == "llama3":
        raw |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
        if config.family == "laneformer":
            raw["scaling_factor"] = raw.pop("factor")
            return {"rope_theta": config.rope_theta, "rope_scaling_args": raw}
    if scaling.kind == "yarn":
        raw |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        if scaling.attention_factor is not None:
            raw["attention_factor"] = scaling.attention_factor
    return {"rope_theta": config.rope_theta, "rope_scaling": {"rope_type": scaling.kind, **raw}}
