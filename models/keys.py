"""Reads configuration key by key and remembers which keys were read, so that none is overlooked."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from jax_mono.config import ConfigError

REQUIRED: Any = object()


class Keys:
    """A configuration whose every key must be read, skipped or refused.

    In all readers an absent key and ``null`` mean the default; without a default they are an error.

    Attributes:
        where: Name of the file, for messages.
    """

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.where = where
        self._raw = raw
        self._seen: set[str] = set()

    def skip(self, names: Collection[str]) -> None:
        """Marks keys as harmless."""
        self._seen.update(names)

    def take(self, name: str, default: Any = REQUIRED) -> Any:
        """Reads a key of any type."""
        self._seen.add(name)
        value = self._raw.get(name)
        if value is None and default is REQUIRED:
            raise ConfigError(f"{self.where}: the key {name!r} is missing")
        return default if value is None else value

    def check(self, condition: bool, name: str, value: Any, problem: str = "is not supported") -> None:
        """Refuses a value.

        Raises:
            ConfigError: Naming key and value, if ``condition`` is false.
        """
        if not condition:
            raise ConfigError(f"{self.where}: {name} {value!r} {problem}")

    def integer(self, name: str, default: Any = REQUIRED) -> Any:
        """Reads an integer."""
        value = self.take(name, default)
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        self.check(is_integer or value is default, name, value, "is not an integer")
        return value

    def number(self, name: str, default: Any = REQUIRED) -> Any:
        """Reads an integer or a float, as a float."""
        value = self.take(name, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        self.check(is_number or value is default, name, value, "is not a number")
        return float(value) if is_number else value

    def boolean(self, name: str, default: Any = REQUIRED) -> Any:
        """Reads a truth value."""
        value = self.take(name, default)
        self.check(isinstance(value, bool) or value is default, name, value, "is neither true nor false")
        return value

    def one_of(self, name: str, default: str, allowed: tuple[str, ...]) -> str:
        """Reads one of a few words."""
        value = self.take(name, default)
        self.check(value in allowed, name, value, f"is not supported; known: {', '.join(allowed)}")
        return value

    def layers(self, name: str, count: int) -> list[int] | None:
        """Reads a list of layer numbers, sorted; None where the key is absent."""
        value = self.take(name, None)
        if value is None:
            return None
        self.check(isinstance(value, list), name, value, "is not a list of layer numbers")
        for layer in value:
            valid = isinstance(layer, int) and not isinstance(layer, bool) and 0 <= layer < count
            self.check(valid, name, value, f"names layer {layer!r}; the model has layers 0 to {count - 1}")
        return sorted(set(value))

    def neutral(self, name: str, value: Any) -> None:
        """Accepts a key only with the value that changes nothing."""
        found = self.take(name, value)
        self.check(found == value, name, found, f"is not supported, only {value!r}")

    def finish(self) -> None:
        """Refuses the keys that nothing has read.

        Raises:
            ConfigError: Naming them.
        """
        unknown = sorted(set(self._raw) - self._seen)
        if unknown:
            shown = ", ".join(f"{name} = {self._raw[name]!r}" for name in unknown)
            raise ConfigError(
                f"{self.where}: unknown keys, which may change what the model computes: {shown}. "
                "If they do not, pass their names as ignore_keys"
            )
