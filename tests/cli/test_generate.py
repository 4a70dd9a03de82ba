"""``jax-mono generate``: the same tokens as the library, every way to end, every way to be wrong."""

from __future__ import annotations

import io
import json
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cli.conftest import END, make_tokenizer

import jax_mono
from jax_mono.decoder import Decoder
from jax_mono.tokenizer import StreamDecoder, Tokenizer

KEYS = {
    "model",
    "prompt_tokens",
    "tokens",
    "text",
    "finish_reason",
    "logprobs",
    "top",
    "timings",
    "seed",
    "dtype",
    "context",
    "backend",
    "form",
    "devices",
    "blocks",
    "variant",
}
PROMPT = "the quick brown fox"


@pytest.fixture
def base(chat_model: Path) -> list[object]:
    """Arguments of a short float32 run, without a template."""
    return ["generate", "-c", chat_model, "--no-chat", "-p", PROMPT, "-n", "8", "--dtype", "float32", "--blocks", "2"]


def test_what_cannot_be_compressed_is_refused(run, base: list[object]) -> None:
    ran = run(*base, "--compress")
    assert ran.code != 0 and "only bfloat16 weights can be compressed" in ran.err
    ran = run("generate", "-p", "class", "-n", "2", "--compress")
    assert ran.code != 0 and "multiple of 128 columns per lane" in ran.err
    assert run("generate", "-p", "class", "-n", "2", "--no-compress").code == 0


def test_without_a_name_the_model_that_ships_goes_on_with_code(run) -> None:
    record = run("generate", "-p", "class Matrix:", "-n", "12", "--json").record
    assert (record["model"], record["text"][:9]) == ("mini-coder", "\n    def ")
    ran = run("generate", "-p", "Hello", "--system", "Be kind.")
    assert (ran.code, ran.out) == (2, "") and "no chat template; use a model tuned for conversation" in ran.err


def test_text_goes_to_stdout_and_timings_to_stderr(run, base, chat_model: Path) -> None:
    record = run(*base, "--json").record
    ran = run(*base)
    assert (ran.code, ran.out) == (0, record["text"] + "\n")
    (line,) = ran.err.splitlines()
    assert line.startswith("jax-mono: 8 tokens (length); ") and "tokens/s" in line and "float32" in line
    assert run(*base, "--quiet").err == ""


def test_record(run, base, chat_model: Path) -> None:
    ran = run(*base, "--json", "--top-logprobs", "3")
    record, tokenizer = ran.record, Tokenizer.open(chat_model)
    assert (ran.code, set(record)) == (0, KEYS)
    assert record["prompt_tokens"] == tokenizer.encode(PROMPT)
    assert len(record["tokens"]) == len(record["logprobs"]) == len(record["top"]) == 8
    assert record["text"] == tokenizer.decode(record["tokens"])
    assert record["finish_reason"] == "length"
    for token, logprob, row in zip(record["tokens"], record["logprobs"], record["top"], strict=True):
        assert row[0]["token"] == token
        assert row[0]["logprob"] == pytest.approx(logprob, abs=1e-5)
        assert len(row) == 3 and row[0]["logprob"] >= row[1]["logprob"] >= row[2]["logprob"]
    assert set(record["timings"]) == {"load_s", "pack_s", "first_token_s", "total_s", "tokens_per_s"}
    assert all(value > 0 for value in record["timings"].values())
    assert (record["devices"], record["blocks"], record["dtype"], record["backend"]) == (1, 2, "float32", "kernel")
    assert record["context"] == 64

    decoder = jax_mono.load(chat_model, dtype=jnp.float32, blocks=2, context=record["context"])
    assert decoder.generate(PROMPT, max_new_tokens=8).tokens == record["tokens"]


def test_flax_backend_says_the_same(run, base) -> None:
    kernel = run(*base, "--json", "--top-logprobs", "2").record
    flax = run(*base, "--json", "--top-logprobs", "2", "--backend", "flax").record
    assert flax["tokens"] == kernel["tokens"]
    np.testing.assert_allclose(flax["logprobs"], kernel["logprobs"], atol=1e-4)
    assert [[entry["token"] for entry in row] for row in flax["top"]] == [
        [entry["token"] for entry in row] for row in kernel["top"]
    ]
    assert (flax["backend"], flax["variant"], flax["blocks"]) == ("flax", None, None)


