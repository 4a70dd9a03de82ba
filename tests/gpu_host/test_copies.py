"""Words that the GPUs' stage code loads and stores are those that ``jax_mono.flow`` says, copy by copy. On fibers."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections import defaultdict
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from gpu_host.stand_in import Device
from kernel.common import make_decoder, some_tokens
from tiny import tiny

from jax_mono.call import LostHandoff
from jax_mono.flow import Flow, Publish, Receive, TokenKind
from jax_mono.handoffs import exchange
from jax_mono.plan import GPU, Plan
from jax_mono.topology import MI300X, Figure, Topology

TEXT = some_tokens(3)
TWO = Figure(2, "reported")
TWO_DIES = dataclasses.replace(MI300X, name="two dies", dies=TWO, units_per_die=TWO, io_dies=TWO)
TOPOLOGIES = {"flat": None, "two dies": TWO_DIES, "more dies than blocks": MI300X}

Accesses = dict[tuple[str, int, int], set[tuple[int, int]]]
"""By L or S, or l or s, device and block: devices and words of their exchange memory."""


def expected(plan: Plan, kind: TokenKind) -> Accesses:
    """What a call of several tokens touches."""
    found: Accesses = defaultdict(set)
    layouts = [exchange(plan, device) for device in range(plan.num_devices)]

    def touch(how: str, device: int, block: int, on: int, step: Receive | Publish, copies: range) -> None:
        layout, channel = layouts[on], layouts[on].channels[step.channel]
        first = channel.offset + (step.layer or 0) * layout.layer_stride
        for turn, copy in itertools.product(range(channel.turns), copies):
            at = first + turn * channel.words + copy * layout.copy_words
            found[how, device, block] |= {(on, at + word) for word in step.words.tolist()}

    for device in range(plan.num_devices):
        flow = Flow(plan, device)
        for block in range(plan.num_blocks):
            for step in flow.steps(block, 1, kind):
                if isinstance(step, Receive):
                    touch("L", device, block, device, step, range(step.copy, step.copy + 1))
                elif isinstance(step, Publish):
                    copies = layouts[step.device].channels[step.channel].copies
                    touch("S", device, block, step.device, step, range(copies))
    return found


def noted(path: Path, kinds: str = "LS") -> Accesses:
    found: Accesses = defaultdict(set)
    for line in path.read_text().splitlines():
        how, *numbers = line.split()
        device, block, on, first, count = map(int, numbers)
        if how in kinds:
            found[how, device, block] |= {(on, word) for word in range(first, first + count)}
    return found


@pytest.mark.parametrize("kind", ["sampled", "filtered"])
@pytest.mark.parametrize("topology", TOPOLOGIES.values(), ids=TOPOLOGIES)
@pytest.mark.parametrize(("family", "devices", "blocks"), [("laneformer", 2, 3), ("qwen3", 1, 4)])
def test_blocks_touch_the_words_that_the_flow_says(
    fibers: Device,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    family: str,
    devices: int,
    blocks: int,
    topology: Topology | None,
    kind: TokenKind,
) -> None:
    monkeypatch.setenv("FIBER_DIES", "1,0")
    decoder = make_decoder(
        tiny(family), devices=devices, blocks=blocks, dtype=jnp.bfloat16, target=GPU, topology=topology
    )
    monkeypatch.setenv("FIBER_WORDS", str(tmp_path / "words"))
    decoder.score(TEXT, top_logprobs=2 if kind == "filtered" else 0)
    assert noted(tmp_path / "words") == expected(decoder.plan, kind)


@pytest.mark.parametrize("top", [0, 2], ids=["sampled", "filtered"])
def test_words_that_stay_on_a_device(fibers: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, top: int) -> None:
    """What is stored or loaded at the scope of one GPU, blocks of one device store and load."""
    decoder = make_decoder(tiny("laneformer"), devices=4, blocks=2, dtype=jnp.bfloat16, target=GPU)
    monkeypatch.setenv("FIBER_WORDS", str(tmp_path / "words"))
    decoder.score(TEXT, top_logprobs=top)
    touching: dict[str, dict[tuple[int, int], set[int]]] = {kind: defaultdict(set) for kind in "LSls"}
    for (kind, device, _), words in noted(tmp_path / "words", "LSls").items():
        for word in words:
            touching[kind][word].add(device)
    for kind, other in ("lS", "sL"):
        assert touching[kind]
        for (on, word), devices in touching[kind].items():
            assert devices == {on}
            assert touching[other][on, word] <= {on}
    assert len(touching["l"]) > len(touching["L"]) / 2  # most do, and it makes them faster


def test_blocks_that_poll_the_copy_of_another_die_are_seen(
    fibers: Device, kernels: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """They compute the same: only the words that they load tell."""
    changed = tmp_path / "kernels"
    shutil.copytree(kernels, changed)
    source = changed / "kernel" / "block.h"
    right = "first + die_of(header, block_index) * header.copy_words"
    assert source.read_text().count(right) == 1
    source.write_text(source.read_text().replace(right, "first"))
    monkeypatch.setenv("JAX_MONO_KERNELS", str(changed))
    monkeypatch.setenv("FIBER_DIES", "1,0")
    monkeypatch.setenv("FIBER_WORDS", str(tmp_path / "words"))
    # A plan that no other test has: a process keeps its programs by their plans.
    config = tiny("qwen3", num_layers=2)
    decoder = make_decoder(config, blocks=4, dtype=jnp.bfloat16, target=GPU, topology=TWO_DIES)
    decoder.score(TEXT)
    found, meant = noted(tmp_path / "words"), expected(decoder.plan, "sampled")
    assert {(how, block) for how, _, block in meant if found[how, 0, block] != meant[how, 0, block]} == {
        ("L", 2),
        ("L", 3),
    }


@pytest.mark.parametrize("channel", ["residual after attention", "summary"])
def test_what_gets_lost_is_lost_in_every_copy(fibers: Device, monkeypatch: pytest.MonkeyPatch, channel: str) -> None:
    """Whoever waits first is named, of whichever die."""
    monkeypatch.setenv("JAX_MONO_WAIT_LIMIT_MS", "1000")
    monkeypatch.setenv("FIBER_DIES", "1,0")
    decoder = make_decoder(tiny("qwen3"), blocks=4, dtype=jnp.bfloat16, target=GPU, topology=TWO_DIES)
    for block in (0, 3):
        lost = LostHandoff(device=0, block=block, layer=0, channel=channel)
        with pytest.raises(jax.errors.JaxRuntimeError, match=rf"device 0, block \d waited .* '{channel}'.* epoch 1"):
            decoder.score(TEXT, lost=lost)
        jax.clear_caches()
