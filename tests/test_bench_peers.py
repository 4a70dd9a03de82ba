"""Baselines are worth their name: they compute the model that they are said to compute, and a run ends in time."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import bench_peers
import jax.numpy as jnp
import numpy as np
import pytest
from kernel.common import flax_logits, params_of, some_tokens
from peers import flax_loop, flax_params, flax_step, process
from peers.work import Missing, Work, dense_twin
from tiny import tiny

SMALL = ["--model", "tiny-laneformer", "--context", "40", "--position", "8", "--new-tokens", "6", "--runs", "2"]


def load_torch(model, params) -> None:
    """Copies the canonical tree of a dense model into the PyTorch decoder."""
    import torch

    def put(parameter, *arrays) -> None:
        joined = np.concatenate([np.array(array).reshape(-1, *parameter.shape[1:]) for array in arrays])
        parameter.copy_(torch.from_numpy(joined.reshape(parameter.shape)))

    put(model.embed, params["embed"])
    put(model.head.norm, params["norm"])
    if "lm_head" in params:
        put(model.head.weight, params["lm_head"])
    for index, layer in enumerate(model.layers):
        found = params["layers"][index]
        attention, ffn = found["attention"], found["feed_forward"]
        put(layer.wqkv, attention["wq"], attention["wk"], attention["wv"])
        if "bq" in attention:
            put(layer.bqkv, attention["bq"], attention["bk"], attention["bv"])
        if "q_norm" in attention:
            put(layer.q_norm, attention["q_norm"])
            put(layer.k_norm, attention["k_norm"])
        put(layer.wo, attention["wo"])
        put(layer.w13, ffn["w1"], ffn["w3"])
        put(layer.w2, ffn["w2"])
        put(layer.attention_norm, found["attention_norm"])
        put(layer.ffn_norm, found["ffn_norm"])


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"rope_interleaved": True, "sliding_windows": (3, 0), "num_layers": 2}),
        ("qwen2", {"num_layers": 1}),
        ("qwen3", {"num_layers": 1}),
    ],
)
def test_the_pytorch_decoder_equals_flax(family: str, changes: dict) -> None:
    torch = pytest.importorskip("torch")
    from peers.torch_model import Decoder

    config = tiny(family, **changes)
    params, tokens = params_of(config), some_tokens(12)
    expected = flax_logits(config, params, tokens)
    with torch.no_grad():
        model = Decoder(config, 16, torch.float32, "cpu")
        load_torch(model, params)
        for position, token in enumerate(tokens):
            logits, best = model(torch.tensor([token]), torch.tensor([position]))
            np.testing.assert_allclose(logits[0].numpy(), expected[position], atol=2e-4)
            assert int(best) == int(logits.argmax())


def test_the_dense_twin_has_as_many_weights() -> None:
    config = tiny("laneformer")
    assert dense_twin(config).num_parameters == config.num_parameters
    assert dense_twin(config).lanes is None
    dense = tiny("llama")
    assert dense_twin(dense) is dense


@pytest.mark.parametrize(("family", "layers"), [("laneformer", 3), ("llama", 1)])
def test_loops_compute_the_same_on_one_device_and_on_two(family: str, layers: int) -> None:
    config = tiny(family, num_layers=layers)
    texts = []
    for devices in (1, 2):
        work = Work(config, "float32", context=32, position=4, devices=devices)
        params = flax_params.make_params(work)
        cut = params["layers"][0]["feed_forward"]["w2"]
        assert len(cut.devices()) == devices and cut.addressable_shards[0].data.size == cut.size // devices
        texts.append([])
        token, cache = jnp.int32(1), flax_params.make_cache(work)
        for _ in range(2):  # ten steps of the loop at a time; the cache that it returns goes on
            start = np.int32(4 + 10 * len(texts[-1]))
            token, cache = flax_loop.generate(config, params, cache, token, start, np.int32(10))
            texts[-1].append(int(token))
    assert texts[0] == texts[1] == greedy(work, params, cache)


def greedy(work: Work, params, cache) -> list[int]:
    """Every tenth token of the loop of steps, in a cache that another loop has used."""
    token, text = jnp.int32(1), []
    for position in work.positions(20):
        token, _, _, cache = flax_step.step(work.config, params, cache, token, np.int32(position))
        text.append(int(token))
    return text[9::10]


def test_more_devices_than_there_are() -> None:
    with pytest.raises(Missing, match="9 devices are asked for, JAX has 8"):
        flax_params.make_params(Work(tiny("llama"), "float32", context=32, position=4, devices=9))
    with pytest.raises(ValueError, match="40 tokens from position 4 do not fit 32"):
        Work(tiny("llama"), "float32", context=32, position=4).positions(40)


@pytest.mark.parametrize("name", ["kernel", "limit", "flax-step", "flax-loop", "torch"])
def test_every_peer_measures(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "torch":
        torch = pytest.importorskip("torch")
        monkeypatch.setattr(torch, "compile", lambda model, **_: model)  # what it makes of toys takes a minute
        monkeypatch.setattr("torch._inductor.config.freezing", False)
        before = torch.is_grad_enabled()
        monkeypatch.setattr(torch, "set_grad_enabled", lambda wanted: None)
    arguments = SimpleNamespace(new_tokens=6, runs=3, run_seconds=10.0)
    work = Work(tiny("laneformer", num_layers=1), "bfloat16", context=32, position=8)
    row = bench_peers.measure(name, work, arguments)
    assert row["peer"] == name and row["runs"] == 3 and row["new_tokens"] == 6
    assert 0 < row["tokens_per_s_min"] <= row["tokens_per_s"] <= row["tokens_per_s_max"] and row["setup_s"] > 0
    json.dumps(row)
    if name == "torch":
        assert row["model_differs"] == "dense model of the same dimensions"
        assert torch.is_grad_enabled() == before


def test_what_is_not_installed_gets_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    row = bench_peers.measure("torch", Work(tiny("llama"), "bfloat16", context=32, position=8), SimpleNamespace())
    assert row == {"peer": "torch", "missing": "torch is not installed; pip install torch"}


def test_slow_peers_run_fewer_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Slow:
        def setup(self, work: Work) -> None:
            print("compilers talk")

        def tokens_per_s(self, tokens: int) -> float:
            asked.append(tokens)
            return 2.5

        def about(self) -> dict:
            return {}

    monkeypatch.setattr(flax_step, "FlaxStep", Slow)
    arguments = SimpleNamespace(new_tokens=64, runs=2, run_seconds=4.0)
    work = Work(tiny("llama"), "bfloat16", context=128, position=8)
    assert bench_peers.measure("flax-step", work, arguments)["new_tokens"] == 10 and asked == [4, 10, 10]


def test_processes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A peer in a process of its own, and one whose time is over before Python has started."""
    out = tmp_path / "peers.jsonl"
    assert bench_peers.main([*SMALL, "--peers", "limit", "--out", str(out)]) == 0
    printed, _ = capfd.readouterr()
    (row,) = (json.loads(line) for line in out.read_text().splitlines())
    assert json.loads(printed.splitlines()[0]) == row
    assert (row["peer"], row["model"], row["batch"], row["limit"]) == ("limit", "tiny-laneformer", 1, "read_bandwidth")
    assert "read_bandwidth" in printed.splitlines()[-1]
    assert bench_peers.main([*SMALL, "--peers", "flax-loop", "--deadline", "0.05"]) == 0
    assert "no result within 0.05 s; raise --deadline" in capfd.readouterr().out


