"""Traces: what calls write, how it is read, added up, exported and drawn."""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from pathlib import Path

import jax
import numpy as np
import pytest
from kernel.common import Form, make_decoder, some_tokens
from tiny import tiny

from jax_mono import native
from jax_mono.decoder import Decoder
from jax_mono.extras import MissingExtraError
from jax_mono.trace import (
    LAYER_MARKS,
    MARKS,
    RECEIVING,
    Trace,
    TraceError,
    draw_token,
    median_token,
    phases,
    read_trace,
    trace_text,
    waits,
    write_perfetto,
)

LAYERS = 5


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    """Every block has attention to do at every position, so it comes to every moment."""
    return make_decoder(tiny("laneformer"), devices=2, blocks=2, kv_splits=1)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where calls write; tokens 3 to 6."""
    monkeypatch.setenv("JAX_MONO_TRACE", str(tmp_path / "call.trace"))
    monkeypatch.setenv("JAX_MONO_TRACE_TOKENS", "3,4")
    return tmp_path / "call.trace"


def made_trace(devices: int, blocks: int, layers: int = 2, tokens: int = 3, slow: int = 1) -> Trace:
    """Work takes a block 1,000 ns and the slow one 1,500; a hand-off takes 200 after the last block. Clocks differ."""
    moments = len(MARKS) + (layers - 1) * len(LAYER_MARKS)
    trace = Trace(tuple(range(devices)), 8, np.zeros((devices, blocks, tokens, moments), np.int64))
    now = np.full((devices, blocks), 10**9) + 10**7 * np.arange(devices)[:, None]
    work = np.where(np.arange(blocks) == slow, 1500, 1000)
    for token in range(tokens):
        for index, moment in enumerate(trace.moments):
            now = now.max(axis=1, keepdims=True) + np.full(blocks, 200) if moment.receives else now + work
            trace.noted[:, :, token, index] = now
    return trace


def write_file(path: Path, trace: Trace, device: int = 0, count: int | None = None) -> Path:
    """Writes what the native library writes for devices from ``device`` on."""
    count = len(trace.devices) if count is None else count
    _, blocks, tokens, moments = trace.noted.shape
    head = [0x6563617274, device, count, blocks, trace.num_layers, trace.first_token, tokens, moments]
    path.write_bytes(np.asarray(head, np.int64).tobytes() + trace.noted[device : device + count].tobytes())
    return path


def test_names_mirror_the_native_library() -> None:
    source = native.kernel_sources()["kernel/call.h"]
    body = re.sub(r"//.*", "", re.search(r"enum Mark : i32 \{(.*?)\}", source, re.S)[1])
    names = [re.sub(r"(?<!^)([A-Z])", r"_\1", name[1:]).lower() for name in re.findall(r"\bk\w+", body)]
    assert names == [*MARKS, "marks"]
    assert "kLayerMarks = kMlpMixed - kQkvInput + 1" in source and len(LAYER_MARKS) == 12
    assert set(RECEIVING) <= set(MARKS)


@pytest.mark.parametrize("form", ["threads", "mesh"])
def test_generating(form: Form, decoder: Decoder, file: Path) -> None:
    if form == "mesh":
        decoder = make_decoder(tiny("laneformer"), devices=2, blocks=2, kv_splits=1, form="mesh")
    decoder.generate(some_tokens(2), max_new_tokens=8)
    files = [file] if form == "threads" else [file.with_name(f"{file.name}.{device}") for device in range(2)]
    assert sorted(file.parent.iterdir()) == files
    trace = read_trace(*reversed(files))
    check(trace)
    assert list(trace.tokens) == [3, 4, 5, 6] and trace.noted.shape[:2] == (2, 2) and trace.num_layers == LAYERS
    if form == "mesh":
        with pytest.raises(TraceError, match="not of one call"):
            read_trace(files[0], files[0])


def test_scoring(decoder: Decoder, file: Path) -> None:
    decoder.score(some_tokens(5))
    trace = read_trace(file)
    check(trace)
    assert list(trace.tokens) == [3, 4]


def check(trace: Trace) -> None:
    """Every block notes every moment, in order, and none before others computed what it receives."""
    assert (trace.noted > 0).all()
    flat = trace.noted.reshape(*trace.noted.shape[:2], -1)
    assert (np.diff(flat, axis=-1) >= 0).all()
    names = [moment.name for moment in trace.moments]
    # A block reads of q, k and v only what some blocks publish; all else comes from all. They publish between the two
    # moments that come before.
    for index in (i for i, moment in enumerate(trace.moments) if moment.receives and names[i] != "heads_received"):
        assert (trace.noted[:, :, :, index].min(axis=1) >= trace.noted[:, :, :, index - 2].max(axis=1)).all()


def test_a_prompt_skips_the_head(decoder: Decoder, file: Path) -> None:
    decoder.generate(some_tokens(6), max_new_tokens=4)
    trace = read_trace(file)
    names = np.asarray([moment.name for moment in trace.moments])
    skipped = np.isin(names, ["head_input", "head_product"])
    assert (trace.noted[:, :, :2, skipped] == 0).all() and (trace.noted[:, :, 2:, skipped] > 0).all()
    assert not waits(trace).counted[:, :2, -2].any() and waits(trace).counted[:, 2:, -2].all()
    assert (trace.ends() >= trace.starts()).all()
    assert "2 of 4 tokens are of the prompt and need no LM head" in trace_text(trace)


def test_nothing_is_written_unasked(decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAX_MONO_TRACE", raising=False)
    monkeypatch.setenv("JAX_MONO_TRACE_TOKENS", "nonsense")  # means nothing without a file
    monkeypatch.chdir(tmp_path)
    decoder.generate(some_tokens(2), max_new_tokens=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tokens", ["8", "8,0", "-1,2", "8,1025", "a,b", "8,8,8", "8,8 "])
def test_bad_tokens_are_refused(tokens: str, decoder: Decoder, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_MONO_TRACE_TOKENS", tokens)
    with pytest.raises(jax.errors.JaxRuntimeError, match="must be FIRST,COUNT with a count from 1 to 1024") as error:
        decoder.score(some_tokens(4))
    assert f"JAX_MONO_TRACE_TOKENS is '{tokens}'" in str(error.value) and not file.exists()
    monkeypatch.delenv("JAX_MONO_TRACE_TOKENS")
    decoder.score(some_tokens(10))
    assert list(read_trace(file).tokens) == [8, 9]  # the default is 8,8


def test_a_file_that_cannot_be_written(decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_MONO_TRACE", str(tmp_path / "nowhere" / "call.trace"))
    with pytest.raises(
        jax.errors.JaxRuntimeError, match=r"cannot write the trace .*nowhere/call\.trace; JAX_MONO_TRACE"
    ):
        decoder.generate(some_tokens(2), max_new_tokens=2)
    monkeypatch.delenv("JAX_MONO_TRACE")
    assert len(decoder.generate(some_tokens(2), max_new_tokens=2).tokens) == 2


def test_a_call_that_ends_too_early(decoder: Decoder, file: Path) -> None:
    decoder.generate(some_tokens(1), max_new_tokens=2)
    with pytest.raises(TraceError, match=r"ended before its token 3; .* JAX_MONO_TRACE_TOKENS=FIRST,COUNT"):
        read_trace(file)


def test_foreign_and_broken_files(tmp_path: Path) -> None:
    path = write_file(tmp_path / "call.trace", made_trace(1, 2))
    whole = path.read_bytes()
    for size in (8, 40, 64, len(whole) - 8, len(whole) - 3):
        path.write_bytes(whole[:size])
        with pytest.raises(TraceError, match="is cut off or was changed"):
            read_trace(path)
    for foreign in (b"", b"\x89PNG", b"x" * 4096):
        path.write_bytes(foreign)
        with pytest.raises(TraceError, match=r"call\.trace is not a trace; set JAX_MONO_TRACE=FILE"):
            read_trace(path)
    moments = np.frombuffer(whole, np.int64).copy()
    moments[6], moments[7] = moments[7], moments[6]
    path.write_bytes(moments.tobytes())
    with pytest.raises(TraceError, match="another version"):
        read_trace(path)
    with pytest.raises(FileNotFoundError):
        read_trace(tmp_path / "nowhere")


def test_devices_of_different_calls(tmp_path: Path) -> None:
    first = write_file(tmp_path / "a", made_trace(2, 2), 0, 1)
    second = write_file(tmp_path / "b", made_trace(2, 2), 1, 1)
    np.testing.assert_array_equal(read_trace(second, first).noted, made_trace(2, 2).noted)
    write_file(tmp_path / "b", made_trace(2, 3), 1, 1)
    with pytest.raises(TraceError, match="not of one call"):
        read_trace(first, second)


def test_who_is_waited_for() -> None:
    trace = made_trace(2, 4, layers=2, slow=2)
    found = waits(trace)
    assert (found.last == 2).all() and found.counted.all() and len(found.moments) == 4 * 2 + 3
    assert (found.waited[:, 2] == 0).all()
    # One to three phases of work lie between hand-offs, each 500 ns shorter.
    assert set(np.unique(found.waited[:, 0])) == {500, 1000, 1500}
    by_name = {row.name: row for row in phases(trace)}
    assert [row.last for name, row in by_name.items() if name in RECEIVING] == [(0, 2)] * len(RECEIVING)
    assert all(row.last is None for name, row in by_name.items() if name not in RECEIVING)
    down = by_name["down_product"]
    assert (down.least, down.mean, down.most) == (2000, 2250, 3000)  # two layers
    up = by_name["up_input"]
    assert (up.least, up.mean, up.most, up.often) == (400, 2 * 950, 2 * 1200, 1.0)
    assert up.waited == 2 * 750
    assert by_name["begun"].mean == 1125  # the first one's is not known


def test_text_adds_up() -> None:
    trace = made_trace(1, 132, slow=17)
    text = trace_text(trace)
    assert text.startswith("1 device × 132 blocks, 2 layers; tokens 8–10 of the call, ")
    rows = re.findall(r"^  (\w+)\s+([\d.,]+)\s+([\d.,]+)\s+([\d.,]+)\s+([\d.]+)%(?:\s+[\d.,]+  (.*))?$", text, re.M)
    assert [row[0] for row in rows] == list(MARKS)
    assert sum(float(row[4]) for row in rows) == pytest.approx(100, abs=1)
    assert {row[5] for row in rows} == {"", "block 17, 100%"}
    assert max(map(len, text.splitlines())) <= 100
    assert "prompt" not in text
    assert "device 1 block 0" not in trace_text(made_trace(2, 1))  # nobody to wait for
    assert "sums of other devices" in trace_text(made_trace(2, 1))


@pytest.mark.parametrize("devices", [1, 2])
def test_perfetto(devices: int, tmp_path: Path) -> None:
    trace = made_trace(devices, 3)
    trace.noted[0, 1, 0, 3] = 0  # a block without attention
    write_perfetto(trace, tmp_path / "trace.json")
    record = json.loads((tmp_path / "trace.json").read_text())
    names = {
        (event["pid"], event.get("tid"), event["args"].get("name"))
        for event in record["traceEvents"]
        if event["ph"] == "M"
    }
    assert {(device + 1, None, f"device {device}") for device in range(devices)} <= names
    threads = defaultdict(list)
    for event in record["traceEvents"]:
        assert event["ph"] in "MX" and event["pid"] > 0
        if event["ph"] == "X":
            assert event["ts"] >= 0 and event["dur"] >= 0 and event["args"]["token"] in trace.tokens
            threads[event["pid"], event["tid"]].append(event)
    assert len(threads) == devices * 3 == len({tid for _, tid in threads})
    for (pid, tid), events in threads.items():
        tokens = [event for event in events if event["cat"] == "token"]
        slices = [event for event in events if event["cat"] != "token"]
        assert [event["name"] for event in tokens] == ["token 8", "token 9", "token 10"]
        expected = [moment.name for moment in trace.moments] * 3
        assert len(slices) == len(expected) - (2 if (pid, tid) == (1, 2) else 1)
        mixed = "work" if devices == 1 else "wait,work"
        for event in slices:
            first = event["name"] == "qkv_input" and event["args"]["layer"] == 0
            received = event["name"] in RECEIVING and not first
            assert event["cat"] == ("wait" if received else mixed if event["name"].endswith("_mixed") else "work")
            assert ("layer" in event["args"]) == (event["name"] in LAYER_MARKS)
        ends = [event["ts"] + event["dur"] for event in slices]
        np.testing.assert_allclose([event["ts"] for event in slices[1:]], ends[:-1], atol=1e-6)


@pytest.mark.parametrize(
    ("devices", "blocks", "name"),
    [(1, 1, "a.svg"), (1, 2, "a.svg"), (1, 132, "a.png"), (1, 304, "a.svg"), (8, 132, "a.svg")],
)
def test_pictures(devices: int, blocks: int, name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    trace = made_trace(devices, blocks, slow=17)
    draw_token(trace, tmp_path / name)
    start = (tmp_path / name).read_bytes()[:200]
    assert b"PNG" in start if name.endswith("png") else b"<?xml" in start
    assert 10_000 < (tmp_path / name).stat().st_size < 1_000_000


def test_pictures_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = made_trace(1, 2)
    assert median_token(trace) in trace.tokens
    with pytest.raises(ValueError, match=r"must end in \.svg or \.png"):
        draw_token(trace, tmp_path / "a.pdf")
    with pytest.raises(ValueError, match="token 11 is not in the trace, which has 8 to 10"):
        draw_token(trace, tmp_path / "a.svg", 11)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"jax-mono\[plot\]"):
        draw_token(trace, tmp_path / "a.svg")
