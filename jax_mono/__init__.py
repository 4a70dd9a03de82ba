"""jax_mono: language-model decoding under JAX as one resident kernel, one launch per generation."""

from __future__ import annotations

import importlib.metadata
import importlib.util

try:
    _distribution = importlib.metadata.distribution("jax-mono")
    __version__ = _distribution.version
except importlib.metadata.PackageNotFoundError:
    _distribution = None
    __version__ = "0+unknown"


def _submodule_path(path: list[str]) -> list[str]:
    """Returns the directories that submodules are imported from.

    A source checkout has a ``jax_mono/`` at its top that holds neither the compiled library nor
    ``jax_mono.models``. Python started there finds it before the installed package, which then
    takes over.

    Args:
        path: ``__path__`` as Python set it.
    """
    if _distribution is None or importlib.util.find_spec("jax_mono.models") is not None:
        return path
    installed = _distribution.locate_file("jax_mono")
    return [str(installed)] if installed.joinpath("__init__.py").is_file() else path


__path__ = _submodule_path(__path__)
