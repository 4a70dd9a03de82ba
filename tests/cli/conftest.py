"""Small checkpoints on disk, with tokenizers, and a way to run commands in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tokenizers
from tiny import random_params, tiny
from tokenizers import decoders, models, pre_tokenizers, trainers

from jax_mono.cli import main
from jax_mono.config import ModelConfig
from jax_mono.models.hf import export_hf

END = 1
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|bos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]


class Ran(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def record(self) -> dict[str, Any]:
        """The JSON object that it printed, and nothing else."""
        return json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


Run = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process."""

    def call(*arguments: object) -> Ran:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Ran(code, *capsys.readouterr())

    return call


def make_tokenizer() -> tokenizers.Tokenizer:
    """A byte-level tokenizer of 320 tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(
        ["the quick brown fox jumps over the lazy dog", "return a + b", "déjà vu 日本"] * 9, trainer
    )
    return backend


def write_checkpoint(directory: Path, config: ModelConfig, *, template: str | None = TEMPLATE) -> Path:
    """A Hugging Face directory with random weights and a tokenizer."""
    export_hf(config, random_params(config), directory)
    make_tokenizer().save(str(directory / "tokenizer.json"))
    about = {"eos_token": "<|end|>", "chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(about))
    return directory


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that ends its turns."""
    config = tiny("llama", vocab_size=320, eos_token_ids=(END,))
    return write_checkpoint(tmp_path_factory.mktemp("chat") / "model", config)


@pytest.fixture(scope="session")
def laneformer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model with eight lanes, without a template."""
    config = tiny("laneformer", vocab_size=320, eos_token_ids=(END,))
    return write_checkpoint(tmp_path_factory.mktemp("lanes") / "model", config, template=None)
