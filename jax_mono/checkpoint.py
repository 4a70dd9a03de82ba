"""Orbax checkpoints in and out, and one way to open a checkpoint of any format.

An Orbax checkpoint is a directory with two items: ``config`` (JSON) and ``params`` (arrays under their
canonical paths). Arrays are stored whole whatever their sharding was, so that a checkpoint written by one
number of devices is read by any other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from jax_mono.atomic import new_directory
from jax_mono.config import ConfigError, Lanes, ModelConfig, RopeScaling
from jax_mono.models.gguf import GGUFCheckpoint
from jax_mono.models.hf import HFCheckpoint
from jax_mono.models.source import (
    ArraySource,
    CheckpointError,
    OnTensor,
    Params,
    WeightSource,
    check_names,
    check_shape,
    convert,
    read_params,
    tensor_shapes,
    unflatten,
    weight_dtype,
)

_FORMAT = 1

Sharding = Any
"""A ``jax.sharding.Sharding``, or a function from canonical path to one."""


def config_to_dict(config: ModelConfig) -> dict[str, Any]:
    """Turns a configuration into JSON types; ``config_from_dict`` reads it back."""
    return dataclasses.asdict(config)


def config_from_dict(raw: Mapping[str, Any]) -> ModelConfig:
    """Reads a configuration written by ``config_to_dict``.

    Args:
        raw: Parsed JSON.

    Returns:
        The configuration, validated.

    Raises:
        ConfigError: If a field is unknown or missing.
    """
    fields = dict(raw)
    for name, kind in (("rope_scaling", RopeScaling), ("lanes", Lanes)):
        if fields.get(name) is not None:
            fields[name] = _build(kind, fields[name])
    for name in ("sliding_windows", "eos_token_ids"):
        if name in fields:
            fields[name] = tuple(fields[name])
    return _build(ModelConfig, fields)


def _build(kind: type, fields: Mapping[str, Any]) -> Any:
    known = {field.name for field in dataclasses.fields(kind)}
    for problem, names in (("unknown", set(fields) - known), ("missing", known - set(fields))):
        if names:
            raise ConfigError(
                f"{kind.__name__}: {problem} fields {', '.join(sorted(names))}; "
                "the configuration was written by another version of jax_mono"
            )
    return kind(**fields)


def save(
    path: str | Path,
    config: ModelConfig,
    params: WeightSource | Mapping[Any, Any],
    *,
    overwrite: bool = False,
) -> None:
    """Writes an Orbax checkpoint. It appears under its name only once it is complete.

    Args:
        path: Directory to write.
        config: The model.
        params: A parameter tree of numpy or JAX arrays, sharded ones included, or any checkpoint of the
            model. Other checkpoints than trees are read into memory first.
        overwrite: Whether an existing directory is replaced.

    Raises:
        FileExistsError: If the directory has content and ``overwrite`` is false.
        CheckpointError: If the tree does not belong to the configuration.
    """
    import orbax.checkpoint as ocp

    source = ArraySource(config, read_params(params) if isinstance(params, WeightSource) else params)
    items = ocp.args.Composite(
        config=ocp.args.JsonSave({"format": _FORMAT, "model": config_to_dict(config)}),
        params=ocp.args.PyTreeSave(source.arrays),
    )
    with (
        new_directory(Path(path).absolute(), overwrite=overwrite) as fresh,
        ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer,
    ):
        checkpointer.save(fresh, items, force=True)  # force: the fresh directory is there, and empty


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turns what Orbax raises on damaged files into one kind of error."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged or incomplete Orbax checkpoint ({error}); copy it again") from error


class OrbaxCheckpoint:
    """An Orbax checkpoint as a ``WeightSource``.

    Attributes:
        path: The directory.
        config: The model.
    """

    def __init__(self, path: str | Path) -> None:
        """Opens a checkpoint: reads its configuration and the shapes of its arrays.

        Args:
            path: The directory.

        Raises:
            CheckpointError: If the directory is not such a checkpoint, or is damaged.
            ConfigError: If its configuration is not one of this version.
        """
        import orbax.checkpoint as ocp

        self.path = Path(path).absolute()
        if not _is_orbax(self.path):
            raise CheckpointError(f"{self.path}: not an Orbax checkpoint written by jax_mono.checkpoint.save")
        with _explained(self.path):
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
                raw = checkpointer.restore(self.path, ocp.args.Composite(config=ocp.args.JsonRestore())).config
            metadata = ocp.PyTreeCheckpointHandler().metadata(self.path / "params")
            self._stored = {key: (tuple(leaf.shape), np.dtype(leaf.dtype)) for key, leaf in metadata.tree.items()}
        if raw.get("format") != _FORMAT:
            raise CheckpointError(
                f"{self.path}: has format {raw.get('format')!r}, this version of jax_mono reads format {_FORMAT}"
            )
        self.config = config_from_dict(raw["model"])
        check_names(str(self.path), tensor_shapes(self.config), self._stored)
        for name, shape in tensor_shapes(self.config).items():
            check_shape(str(self.path), name, shape, self._stored[name][0])

    def paths(self) -> tuple[str, ...]:
        """Canonical paths of all tensors."""
        return tuple(tensor_shapes(self.config))

    def dtype(self, path: str) -> np.dtype:
        """The dtype of one tensor as stored."""
        return self._stored[path][1]

    def tensor(self, path: str, dtype: DTypeLike | None = None) -> np.ndarray:
        """Reads one tensor; see ``WeightSource.tensor``."""
        return convert(self.restore([path])[path], dtype)

    def restore(
        self, paths: Collection[str], dtype: DTypeLike | None = None, sharding: Sharding = None
    ) -> dict[str, Any]:
        """Reads some tensors, in parallel.

        Args:
            paths: Canonical paths.
            dtype: float32, bfloat16 or float16; None keeps what is stored.
            sharding: Where to; None for numpy arrays.

        Returns:
            Canonical path to numpy or JAX array. A device reads only its own part of an array.
        """
        import orbax.checkpoint as ocp

        def how(path: str) -> Any:
            target = self.dtype(path) if dtype is None else weight_dtype(dtype)
            if sharding is None:
                return ocp.RestoreArgs(restore_type=np.ndarray, dtype=target)
            place = sharding(path) if callable(sharding) else sharding
            return ocp.ArrayRestoreArgs(sharding=place, dtype=target)

        arguments = ocp.args.PyTreeRestore(
            item=dict.fromkeys(paths, 0),
            restore_args={path: how(path) for path in paths},
            partial_restore=True,
        )
        with _explained(self.path), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            return checkpointer.restore(self.path, ocp.args.Composite(params=arguments)).params


def restore(
    path: str | Path,
    *,
    dtype: DTypeLike | None = None,
    sharding: Sharding = None,
    on_tensor: OnTensor | None = None,
) -> tuple[ModelConfig, Params]:
    """Reads a whole Orbax checkpoint, onto any number of devices.

    Args:
        path: The directory.
        dtype: float32, bfloat16 or float16 for all tensors; None keeps what is stored.
        sharding: A ``jax.sharding.Sharding`` for all tensors, or a function from canonical path to one. None
            gives numpy arrays in host memory.
        on_tensor: Progress callback; tensors are read layer by layer.

    Returns:
        The configuration and the parameter tree.

    Raises:
        CheckpointError: If the checkpoint is missing, damaged or incomplete.
        ConfigError: If its configuration is not one of this version.
    """
    source = OrbaxCheckpoint(path)
    arrays: dict[str, Any] = {}
    for paths in _by_layer(source.paths()):
        arrays |= source.restore(paths, dtype, sharding)
        for name in paths if on_tensor is not None else ():
            on_tensor(name, arrays[name].nbytes)
    return source.config, unflatten({name: arrays[name] for name in source.paths()})


def _by_layer(paths: Collection[str]) -> list[list[str]]:
    groups: dict[str, list[str]] = {}
    for path in paths:
        groups.setdefault(".".join(path.split(".")[:2]) if path.startswith("layers.") else path, []).append(path)
    return list(groups.values())


def open_checkpoint(path: str | Path, *, ignore_keys: Collection[str] = ()) -> WeightSource:
    """Opens a checkpoint of any supported format.

    Args:
        path: A GGUF file, a Hugging Face directory or an Orbax directory.
        ignore_keys: Configuration keys of GGUF and Hugging Face files to ignore although they are unknown.

    Returns:
        The checkpoint, opened but with no weights read.

    Raises:
        CheckpointError: If there is nothing there, or nothing that is known.
    """
    path = Path(path)
    if path.is_file():
        return GGUFCheckpoint(path, ignore_keys=ignore_keys)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or directory")
    if _is_orbax(path):
        return OrbaxCheckpoint(path)
    if (path / "config.json").exists():
        return HFCheckpoint(path, ignore_keys=ignore_keys)
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return GGUFCheckpoint(files[0], ignore_keys=ignore_keys)
    raise CheckpointError(
        f"{path}: no checkpoint here; looked for config.json (Hugging Face), config/metadata and params/ "
        f"(Orbax) and one .gguf file (found {len(files)})"
    )


def _is_orbax(path: Path) -> bool:
    return (path / "config" / "metadata").is_file() and (path / "params").is_dir()