def test_flax_backend_ends_like_the_kernel(run, base) -> None:
    third = run(*base, "--json").record["tokens"][2]
    ran = run(*base, "--json", "--backend", "flax", "--stop-token", third)
    assert (ran.record["finish_reason"], ran.record["tokens"][-1]) == ("stop", third)
    assert run(*base, "--json", "--backend", "flax", "--deadline", "1e-9").record["finish_reason"] == "deadline"


def test_forms_and_devices_agree(run, laneformer: Path) -> None:
    arguments = ["generate", "-c", laneformer, "-p", PROMPT, "-n", "8", "--dtype", "float32", "--json", "--blocks", "1"]
    one = run(*arguments, "--devices", "2").record
    mesh = run(*arguments, "--devices", "2", "--form", "mesh").record
    assert one["tokens"] == mesh["tokens"]
    assert (one["form"], mesh["form"], mesh["devices"]) == ("threads", "mesh", 2)


def test_sampling_follows_the_seed(run, base) -> None:
    options = ["--json", "--temperature", "1.5", "--top-k", "50", "--top-p", "0.95", "--min-p", "0.01"]
    options += ["--repetition-penalty", "1.1"]
    first, again, other = (run(*base, *options, "--seed", seed).record for seed in (1, 1, 2))
    assert first["tokens"] == again["tokens"] != other["tokens"]
    drawn = run(*base, *options).record
    assert run(*base, *options, "--seed", drawn["seed"]).record["tokens"] == drawn["tokens"]


def test_sampling_options_without_temperature_are_remarked(run, base) -> None:
    assert "change nothing at --temperature 0" in run(*base, "--top-k", "5").err


def test_stop_tokens(run, base) -> None:
    tokens = run(*base, "--json").record["tokens"]
    place = next(index for index in range(1, 8) if tokens[index] not in tokens[:index])
    record = run(*base, "--json", "--stop-token", f"{tokens[place]},300").record
    assert record["finish_reason"] == "stop"
    assert record["tokens"] == tokens[: place + 1]


def test_end_of_text_tokens_are_the_tokenizers_too(run, tmp_path: Path, chat_model: Path, base) -> None:
    token = run(*base, "--json").record["tokens"][0]
    model = shutil.copytree(chat_model, tmp_path / "model")
    (model / "tokenizer_config.json").write_text(json.dumps({"eos_token": make_tokenizer().id_to_token(token)}))
    arguments = [model if argument == chat_model else argument for argument in base]
    record = run(*arguments, "--json").record
    assert (record["tokens"], record["finish_reason"]) == ([token], "stop")
    assert len(run(*arguments, "--json", "--ignore-eos").record["tokens"]) == 8


def test_as_many_tokens_as_fit(run, base) -> None:
    ran = run(*base, "-n", "1000", "--json", "--ignore-eos")
    total = len(ran.record["prompt_tokens"]) + len(ran.record["tokens"])
    assert (total, ran.record["finish_reason"]) == (128, "length")
    assert "fit into the context of 128" in ran.err
    assert run(*base, "--context", "128", "--json").record["context"] == 128


def test_deadline(run, base) -> None:
    ran = run(*base, "--json", "--deadline", "1e-6")
    assert (ran.code, ran.record["finish_reason"]) == (0, "deadline")
    assert len(ran.record["tokens"]) < 8


@pytest.mark.parametrize("backend", ["kernel", "flax"])
def test_interrupt_keeps_what_there_is(run, base, monkeypatch, backend: str) -> None:
    feed, calls = StreamDecoder.feed, []

    def interrupting(self: StreamDecoder, token: int) -> str:
        calls.append(token)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return feed(self, token)

    monkeypatch.setattr(StreamDecoder, "feed", interrupting)
    ran = run(*base, "--ignore-eos", "-n", "100", "--json", "--backend", backend)
    record = ran.record
    assert (ran.code, record["finish_reason"]) == (130, "cancelled")
    assert 3 <= len(record["tokens"]) <= 100
    assert len(record["tokens"]) == len(record["logprobs"])

    calls.clear()
    ran = run(*base, "--ignore-eos", "-n", "100", "--backend", backend)
    assert ran.code == 130
    assert ran.out.endswith("\n") and "(cancelled)" in ran.err


