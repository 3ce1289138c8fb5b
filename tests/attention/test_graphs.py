"""Structured calls of a clip through recorded graphs: what they keep from step to step is the same to the bit."""

from __future__ import annotations

import pytest
import torch
from tape import Tape

from vmonarch_cli.attention.session import AttentionSession
from vmonarch_cli.attention.structured import AttentionCall, StructuredAttention
from vmonarch_cli.attention.warm import CallKey
from vmonarch_cli.plan.small_calls import SmallCalls
from vmonarch_cli.presets import load_preset
from vmonarch_kernels.graphs import Graphs

pytest.importorskip("triton")
GRID, STEPS, LAYERS, FORWARDS = (5, 2, 3), 6, 2, 2


def outputs(graphs: Graphs | None, preset: str) -> list[torch.Tensor]:
    """Of all calls of a clip with guidance, the same tensors in every clip."""
    generator = torch.Generator().manual_seed(0)
    chosen = load_preset(preset).model_copy(update={"impl": "triton"})
    attention = StructuredAttention(chosen, [LAYERS])
    attention.graphs = graphs
    made = []
    for step in range(int(chosen.dense_steps), STEPS):
        for forward in range(FORWARDS):
            for layer in range(LAYERS):
                q, k, v = (torch.randn(1, 30, 2, 16, generator=generator) for _ in range(3))
                key = CallKey(0, layer, forward)
                call = AttentionCall(q, k, v, None, GRID, step, key, forwards=FORWARDS, steps=STEPS)
                made.append(attention(call))
    return made


@pytest.mark.parametrize("preset", ["balanced", "paper"])
def test_a_clip_through_graphs_is_the_same_to_the_bit(preset: str) -> None:
    graphs = Tape().graphs
    expected = outputs(None, preset)
    for found, wanted in zip(outputs(graphs, preset), expected, strict=True):
        assert torch.equal(found, wanted)
    assert graphs.recorded
    assert graphs.replayed_calls > len(expected) // 2


def test_a_failure_is_a_warning_of_the_session() -> None:
    session = AttentionSession(load_preset("paper"), [2], small=SmallCalls(graphs=True))
    assert session.graphs is not None
    assert session.warnings == ()
    session.graphs.failure = "RuntimeError: out of memory"
    assert session.warnings == (
        "CUDA graphs were not recorded, and every attention call ran by itself: RuntimeError: out of memory",
    )
    assert AttentionSession(load_preset("paper"), [2]).graphs is None, "off unless it is asked for"
