"""Hand-offs hold under a weak memory model, and every way to weaken them is noticed.

The contract and its proof stand in ffi/kernel/handoff.h. Here the blocks' programs are made from plans, run by an
abstract machine in all interleavings (small plans), in random ones (larger plans), and ordered by vector clocks (plans
of the real model).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from memory_model.happens_before import check_order
from memory_model.machine import Hang, Machine, Overwritten, TooManyStates, Violation, WrongValue
from memory_model.protocol import Rules, make_protocol
from plans import dies
from tiny import tiny

from jax_mono.config import Lanes, ModelConfig
from jax_mono.flow import TokenKind
from jax_mono.models.presets import preset
from jax_mono.plan import CPU, GPU, make_plan
from jax_mono.topology import Topology

THREE: tuple[TokenKind, ...] = ("sampled", "sampled", "sampled")
MIXED: tuple[TokenKind, ...] = ("fed", "filtered", "sampled", "filtered")


def lanes(layers: int = 3, **options: object) -> ModelConfig:
    """A Laneformer of two lanes with two tiles of hidden rows, so for up to two devices of two blocks."""
    fields = {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 32, "num_heads": 2, "num_kv_heads": 2}
    windows = (5,) * layers
    return tiny("laneformer", num_layers=layers, sliding_windows=windows, lanes=Lanes(count=2, **options), **fields)


def silent(**options: object) -> ModelConfig:
    """Lanes that exchange nothing in their layers, so that only the end of a token holds devices together."""
    return lanes(2, attention_comm=False, mlp_comm=False, **options)


DENSE = tiny("llama", num_layers=2, hidden_size=16)
TWO_DIES = dies(2, 1)


CONTRACT = Rules()


@dataclass(frozen=True)
class Case:
    """A plan, what its call does, and the rules it follows.

    With a topology of several dies, channels have a copy for each; with ``dies`` alone, all blocks read the same words.
    """

    config: ModelConfig
    devices: int
    blocks: int
    rules: Rules = CONTRACT
    tokens: tuple[TokenKind, ...] = THREE
    position: int = 0
    dies: int | None = None
    topology: Topology | None = None

    def machine(self, *, ordered: bool = False) -> Machine:
        shape = {"devices": self.devices, "blocks": self.blocks, "topology": self.topology}
        plan = make_plan(self.config, target=GPU, **shape)
        protocol = make_protocol(plan, self.rules, tokens=self.tokens, position=self.position, dies=self.dies)
        return Machine(protocol, ordered=ordered)


SMALL = {
    "one device": Case(lanes(), 1, 2),
    "one device, dies": Case(lanes(), 1, 2, dies=2),
    "one device, device scope": Case(lanes(), 1, 2, Rules(store_scope="device", load_scope="device"), dies=2),
    "delay 2": Case(lanes(), 2, 2),
    "delay 2, six layers": Case(lanes(6), 2, 1),
    "delay 1": Case(lanes(delay=1), 2, 2),
    "delay 0": Case(lanes(delay=0), 2, 2),
    "no sums in early layers": Case(lanes(early_comm=False), 2, 2),
    "a head per lane": Case(lanes(head="per_lane"), 2, 2),
    "lanes that exchange nothing": Case(silent(), 2, 2),
    "lanes that exchange nothing, a head each": Case(silent(head="per_lane"), 2, 2),
    "tensor parallel": Case(DENSE, 2, 2),
    "all kinds of tokens": Case(lanes(), 2, 2, tokens=MIXED),
    "all kinds of tokens, tensor parallel": Case(DENSE, 2, 2, tokens=MIXED),
    "splits come and go": Case(lanes(), 1, 2, tokens=(*THREE, "sampled"), position=62),
    "a copy per die": Case(lanes(), 1, 2, topology=TWO_DIES),
    "a copy per die, delay 2": Case(lanes(), 2, 2, topology=TWO_DIES),
    "a copy per die, lanes that exchange nothing": Case(silent(head="per_lane"), 2, 2, topology=TWO_DIES),
    "a copy per die, all kinds of tokens": Case(DENSE, 2, 2, tokens=MIXED, topology=TWO_DIES),
}


@pytest.mark.parametrize("name", SMALL)
def test_every_execution_of_a_small_plan_is_right(name: str) -> None:
    assert SMALL[name].machine().explore() > 100


LARGER = {
    "three devices": Case(replace(DENSE, hidden_size=40), 3, 3, tokens=MIXED),
    "eight lanes": Case(tiny("laneformer"), 8, 2, dies=2),
    "eight lanes on two devices": Case(tiny("laneformer"), 2, 6, tokens=MIXED, dies=4),
    "eight lanes on two devices, a copy per die": Case(tiny("laneformer"), 2, 6, tokens=MIXED, topology=dies(4, 2)),
}


@pytest.mark.parametrize("name", LARGER)
def test_random_executions_of_larger_plans_are_right(name: str) -> None:
    machine = LARGER[name].machine()
    for seed in range(3):
        machine.play(seed)


@pytest.mark.parametrize(
    ("devices", "blocks", "topology"),
    [(1, 16, None), (8, 2, None), (1, 16, dies(8, 4))],
    ids=["one device", "eight devices", "eight dies"],
)
def test_reads_come_before_what_overwrites_them_in_the_real_model(
    devices: int, blocks: int, topology: Topology | None
) -> None:
    case = Case(preset("laneformer-2b"), devices, blocks, tokens=THREE[:2], topology=topology)
    assert check_order(case.machine()) > 1000


@pytest.mark.parametrize("tokens", [THREE, MIXED])
def test_reads_come_before_what_overwrites_them_on_a_cpu(tokens: tuple[TokenKind, ...]) -> None:
    plan = make_plan(tiny("laneformer"), devices=4, blocks=2, target=CPU)
    assert check_order(Machine(make_protocol(plan, tokens=tokens, position=30))) > 1000


# Weakened on purpose ------------------------------------------------------------------------------------------------

MUTATIONS: dict[str, tuple[Case, type[Violation]]] = {
    "stores reach their own device only": (Case(lanes(), 2, 1, Rules(store_scope="device")), Hang),
    "loads see their own device only": (Case(lanes(), 2, 1, Rules(load_scope="device")), Hang),
    "stores reach their own die only": (Case(lanes(), 1, 2, Rules(store_scope="die"), dies=2), Hang),
    "loads see their own die only": (Case(lanes(), 1, 2, Rules(load_scope="die"), dies=2), Hang),
    "a tag without an epoch": (Case(lanes(), 1, 2, Rules(tag_epochs=False)), WrongValue),
    "tags count from zero": (Case(lanes(), 1, 2, Rules(first_tag=0)), WrongValue),
    "the tag of the token before is awaited": (Case(lanes(), 1, 2, Rules(awaited_lag=1)), WrongValue),
    "the tag of the token after is awaited": (Case(lanes(), 1, 2, Rules(awaited_lag=-1)), Hang),
    "exchange memory is not zeroed": (Case(lanes(), 1, 2, Rules(zeroed=False)), WrongValue),
    "inboxes are reused a layer too early": (Case(lanes(6), 2, 1, Rules(layer_turns=3)), Overwritten),
    "summaries are reused a token too early": (
        Case(silent(head="per_lane"), 2, 1, Rules(token_turns=1)),
        Overwritten,
    ),
    "a summary is published before the last reads": (Case(silent(), 2, 1, Rules(summary_last=False)), Overwritten),
    "delayed sums cross the end of a token": (Case(lanes(3), 2, 1, Rules(delay_wraps=True)), Overwritten),
    "writers forget the copy of a die": (
        Case(lanes(), 1, 2, Rules(copies="all but the last"), topology=TWO_DIES),
        Hang,
    ),
    "writers store the copy of their own die only": (
        Case(lanes(), 1, 2, Rules(copies="that of the own die"), topology=TWO_DIES),
        Hang,
    ),
    "a die's copy is loaded through the die's cache": (
        Case(lanes(), 1, 2, Rules(load_scope="die"), topology=TWO_DIES),
        Hang,
    ),
    "dies' summaries are reused a token too early": (
        Case(silent(head="per_lane"), 2, 2, Rules(token_turns=1), topology=TWO_DIES),
        Overwritten,
    ),
    "a word is torn, tag first": (Case(lanes(), 1, 2, Rules(word="tag first")), WrongValue),
    "payload and tag are words of their own": (Case(lanes(), 1, 2, Rules(word="payload first")), WrongValue),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_weakened_protocol_is_caught(name: str) -> None:
    case, violation = MUTATIONS[name]
    with pytest.raises(violation):
        case.machine().explore()
    assert replace(case, rules=CONTRACT).machine().explore()  # for no other reason


@pytest.mark.parametrize("name", [name for name in MUTATIONS if MUTATIONS[name][1] is Overwritten])
def test_clocks_catch_what_is_overwritten_too_early(name: str) -> None:
    case, _ = MUTATIONS[name]
    with pytest.raises(Overwritten):
        check_order(case.machine())
    assert check_order(replace(case, rules=CONTRACT).machine())


@pytest.mark.parametrize("name", ["a word is torn, tag first", "payload and tag are words of their own"])
def test_random_executions_catch_halves_of_words(name: str) -> None:
    machine = MUTATIONS[name][0].machine()
    caught = 0
    for seed in range(20):
        try:
            machine.play(seed)
        except WrongValue:
            caught += 1
    assert caught > 0


def test_the_memory_is_weak() -> None:
    """A payload that is stored before its tag is safe where stores become visible in order, and only there."""
    payload, tag = (
        MUTATIONS[name][0] for name in ("payload and tag are words of their own", "a word is torn, tag first")
    )
    assert payload.machine(ordered=True).explore() > 100
    with pytest.raises(WrongValue):
        tag.machine(ordered=True).explore()


@pytest.mark.parametrize(("delay", "fewest"), [(0, 1), (1, 2), (2, 4)])
def test_how_many_layers_need_channels_of_their_own(delay: int, fewest: int) -> None:
    """Sums that are read `delay` layers later need twice as many copies: the other device may be as far ahead again.

    The program gives every layer its own; this is what it could save, and shows that the check is sharp.
    """
    case = Case(lanes(7, delay=delay), 2, 1, Rules(layer_turns=fewest))
    assert case.machine().explore() > 100
    if fewest > 1:
        with pytest.raises(Overwritten):
            replace(case, rules=Rules(layer_turns=fewest - 1)).machine().explore()


def test_the_end_of_a_search_that_is_too_long() -> None:
    with pytest.raises(TooManyStates):
        SMALL["delay 2"].machine().explore(most=1000)
