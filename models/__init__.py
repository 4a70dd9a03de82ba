"""Reference models in Flax NNX, their presets, and the formats that their weights come from.

``layers`` holds the mathematics as pure functions, ``transformer`` the modules that own the parameters.
"""

from __future__ import annotations

from jax_mono.models.presets import PRESETS, preset
from jax_mono.models.transformer import KVCache, Transformer, abstract_params, params

__all__ = ["PRESETS", "KVCache", "Transformer", "abstract_params", "params", "preset"]
