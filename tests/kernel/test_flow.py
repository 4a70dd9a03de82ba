"""The steps of ``jax_mono.flow`` are those of the resident program, as far as losing hand-offs can tell."""

from __future__ import annotations

import jax
import pytest
from kernel.common import call_kernel, make_decoder, make_request
from tiny import tiny

from jax_mono.call import LostHandoff, Mode
from jax_mono.flow import Publish, Receive, token_steps
from jax_mono.plan import Plan

# Name in an error, channel of the layout.
CHANNELS = {
    "qkv rows": "qkv",
    "attention parts": "attention",
    "attention inbox": "inbox_attention",
    "residual after attention": "residual_attention",
    "activations": "activation",
    "mlp inbox": "inbox_mlp",
    "residual after mlp": "residual_mlp",
}


def is_awaited(plan: Plan, lost: LostHandoff) -> bool:
    """Whether anybody receives what the block publishes, for the first token."""
    channel = CHANNELS[lost.channel]
    published = {
        (step.device, word)
        for step in token_steps(plan, lost.device, lost.block, 0)
        if isinstance(step, Publish) and (step.channel, step.layer) == (channel, lost.layer)
        for word in step.words.tolist()
    }
    return any(
        (device, word) in published
        for device in range(plan.num_devices)
        for block in range(plan.num_blocks)
        for step in token_steps(plan, device, block, 0)
        if isinstance(step, Receive) and (step.channel, step.layer) == (channel, lost.layer)
        for word in step.words.tolist()
    )


def test_hand_offs_that_nobody_awaits_can_get_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the last layers nobody receives sums any more, and only one split of each head has a position to see."""
    monkeypatch.setenv("JAX_MONO_WAIT_LIMIT_MS", "100")
    decoder = make_decoder(tiny("laneformer"), devices=2, blocks=8)
    seen = set()
    for name in CHANNELS:
        for layer, block in ((0, 1), (4, 2)):
            lost = LostHandoff(device=1, block=block, layer=layer, channel=name)
            expected = is_awaited(decoder.plan, lost)
            try:
                call_kernel(decoder, make_request(), mode=Mode.GENERATE, room=1, lost=lost)
                awaited = False
            except jax.errors.JaxRuntimeError:
                awaited = True
            assert awaited == expected, lost
            seen.add((name, awaited))
    assert {("mlp inbox", False), ("attention parts", False), ("mlp inbox", True)} <= seen
