"""Text in and out: files of both formats, streams, chat templates."""

from __future__ import annotations

import itertools
import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from checkpoints.gguf_files import write
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from jax_mono.tokenizer import Tokenizer, TokenizerError

CORPUS = [
    "def add(a, b):\n    return a + b\n",
    "Hello world, it's 2024! déjà vu — naïve",
    "日本語 🦊👩‍👧 ok",
] * 4
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|bos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
DIGITS = pre_tokenizers.Digits(individual_digits=True)
MESSAGES = [{"role": "user", "content": " Hello 🦊 "}]


def byte_level(split: Any = None) -> tokenizers.Tokenizer:
    """A small byte-level BPE trained on a few lines."""
    backend = tokenizers.Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split in (None, DIGITS))
    backend.pre_tokenizer = level if split is None else pre_tokenizers.Sequence([split, level])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken("two words", normalized=False)])
    return backend


def sentencepiece_like() -> tokenizers.Tokenizer:
    """A small BPE with byte fallback and ``▁`` for spaces."""
    vocab = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "a",
        "b",
        "▁a",
        "ab",
        "▁ab",
    ]
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b"), ("▁", "ab")]
    numbers = {piece: number for number, piece in enumerate(vocab)}
    backend = tokenizers.Tokenizer(models.BPE(numbers, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


BYTE_LEVEL = Tokenizer(byte_level())
FALLBACK = Tokenizer(sentencepiece_like())


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A Hugging Face directory with a tokenizer."""
    byte_level().save(str(tmp_path / "tokenizer.json"))
    config = {
        "bos_token": {"content": "<|bos|>", "special": True},
        "eos_token": "<|end|>",
        "chat_template": TEMPLATE,
        "add_bos_token": True,
        "model_max_length": 128,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def edit(directory: Path, **changes: Any) -> None:
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def streamed(tokenizer: Tokenizer, ids: list[int], **options: Any) -> list[str]:
    decoder = tokenizer.stream(**options)
    return [*(decoder.feed(token) for token in ids), decoder.flush()]


def test_hugging_face_directory(directory: Path) -> None:
    tokenizer = Tokenizer.open(directory)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (0, (1,), 321)
    ids = tokenizer.encode("Hello 🦊")
    assert ids[0] == 0
    assert tokenizer.decode(ids) == "Hello 🦊"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|bos|>Hello 🦊"
    assert tokenizer.encode("Hello 🦊", add_special_tokens=False) == ids[1:]
    assert tokenizer.encode("<|user|>x")[1] == 2


def test_start_token_follows_the_configuration_then_the_post_processor(directory: Path) -> None:
    backend = byte_level()
    backend.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    backend.save(str(directory / "tokenizer.json"))
    assert Tokenizer.open(directory).encode("a").count(0) == 1
    edit(directory, add_bos_token=False)
    assert 0 not in Tokenizer.open(directory).encode("a")
    edit(directory, add_bos_token=None)
    assert Tokenizer.open(directory).encode("a").count(0) == 1


def test_chat_template(directory: Path) -> None:
    tokenizer = Tokenizer.open(directory)
    assert tokenizer.render_chat(MESSAGES) == "<|bos|><|user|>Hello 🦊<|end|>\n<|assistant|>"
    ids = tokenizer.chat(MESSAGES)
    assert ids[:2] == [0, 2]
    assert ids[-1] == 3
    assert tokenizer.chat(MESSAGES, add_generation_prompt=False) == ids[:-1]


def test_chat_template_places(directory: Path) -> None:
    edit(directory, chat_template=[{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}])
    assert Tokenizer.open(directory).render_chat([]) == "d"
    (directory / "chat_template.jinja").write_text("from a file")
    assert Tokenizer.open(directory).render_chat([]) == "from a file"


def test_end_tokens_of_the_generation_config(directory: Path) -> None:
    (directory / "generation_config.json").write_text('{"eos_token_id": [1, 3]}')
    assert Tokenizer.open(directory).eos_ids == (1, 3)
    (directory / "generation_config.json").write_text('{"eos_token_id": 4}')
    assert Tokenizer.open(directory).eos_ids == (1, 4)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ tools | tojson }}", '[{"ü": 1}]'),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "1"),
        ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),
        ("{{ strftime_now('%%') }}{{ eos_token }}", "%<|end|>"),
        ("{{ pad_token is defined }}", "False"),
    ],
)
def test_what_templates_expect(directory: Path, template: str, text: str) -> None:
    edit(directory, chat_template=template)
    assert Tokenizer.open(directory).render_chat([], tools=[{"ü": 1}]) == text


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses the messages: roles must alternate"),
        ("{{ messages.append(1) }}", "refuses the messages"),
        ("{{ ''.__class__.__mro__ }}", "refuses the messages"),
        ("{% if %}", "refuses the messages"),
    ],
)
def test_templates_that_fail_or_reach_out(directory: Path, template: str, message: str) -> None:
    edit(directory, chat_template=template)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.open(directory).chat([])


def test_without_a_template(directory: Path) -> None:
    edit(directory, chat_template=None)
    with pytest.raises(TokenizerError, match=r"this tokenizer has no chat template"):
        Tokenizer.open(directory).chat(MESSAGES)


def test_missing_and_damaged_files(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(TokenizerError, match=r"looked for tokenizer.json and one .gguf file"):
        Tokenizer.open(tmp_path / "empty")
    (directory / "tokenizer_config.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer_config.json: not readable as JSON"):
        Tokenizer.open(directory)
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer.json: not readable .* download it again"):
        Tokenizer.open(directory)
    with pytest.raises(TokenizerError, match=r"tokenizer.json: no such file"):
        Tokenizer.from_hf(tmp_path / "empty")


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_streams_of_text_are_the_text(text: str) -> None:
    ids = BYTE_LEVEL.encode(text)
    assert "".join(streamed(BYTE_LEVEL, ids)) == BYTE_LEVEL.decode(ids)
    if "▁" not in text and not any(token in text for token in ("<s>", "</s>", "<unk>")):
        ids = FALLBACK.encode(text)
        assert "".join(streamed(FALLBACK, ids)) == FALLBACK.decode(ids) == text


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 320), max_size=40), st.booleans())
def test_streams_of_any_tokens_are_what_decode_says(ids: list[int], skip: bool) -> None:
    text = BYTE_LEVEL.decode(ids, skip_special_tokens=skip)
    assert "".join(streamed(BYTE_LEVEL, ids, skip_special_tokens=skip)) == text


def test_a_stream_holds_back_incomplete_characters() -> None:
    ids = BYTE_LEVEL.encode("a🦜b", add_special_tokens=False)
    assert len(ids) == 5  # the bird is not in the corpus: its bytes are three tokens
    assert streamed(BYTE_LEVEL, ids) == ["a", "", "", "🦜", "b", ""]
    assert streamed(BYTE_LEVEL, ids[:3])[-1] == "\ufffd"
    ids = FALLBACK.encode("a🦜b")
    pieces = streamed(FALLBACK, ids)
    assert [piece for piece in pieces if piece] == ["a", "🦜", "b"]


def test_a_stream_of_invalid_bytes_is_not_held_back_for_ever() -> None:
    for tokenizer, name in ((BYTE_LEVEL, "ÿ"), (FALLBACK, "<0xFF>")):
        token = tokenizer.backend.token_to_id(name)
        pieces = streamed(tokenizer, [token] * 100)
        assert "".join(pieces) == "\ufffd" * 100
        assert sum(map(len, pieces[:50])) >= 40


def test_special_tokens_in_streams() -> None:
    ids = [0, *BYTE_LEVEL.encode("a two words"), 1]
    assert "".join(streamed(BYTE_LEVEL, ids)) == "a two words"
    assert "".join(streamed(BYTE_LEVEL, ids, skip_special_tokens=False)) == "<|bos|>a two words<|end|>"
    assert streamed(BYTE_LEVEL, [100_000]) == ["", ""]  # a row of the model's table that no token uses


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, FALLBACK], ids=["bytes", "fallback"])
def test_streaming_time_is_linear(tokenizer: Tokenizer) -> None:
    generator = random.Random(0)
    ids = [generator.randrange(5, 250) for _ in range(20_000)]

    def seconds(count: int) -> float:
        start = time.process_time()
        streamed(tokenizer, ids[:count])
        return time.process_time() - start

    short = min(seconds(2_000) for _ in range(3))
    assert seconds(20_000) < 40 * short  # quadratic would be 100


def gguf_metadata(backend: tokenizers.Tokenizer, **changes: Any) -> dict[str, Any]:
    """Describes a byte-level tokenizer as llama.cpp's converter does."""
    tokens = [backend.id_to_token(number) for number in range(backend.get_vocab_size())]
    added = backend.get_added_tokens_decoder()
    types = [1 if n not in added else 3 if added[n].special else 4 for n in range(len(tokens))]
    merges = json.loads(backend.to_str())["model"]["merges"]
    keys = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens,
        "token_type": types,
        "merges": [" ".join(pair) for pair in merges],
        "bos_token_id": 0,
        "eos_token_id": 1,
        "eot_token_id": 3,
        **changes,
    }
    named = {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}
    return named | {"tokenizer.chat_template": TEMPLATE}


SAMPLES = [
    *CORPUS[:3],
    "  spaces   and\ttabs\n\n\nlines  ",
    "I'll they've IT'S 1234567 12.5% a1b22",
    "x<|end|>y two words",
    "(foo)bar[0]='x'; // ünïcödé ①②③",
]


def test_gguf_byte_level(tmp_path: Path) -> None:
    backend = byte_level(DIGITS)
    path = write(tmp_path / "model.gguf", "llama", {}, {}, gguf_metadata(backend))
    tokenizer = Tokenizer.open(path)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (0, (1, 3), 321)
    for text in SAMPLES:
        assert tokenizer.encode(text) == backend.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text
    assert tokenizer.chat(MESSAGES)[:2] == [0, 2]
    assert Tokenizer.open(tmp_path).eos_ids == (1, 3)


# As Qwen and Llama 3 publish them in tokenizer.json.
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    ("pre", "pattern"),
    [
        ("qwen2", QWEN2),
        ("llama-bpe", QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")),
        ("gpt-2", None),
        (None, None),
    ],
)
def test_gguf_pre_tokenizers(tmp_path: Path, pre: str | None, pattern: str | None) -> None:
    split = None if pattern is None else pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    backend = byte_level(split)
    path = write(tmp_path / "model.gguf", "llama", {}, {}, gguf_metadata(backend, pre=pre))
    tokenizer = Tokenizer.from_gguf(path)
    for text in SAMPLES:
        assert tokenizer.encode(text, add_special_tokens=False) == backend.encode(text).ids
    # Only files of Llama 3 start with a special token where they do not say.
    assert (tokenizer.encode("a")[0] == 0) == (pre == "llama-bpe")


def test_gguf_says_whether_to_start_with_a_token(tmp_path: Path) -> None:
    keys = gguf_metadata(byte_level(), add_bos_token=True)
    assert Tokenizer.open(write(tmp_path / "model.gguf", "llama", {}, {}, keys)).encode("a")[0] == 0


def best_pairs_first(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's BPE, spelled out: joins the neighbours whose result scores best, again and again."""
    pieces = list("▁" + text.replace(" ", "▁"))
    while True:
        joined = [(scores.get(a + b, -1e9), -at) for at, (a, b) in enumerate(itertools.pairwise(pieces))]
        if not joined or max(joined)[0] == -1e9:
            break
        at = -max(joined)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return [
        piece
        for found in pieces
        for piece in ([found] if found in scores else [f"<0x{byte:02X}>" for byte in found.encode()])
    ]


def test_gguf_sentencepiece(tmp_path: Path) -> None:
    generator = random.Random(1)
    letters = "abcd▁"
    joined = {"".join(generator.choices(letters, k=k)) for k in (2, 2, 3, 3, 4) for _ in range(25)}
    learned = [*sorted(joined, key=len), *letters]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned]
    scores = [0.0] * 259 + [-float(n) for n in range(len(learned))]
    keys = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(learned),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    tokenizer = Tokenizer.open(write(tmp_path / "model.gguf", "llama", {}, {}, keys))
    by_piece = dict(zip(tokens[259:], scores[259:], strict=True))
    for _ in range(200):
        text = "".join(generator.choices("abcd é", k=generator.randrange(1, 30)))
        ids = tokenizer.encode(text)
        assert ids[0] == 1
        assert [tokens[i] for i in ids[1:]] == best_pairs_first(text, by_piece)
        assert tokenizer.decode(ids) == "".join(streamed(tokenizer, ids)) == text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "rwkv"}, "tokenizer model 'rwkv' is not supported; known: gpt2, llama"),
        ({"pre": "tekken"}, "pre-tokenizer 'tekken' is not supported; known: default, gpt-2, smollm, qwen2"),
    ],
)
def test_gguf_tokenizers_that_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "model.gguf", "llama", {}, {}, gguf_metadata(byte_level(), **changes))
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.open(path)


def test_gguf_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer model None is not supported"):
        Tokenizer.open(write(tmp_path / "model.gguf", "llama", {}, {}))


def test_bytes_of_single_tokens() -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    pieces = {"<0xE6>": 0, "\u2581the": 1, "</s>": 2}
    sentencepiece = Backend(models.BPE(vocab=pieces, merges=[], byte_fallback=True))
    sentencepiece.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback()])
    tokenizer = Tokenizer(sentencepiece)
    assert [tokenizer.token_bytes(token) for token in range(4)] == [b"\xe6", b" the", b"</s>", b""]

    byte_level = Backend(models.BPE(vocab={"\u0120the": 0, "\u00e6": 1}, merges=[]))
    byte_level.decoder = decoders.ByteLevel()
    assert [Tokenizer(byte_level).token_bytes(token) for token in range(3)] == [b" the", b"\xe6", b""]
