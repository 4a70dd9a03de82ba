"""Plans as text and as pictures."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from tiny import tiny

from jax_mono.draw import block_shares, draw_plan, handoffs, plan_text, totals
from jax_mono.extras import MissingExtraError
from jax_mono.models.presets import preset
from jax_mono.plan import CPU, GPU, Plan, Target, make_plan


@pytest.fixture(scope="module")
def laneformer() -> Plan:
    return make_plan(preset("laneformer-2b"), devices=4, blocks=4)


def test_text_has_the_totals_of_the_plan(laneformer: Plan) -> None:
    text = plan_text(laneformer)
    # 15 layers of 141.6 million weights, and a head of 32,000 x 3,072: two bytes each.
    assert "4.443 GB" in text
    assert "277.7 MB to 277.7 MB, balance 100.0%" in text
    assert "qkv 12.7%, o 6.4%, up 51.0%, down 25.5%, head 4.4%" in text


def test_text_says_what_every_block_owns(laneformer: Plan) -> None:
    lines = plan_text(laneformer).splitlines()
    start = lines.index("device 2: lanes 4–5, KV heads 8–11, neurons 6,144–9,215, vocabulary 16,000–23,999")
    cells = re.split(r"\s{2,}", lines[start + 3].strip())
    assert cells == ["1", "384–767", "9", "768–1,535", "6,912–7,679", "18,000–19,999", "277.7 MB"]


def test_text_counts_the_words_of_the_handoffs(laneformer: Plan) -> None:
    text = plan_text(laneformer)
    words = {name: int(count.replace(",", "")) for name, count in re.findall(r"^  (.+?)\s{2,}([\d,]+)$", text, re.M)}
    assert words["qkv → attention"] == 2 * 768  # lanes x (4 query + 2 + 2 KV heads) x 96
    assert words["attention → o"] == 8 * (96 + 2)  # query heads x (output, maximum, sum)
    assert words["up → down"] == 3072
    assert words["down → next layer"] == 2 * 3072  # one residual stream per lane
    assert words["13 layers, each"] == 3 * 3072  # outputs of the last two layers reach nobody
    assert words["head → next token"] == 16 * 6


def test_text_of_a_gpu_plan() -> None:
    plan = make_plan(preset("laneformer-2b"), devices=8, blocks=132, target=GPU)
    text, words = plan_text(plan), handoffs(plan)
    assert "in words of 16 bytes" in text
    assert f"66 blocks share a KV head's positions, {GPU.kv_chunk} at a time in turn" in text
    assert words.attention == 4 * 66 * 33  # query heads x parts x (maximum and sum, output of 96)
    assert words.residual == 132 * 8 and words.peers == 7 * words.residual
    assert words.local < handoffs(make_plan(plan.config, devices=8, blocks=132)).local / 2


@pytest.mark.parametrize("blocks", [132, 304])
def test_many_blocks_are_shortened(blocks: int) -> None:
    text = plan_text(make_plan(preset("laneformer-2b"), devices=8, blocks=blocks))
    assert text.count("…") == 8 * 7
    assert len(text.splitlines()) < 160
    assert max(map(len, text.splitlines())) <= 120
    assert f"{blocks - 1}" in text


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "laneformer"])
@pytest.mark.parametrize(("devices", "blocks"), [(1, 1), (2, 3), (8, 2), (1, 8)])
@pytest.mark.parametrize("target", [CPU, GPU], ids=lambda target: target.name)
def test_shares_cover_everything_once(family: str, devices: int, blocks: int, target: Target) -> None:
    plan = make_plan(tiny(family, hidden_size=61), devices=devices, blocks=blocks, target=target)
    neurons, vocabulary = [], []
    for device in range(devices):
        shares = block_shares(plan, device)
        hidden = [row for share in shares for row in covered(share.hidden)]
        assert hidden == list(range(plan.config.hidden_size))
        neurons += [row for share in shares for row in covered(share.neurons)]
        rows = sorted(row for share in shares for row in covered(share.qkv))
        assert rows == list(range(plan.devices[device].stages["qkv"].rows * plan.devices[device].lanes.count))
        vocabulary += [row for share in shares for row in covered(share.vocabulary)]
    assert neurons == list(range(plan.config.intermediate_size))
    assert vocabulary == list(range(plan.config.vocab_size))


def covered(ranges: str) -> list[int]:
    """The numbers of ``0–3, 8``."""
    found: list[int] = []
    for part in filter(None, ranges.replace(", ", ";").split(";")):
        first, _, last = part.replace(",", "").partition("–")
        found += range(int(first), int(last or first) + 1)
    return found


def test_handoffs_in_turn_of_a_dense_model() -> None:
    config = tiny("llama")
    assert totals(make_plan(config, devices=1, blocks=2)).waits == 5 * 3 + 1
    # Each of the two sums of a layer waits for the other devices first.
    assert totals(make_plan(config, devices=2, blocks=2)).waits == 7 * 3 + 1


def test_one_device_hears_from_nobody() -> None:
    plan = make_plan(tiny("laneformer"), devices=1, blocks=2)
    assert handoffs(plan).peers == 0
    assert "from other devices" not in plan_text(plan)


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_picture_is_written(suffix: str, tmp_path: Path, laneformer: Plan) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"plan{suffix}"
    draw_plan(laneformer, path)
    start = path.read_bytes()[:200]
    assert b"PNG" in start if suffix == ".png" else b"<?xml" in start
    assert 10_000 < path.stat().st_size < 1_000_000


def test_same_plan_gives_the_same_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plan = make_plan(tiny("laneformer"), devices=2, blocks=2)
    for name in ("a.svg", "b.svg"):
        draw_plan(plan, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


@pytest.mark.parametrize(
    ("name", "devices", "blocks", "target"),
    [("laneformer-2b", 8, 304, CPU), ("qwen3-8b", 16, 132, GPU), ("smollm2-135m", 1, 1, CPU)],
)
def test_any_plan_can_be_drawn(name: str, devices: int, blocks: int, target: Target, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw_plan(make_plan(preset(name), devices=devices, blocks=blocks, target=target), tmp_path / "plan.svg")
    assert (tmp_path / "plan.svg").stat().st_size < 400_000


def test_other_formats_are_refused(tmp_path: Path, laneformer: Plan) -> None:
    with pytest.raises(ValueError, match=r"must end in \.svg or \.png"):
        draw_plan(laneformer, tmp_path / "plan.pdf")


def test_without_matplotlib_the_error_names_the_extra(
    tmp_path: Path, laneformer: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"jax-mono\[plot\]"):
        draw_plan(laneformer, tmp_path / "plan.svg")
