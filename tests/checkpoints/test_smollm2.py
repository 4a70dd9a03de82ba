"""The real SmolLM2-135M-Instruct, from its GGUF file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from jax_mono.hub import resolve
from jax_mono.models import preset
from jax_mono.models.gguf import KINDS, GGUFCheckpoint
from jax_mono.models.hf import export_hf
from jax_mono.models.source import tensor_shapes
from jax_mono.tokenizer import Tokenizer

pytestmark = pytest.mark.smollm2

PROMPT = [{"role": "user", "content": "Write a Python function that adds two numbers."}]


@pytest.fixture(scope="module")
def source(smollm2_gguf: Path) -> GGUFCheckpoint:
    return GGUFCheckpoint(smollm2_gguf)


@pytest.fixture(scope="module")
def tokenizer(smollm2_gguf: Path) -> Tokenizer:
    return Tokenizer.open(smollm2_gguf)


def test_the_name_finds_the_file(smollm2_gguf: Path) -> None:
    assert resolve("smollm2-135m-instruct") == smollm2_gguf


def test_configuration(source: GGUFCheckpoint) -> None:
    assert source.config == preset("smollm2-135m-instruct")
    assert source.config.num_parameters == 134_515_008
    kinds = Counter(KINDS[tensor.kind][0] for tensor in source.file.tensors.values())
    assert kinds == {"F32": 61, "Q4_1": 210, "Q8_0": 1}


def test_tokens(tokenizer: Tokenizer) -> None:
    # As the published tokenizer encodes them.
    assert tokenizer.vocab_size == 49152
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (2,))
    text = "Hello world 1234, déjà vu 🦊\n\tx"
    ids = [19556, 905, 216, 33, 34, 35, 36, 28, 32564, 90, 16739, 386, 101, 15107, 116, 228, 198, 197, 104]
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == text
    stream = tokenizer.stream()
    assert "".join([*(stream.feed(token) for token in ids), stream.flush()]) == text


def test_chat_template(tokenizer: Tokenizer) -> None:
    assert tokenizer.render_chat(PROMPT) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWrite a Python function that adds two numbers.<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer.chat(PROMPT)
    assert ids[:6] == [1, 9690, 198, 2683, 359, 253]
    assert ids[-4:] == [1, 520, 9531, 198]


def test_transformers_reads_the_same_tokens(smollm2_gguf: Path, tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    for text in (
        "def f(x):\n    return x**2  # 12.5%\n\n\n",
        "  spaces   and\ttabs 日本語 العربية 00123",
        "I'll they've IT'S <|im_start|>user\nHi<|im_end|>",
    ):
        assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False)


def test_every_tensor_is_sensible(source: GGUFCheckpoint) -> None:
    for path in source.paths():
        array = source.tensor(path, "bfloat16").astype(np.float32)
        assert array.shape == tensor_shapes(source.config)[path]
        assert np.isfinite(array).all(), path
        assert 0.01 < array.std() < 3, path


def test_exported_to_transformers_it_writes_python(
    tmp_path: Path, source: GGUFCheckpoint, tokenizer: Tokenizer
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    export_hf(source.config, source, tmp_path / "hf")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    prompt = tokenizer.chat(PROMPT)
    with torch.no_grad():
        tokens = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=30,
            do_sample=False,
            pad_token_id=source.config.eos_token_ids[0],
        )
    answer = tokenizer.decode(tokens[0, len(prompt) :].tolist())
    assert answer.startswith("```python\ndef add_two_numbers(num1, num2):\n    return num1 + num2")