def test_prompts_come_from_everywhere(run, base, monkeypatch, tmp_path: Path) -> None:
    expected = run(*base, "--json").record["tokens"]
    without = [*base[:4], *base[6:]]
    assert base[4] == "-p"
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT)
    assert run(*without, "--prompt-file", file, "--json").record["tokens"] == expected
    for extra in ([], ["--prompt-file", "-"]):
        monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
        assert run(*without, *extra, "--json").record["tokens"] == expected

    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert run(*without)[::2] == (2, "jax-mono: error: the prompt is empty\n")
    terminal = io.StringIO("")
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stdin", terminal)
    assert "there is no prompt" in run(*without).err
    file.write_bytes(b"\xff")
    assert "not UTF-8" in run(*without, "--prompt-file", file).err
    assert run(*without, "--prompt-file", tmp_path / "none").code == 2


def test_chat_is_for_models_that_end_their_turns(run, chat_model: Path, tmp_path: Path, laneformer: Path) -> None:
    tokenizer = Tokenizer.open(chat_model)
    arguments = ["-p", "Hi", "-n", "1", "--dtype", "float32", "--blocks", "2", "--json"]
    turn = tokenizer.chat([{"role": "user", "content": "Hi"}])
    assert END in turn
    assert run("generate", "-c", chat_model, *arguments).record["prompt_tokens"] == turn

    # A base model with its sibling's template: the template's end is not its own.
    model = shutil.copytree(chat_model, tmp_path / "base")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"eos_token_id": 7}))
    about = json.loads((model / "tokenizer_config.json").read_text())
    about |= {"eos_token": "<|bos|>", "chat_template": about["chat_template"].replace("eos_token", "'<|end|>'")}
    (model / "tokenizer_config.json").write_text(json.dumps(about))
    assert run("generate", "-c", model, *arguments).record["prompt_tokens"] == tokenizer.encode("Hi")
    assert run("generate", "-c", model, *arguments, "--chat").record["prompt_tokens"] == turn

    system = run("generate", "-c", chat_model, *arguments, "--system", "Be brief.").record["prompt_tokens"]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert system == tokenizer.chat(messages)
    assert "--no-chat" in run("generate", "-c", chat_model, *arguments, "--system", "x", "--no-chat").err
    assert "no chat template" in run("generate", "-c", laneformer, *arguments, "--system", "x").err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-c", "/nowhere"], "'/nowhere' is neither a file or directory"),
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--top-p", "0"], "top_p is 0.0"),
        (["--backend", "flax", "--temperature", "1"], "greedy only"),
        (["--backend", "flax", "--devices", "2"], "one device"),
        (["--context", "129"], "beyond this model's longest context of 128"),
        (["--context", "3"], "leaves no room"),
        (["--devices", "17", "--blocks", "1"], "devices is 17"),
        (["--devices", "9", "--blocks", "1", "--form", "mesh"], "needs 9 JAX devices, there are 8"),
        (["--blocks", "999"], "999 blocks are too many"),
        (["--stop-token", "999"], "stop token 999"),
        (["--top-logprobs", "999"], "top_logprobs is 999"),
    ],
)
def test_bad_input(run, base, options: list[str], message: str) -> None:
    ran = run(*base, *options)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("jax-mono: error: ") and message in ran.err
    assert ran.err.count("\n") == 1


def test_a_checkpoint_without_tokenizer(run, base, chat_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(chat_model, tmp_path / "model")
    (model / "tokenizer.json").unlink()
    ran = run(*[model if argument == chat_model else argument for argument in base])
    assert ran.code == 2 and "no tokenizer here" in ran.err


def test_a_call_that_fails(run, base, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise jax.errors.JaxRuntimeError("ABORTED: jax_mono: device 0, block 0 waited too long\nstack")

    monkeypatch.setattr(Decoder, "stream", fail)
    ran = run(*base)
    assert (ran.code, ran.err) == (1, "jax-mono: error: ABORTED: jax_mono: device 0, block 0 waited too long\n")