def test_peers_that_take_turns(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "peers.jsonl"
    assert bench_peers.main([*SMALL, "--peers", "kernel,limit", "--in-turns", "--out", str(out)]) == 0
    kernel, limit = (json.loads(line) for line in out.read_text().splitlines())
    assert (kernel["peer"], limit["peer"]) == ("kernel", "limit") and kernel["in_turns"]
    assert kernel["tokens_per_s"] == sum(kernel["each_tokens_per_s"]) / 2
    parts = [a / b for a, b in zip(kernel["each_tokens_per_s"], limit["each_tokens_per_s"], strict=True)]
    assert f"{sum(parts) / 2:.1%}" in capfd.readouterr().out


PEER = """
import sys
for turn in range(2):
    print("ready", flush=True)
    sys.stdin.readline()
    with open(sys.argv[2], "a") as order:
        order.write(sys.argv[1])
print("by the way")
print('{"peer": "%s"}' % sys.argv[1])
"""


def test_turns_go_round(tmp_path: Path) -> None:
    order = tmp_path / "order"
    commands = {name: [sys.executable, "-c", PEER, name, str(order)] for name in "abc"}
    assert [row["peer"] for row in process.measure_in_turns(commands, 60.0)] == ["a", "b", "c"]
    assert order.read_text() == "abcabc"


def test_processes_that_fail_say_why_and_others_go_on(tmp_path: Path) -> None:
    commands = {
        "false": ["/bin/false"],
        "good": [sys.executable, "-c", PEER, "good", str(tmp_path / "order")],
        "hangs": [sys.executable, "-c", "print('ready', flush=True); import time; time.sleep(1000)"],
        "breaks": [sys.executable, "-c", "print('ready', flush=True); input(); raise ValueError('no such weights')"],
    }
    failed, good, late, broken = process.measure_in_turns(commands, 5.0)
    assert failed == {"peer": "false", "failed": "ended with 1 and said nothing"}
    assert good == {"peer": "good"}
    assert late == {"peer": "hangs", "failed": "no result within 5 s; raise --deadline"}
    assert broken["failed"].endswith("ValueError: no such weights")


def test_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_peers.main([*SMALL[:2], "--context", "20"]) == 2
    assert "--context must be from 144" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench_peers.main(["--peers", "nobody"])
    assert "no peer is called nobody; there are kernel, limit" in capsys.readouterr().err
