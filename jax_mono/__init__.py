"""jax_mono: language-model decoding under JAX as one resident kernel, one launch per generation."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from importlib.machinery import ModuleSpec, PathFinder


def _installed_spec() -> ModuleSpec | None:
    """Returns where the installed package is, if a source checkout was imported in its place.

    A checkout has a ``jax_mono/`` at its top that holds neither the compiled library nor
    ``jax_mono.models``, and Python started there finds it first. Nothing but this file is then taken
    from the checkout. An editable install maps everything itself and needs no help.
    """
    if importlib.util.find_spec("jax_mono.models") is not None:
        return None
    site_packages = importlib.metadata.distribution("jax-mono").locate_file("")
    return PathFinder.find_spec("jax_mono", [str(site_packages)])


try:
    __version__ = importlib.metadata.version("jax-mono")
    if (_installed := _installed_spec()) is not None:
        __spec__, __path__ = _installed, _installed.submodule_search_locations
        __file__ = _installed.origin
except importlib.metadata.PackageNotFoundError:
    __version__ = "0+unknown"

# Loaded on first use: a command that only prints help should not wait for JAX.
_EXPORTS = {
    "Cache": "jax_mono.decode",
    "Decoder": "jax_mono.decoder",
    "Finish": "jax_mono.decode",
    "GREEDY": "jax_mono.sampling",
    "Generation": "jax_mono.decode",
    "Lanes": "jax_mono.config",
    "ModelConfig": "jax_mono.config",
    "Output": "jax_mono.output",
    "Plan": "jax_mono.plan",
    "Sampling": "jax_mono.sampling",
    "Scores": "jax_mono.output",
    "Tapes": "jax_mono.tape",
    "Token": "jax_mono.stream",
    "TokenStream": "jax_mono.stream",
    "empty_cache": "jax_mono.decode",
    "generate": "jax_mono.decode",
    "load": "jax_mono.loading",
    "make_plan": "jax_mono.plan",
    "pack": "jax_mono.packing",
    "score": "jax_mono.decode",
}
__all__ = [*_EXPORTS, "__version__"]


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)
