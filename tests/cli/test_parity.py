"""``jax-mono parity``: agrees where kernel and Flax agree, and fails, in the right place, where they do not."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from jax_mono.cli import compare
from jax_mono.decoder import Decoder
from jax_mono.output import Output, Scores
from jax_mono.stream import Token

TINY = ["parity", "--model", "tiny", "--random-weights", "--tokens", "24", "--new-tokens", "8", "--blocks", "1"]
LANES = ["parity", "--model", "tiny-laneformer", *TINY[3:]]


def test_float32_over_devices_and_forms(run) -> None:
    ran = run(*LANES, "--devices", "2", "--form", "both", "--json")
    record = ran.record
    assert (ran.code, record["ok"], record["dtype"], record["weights"]) == (0, True, "float32", "random")
    ways = [(result["devices"], result["form"]) for result in record["results"]]
    assert ways == [(2, "threads"), (2, "mesh")]
    for result in record["results"]:
        assert 0 <= result["max_logit_error"] < 2e-5
        assert abs(result["mean_kl"]) < 1e-9
        assert (result["forced"], result["generated"], result["tolerance"]) == (None, None, 1e-4)


def test_bfloat16_per_layer(run) -> None:
    ran = run(*TINY, "--dtype", "bfloat16", "--per-layer", "--json")
    (result,) = ran.record["results"]
    assert ran.code == 0 and 0 < result["max_logit_error"] < result["tolerance"]
    for layers in (result["prompt_layers"], result["decode_layers"]):
        assert [error["layer"] for error in layers] == [0, 1, 2, 3]
        assert all(error["relative"] < 0.02 for error in layers)


def test_checkpoint_and_tokens_file(run, chat_model: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.arange(30))
    ran = run("parity", "-c", chat_model, "--tokens-file", tmp_path / "t.npy", "--new-tokens", "8", "--per-layer")
    assert ran.code == 0
    assert "threads" in ran.out and "none, ok" in ran.out and "layer   2" in ran.out


def test_wrong_logits_fail(run, monkeypatch) -> None:
    score = Decoder.score

    def wrong(self: Decoder, *arguments: object, **options: object) -> Scores:
        scores = score(self, *arguments, **options)
        logits = scores.logits.copy()
        logits[5, 7] += 100.0
        return dataclasses.replace(scores, logits=logits)

    monkeypatch.setattr(Decoder, "score", wrong)
    ran = run(*TINY)
    assert ran.code == 1 and "NOT OK" in ran.out and "forced 5" in ran.out
    assert "beyond the tolerance" in ran.err
    ran = run(*TINY, "--tolerance", "101", "--json")
    (result,) = ran.record["results"]
    assert ran.code == 0 and result["forced"]["position"] == 5 and result["forced"]["found"] == 7


def test_wrong_tokens_and_keys_fail(run, monkeypatch) -> None:
    generate = Decoder.generate

    def wrong(self: Decoder, *arguments: object, **options: object) -> Output:
        output = generate(self, *arguments, **options)
        tokens = [*output.tokens[:3], (output.tokens[3] + 1) % 256, *output.tokens[4:]]
        cache = dataclasses.replace(output.cache, k=output.cache.k.at[0, 2, 1, 3].add(1.0))
        return dataclasses.replace(output, tokens=tokens, cache=cache)

    monkeypatch.setattr(Decoder, "generate", wrong)
    ran = run(*TINY, "--per-layer", "--json")
    (result,) = ran.record["results"]
    assert ran.code == 1 and result["generated"]["position"] == 3 and result["generated"]["margin"] > 0
    bad = [error["layer"] for error in result["prompt_layers"] if error["relative"] > 1e-4]
    assert bad == [2]


def test_nan_is_never_within_the_tolerance(run, monkeypatch) -> None:
    score = Decoder.score

    def wrong(self: Decoder, *arguments: object, **options: object) -> Scores:
        scores = score(self, *arguments, **options)
        return dataclasses.replace(scores, logits=np.full_like(scores.logits, np.nan))

    monkeypatch.setattr(Decoder, "score", wrong)
    ran = run(*TINY, "--json")
    assert ran.code == 1 and ran.record["results"][0]["max_logit_error"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "laneformer-2b"], "add --random-weights"),
        (["--model", "tiny"], "add --random-weights"),
        ([*TINY[1:], "--tokens", "1"], "at least two tokens"),
        ([*TINY[1:], "--tokens", "513"], "context of 512"),
        ([*TINY[1:], "--tolerance", "nan"], "must not be negative"),
        ([*LANES[1:], "--devices", "3"], "8 lanes do not divide over 3 devices"),
    ],
)
def test_bad_input(run, options: list[str], message: str) -> None:
    ran = run("parity", *options)
    assert ran.code == 2 and message in ran.err


def test_measures() -> None:
    a, b = np.log([[0.5, 0.25, 0.25]]).astype(np.float32), np.log([[0.25, 0.5, 0.25]]).astype(np.float32)
    assert compare.mean_kl(a, b) == pytest.approx(0.5 * math.log(2) + 0.25 * math.log(0.5), rel=1e-6)
    assert compare.mean_kl(a, a + 3.0) == pytest.approx(0.0, abs=1e-7)
    assert compare.max_error(a, b) == pytest.approx(math.log(2))
    assert math.isnan(compare.max_error(np.zeros((200, 2)), np.where(np.arange(400) == 3, np.nan, 0).reshape(200, 2)))
    assert compare.forced_divergence(a, a) is None
    found = compare.forced_divergence(a, b)
    assert found is not None and (found.position, found.expected, found.found) == (0, 0, 1)
    assert found.margin == pytest.approx(math.log(2))
    top = [[Token(4, -0.1), Token(5, -0.3)], [Token(6, -1.0), Token(7, -1.5)]]
    found = compare.generated_divergence([4, 6], [4, 7], top)
    assert found == compare.Divergence(1, 6, 7, 0.5)
