"""Optional dependencies: imported where they are used, with an error that says what to install."""

from __future__ import annotations

import importlib
from types import ModuleType


class MissingExtraError(ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""


def require(module: str, extra: str) -> ModuleType:
    """Imports an optional dependency.

    Args:
        module: Absolute name of the module, for example ``safetensors``.
        extra: The extra of this package that installs it, for example ``hf``.

    Returns:
        The imported module.

    Raises:
        MissingExtraError: If the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # Something missing inside an installed module is that module's problem: show it as it is.
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise MissingExtraError(
            f"the Python package {error.name!r} is not installed; run: pip install 'jax-mono[{extra}]'"
        ) from error
