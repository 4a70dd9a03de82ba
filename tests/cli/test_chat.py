"""``jax-mono chat``: every turn goes on in the cache, and conversations can be kept."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from cli.conftest import END, write_checkpoint
from tiny import tiny

import jax_mono
from jax_mono.cli.chat import Talk
from jax_mono.decoder import Decoder
from jax_mono.sampling import GREEDY


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny("llama", vocab_size=320, eos_token_ids=(END,), max_position_embeddings=256)
    return write_checkpoint(tmp_path_factory.mktemp("chat") / "model", config)


@pytest.fixture(scope="module")
def decoder(checkpoint: Path) -> Decoder:
    return jax_mono.load(checkpoint, dtype=jnp.float32, blocks=1)


def make(decoder: Decoder, **options: object) -> Talk:
    return Talk(decoder, GREEDY, None, 12, **options)  # type: ignore[arg-type]


def silent(piece: str) -> None:
    pass


def test_turns_say_what_whole_prompts_would(decoder: Decoder) -> None:
    talk, turns = make(decoder, system="Be kind."), [{"role": "system", "content": "Be kind."}]
    for text in ("the quick brown fox", "return a + b", "more"):
        turns.append({"role": "user", "content": text})
        pieces: list[str] = []
        answer = talk.say(text, pieces.append)
        prompt = decoder.tokenizer.chat(turns)
        expected = decoder.generate(prompt, max_new_tokens=12, padded=True, stop=[END]).tokens
        assert answer == "".join(pieces) == decoder.tokenizer.decode(expected)
        turns.append({"role": "assistant", "content": answer})
        assert f"prompt {len(prompt)} tokens" in talk.summary
    # Everything up to the last answer was in the cache.
    cached = int(talk.summary.rpartition(", ")[2].split()[0])
    assert cached >= len(decoder.tokenizer.chat(turns[:4], add_generation_prompt=False)) // 2


def test_undo_reset_and_the_end_of_the_context(decoder: Decoder) -> None:
    talk = make(decoder)
    first = talk.say("the quick", silent)
    talk.say("brown", silent)
    talk.undo()
    assert len(talk.turns) == 2
    talk.undo()
    with pytest.raises(ValueError, match="nothing to undo"):
        talk.undo()
    assert talk.say("the quick", silent) == first
    talk.reset()
    assert talk.say("the quick", silent) == first
    with pytest.raises(ValueError, match="/undo, /reset"):
        talk.say("word " * 300, silent)
    assert len(talk.turns) == 2
    assert talk.say("still there?", silent)


def test_saved_conversations_go_on(decoder: Decoder, tmp_path: Path) -> None:
    talk, file = make(decoder, system="Be kind."), str(tmp_path / "talk.json")
    talk.say("déjà vu", silent)
    talk.save(file)
    other = make(decoder)
    other.load(file)
    assert (other.turns, other.system) == (talk.turns, "Be kind.")
    assert other.say("more", silent) == talk.say("more", silent)
    damaged = ("", "[]", '{"messages": 1}', '{"messages": [{"role": "user"}]}')
    for text in (*damaged, json.dumps({"messages": [{"role": "user", "content": "a"}]})):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match="not a conversation"):
            other.load(str(tmp_path / "bad.json"))
    assert len(other.turns) == 4


def test_a_piped_conversation(run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["the quick", "", f"/save {tmp_path / 'a.json'}", "/save", "/nonsense", "/help", "brown", "/quit", "never"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    ran = run("chat", "-c", checkpoint, "--dtype", "float32", "--blocks", "1", "-n", "6")
    assert ran.code == 0
    saved = json.loads((tmp_path / "a.json").read_text())
    assert ran.out.startswith(saved["messages"][1]["content"])
    assert ran.err.count(" tokens/s; first token after ") + ran.err.count("tokens (stop)") >= 1
    for words in ("/save needs a file", "there is no command /nonsense", "/undo       forget"):
        assert words in ran.err


def test_a_model_without_a_template(run, laneformer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    ran = run("chat", "-c", laneformer, "--blocks", "1")
    assert ran.code == 0 and "has no chat template" in ran.err
