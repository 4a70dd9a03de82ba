"""Instructions between hand-offs: how they are counted, and that the simulator has those of the present program."""

from __future__ import annotations

import pytest
from gfx942.builds import Build
from gfx942.conftest import why_not

from jax_mono.gfx942 import handoff_code
from jax_mono.gfx942.handoff_code import count, listed
from jax_mono.gfx942.lines import blocks, statements
from jax_mono.simulate.programs import GFX942, RESIDENT

LISTING = """\
mono_stream:
\t.loc\t1 1 1 ; kernel/a.h:1:1
\ts_nop 0
.Lfunc_end0:
mono_decode:
; %bb.0:
\t.loc\t1 2 3 ; x/kernel/a.h:2:3 @[ x/kernel/b.h:1:1 ]
\tv_mov_b32_e32 v0, 0
.LBB1_1:                                ; =>This Loop Header: Depth=1
                                        ;     Child Loop BB1_2 Depth 2
\t.loc\t1 0 3 ; x/kernel/a.h:0:3
\tv_mov_b32_e32 v1, v0
.LBB1_2:                                ;   Parent Loop BB1_1 Depth=1
                                        ; =>  This Inner Loop Header: Depth=2
\t.loc\t1 3 3 ; x/kernel/a.h:3:3 @[ x/kernel/b.h:2:1 ]
\ts_cbranch_scc0 .LBB1_2
; %bb.3:                                ;   in Loop: Header=BB1_1 Depth=1
\t.loc\t1 1 3 ; x/kernel/b.h:1:3
\ts_swappc_b64 s[30:31], s[0:1]
\ts_cbranch_scc0 .LBB1_1
; %bb.4:
\ts_endpgm
.Lfunc_end1:
"""
SOURCES = {"kernel/a.h": "one\n  two(x)\nwhile (three) ++x;\n", "kernel/b.h": "for (x : y) a(x);\nb(x);\n"}


def test_lines_and_loops_of_a_listing() -> None:
    found = blocks(LISTING, [4, 8, 4, 4, 4, 8, 4], SOURCES)
    assert [block.number for block in found] == ["", "0", "1", "2", "3", "4"]
    assert [block.loops for block in found] == [[], [], ["1"], ["1", "2"], ["1"], []]
    assert [block.size for block in found] == [0, 8, 4, 4, 12, 4]
    assert [block.waits for block in found] == [False] * 4 + [True, False]
    ways = [way for block in found for _, way in block.lines]
    assert ways[0] == ways[1] == ("for (x : y) a(x);", "two(x)"), "copies belong to what came before"
    said = statements(found)
    assert set(said["2"]) == {"b(x); while (three) ++x;"} and set(said["1"]) == {"for (x : y) a(x);"}


@pytest.mark.skipif(bool(why_not("ziglang")), reason=why_not("ziglang"))
def test_the_simulator_has_the_present_program() -> None:
    """Within 15 %: who makes a stage longer or shorter counts again, and MI300X's predictions change."""
    build = Build("laneformer-2b")
    found, plan = listed(build.plan(), build.dtype, build.toolchain()), build.plan()
    counted = count(found, plan)
    made, work, code = counted.instructions, GFX942.work, GFX942.code
    near = {
        "push": 7 * code["inbox_mlp"],
        "rounds": GFX942.kv_code,
        **{
            f"publish {channel}": code[channel]
            for channel in ("qkv", "attention", "activation", "final_sum", "summary")
        },
        "publish residual": code["residual_mlp"],
        **{f"receive {channel}": work[channel].code for channel in ("qkv", "activation", "final_inbox", "final_sum")},
        **{
            f"receive {channel} early": work[channel].early for channel in ("qkv", "attention", "activation", "summary")
        },
        "receive summary": work["summary"].code,
        "receive inbox": work["inbox_mlp"].code,
        "receive inbox early": work["inbox_attention"].early,
        "receive attention": work["attention"].code + 4 * work["attention"].each,
    }
    for module in ("attention", "mlp"):
        near[f"receive residual_{module}"] = work[f"residual_{module}"].code
        near[f"receive residual_{module} early"] = work[f"residual_{module}"].early
    assert {part: made[part] for part in near} == {part: pytest.approx(near[part], rel=0.15) for part in near}

    lanes = made["receive lanes"] - made["receive residual_mlp"] + made["receive final_inbox early"]
    assert lanes == pytest.approx(work["final_inbox"].early, rel=0.15)
    later = count(found, plan, position=144).instructions
    assert later["receive attention"] - made["receive attention"] == pytest.approx(6 * work["attention"].each, rel=0.15)
    assert work.keys() == RESIDENT.work.keys() and code.keys() > RESIDENT.code.keys()

    assert GFX942.cached and counted.taken_bytes < counted.layer_bytes < MI300X_INSTRUCTION_CACHE
    assert counted.layer_bytes + counted.end_bytes < counted.all_bytes


MI300X_INSTRUCTION_CACHE = 64 * 1024
"""Of two compute units, which run the same program (AMD's white paper on CDNA 3)."""


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        handoff_code.main(["--help"])
    assert ended.value.code == 0 and "--position N" in capsys.readouterr().out
