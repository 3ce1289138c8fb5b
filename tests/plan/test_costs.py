"""What a clip's self-attention costs: per forward, and for as many forwards as guidance needs."""

from __future__ import annotations

import pytest

from vmonarch_cli.models.base import ModelEntry
from vmonarch_cli.models.hunyuan import HUNYUAN_VIDEO
from vmonarch_cli.models.ltx import LTX_2
from vmonarch_cli.models.wan import WAN21_1_3B
from vmonarch_cli.plan.costs import Work, branches_of, count_flops, kept_by
from vmonarch_cli.presets import FIELD_DOCS, load_preset
from vmonarch_kernels.cost import l_bytes

GRID = (21, 30, 52)


@pytest.mark.parametrize(("model", "branches"), [(WAN21_1_3B, 2), (HUNYUAN_VIDEO, 1)])
def test_embedded_guidance_costs_no_second_forward(model: ModelEntry, branches: int) -> None:
    assert branches_of(model, 6.0) == branches
    assert branches_of(model, 1.0) == 1


def test_frames_are_refreshed_per_forward_as_documented() -> None:
    """`refresh` counts frames of one forward: two forwards of a step refresh twice as many."""
    without = load_preset("paper")
    refreshing = without.model_copy(update={"refresh": 2.0})
    frame = 4 * GRID[0] * (GRID[1] * GRID[2]) ** 2 * WAN21_1_3B.head_dim * WAN21_1_3B.heads  # exact, over all keys
    for branches in (1, 2):
        costs = [count_flops(WAN21_1_3B, GRID, preset, 10, branches).planned for preset in (refreshing, without)]
        assert costs[0] - costs[1] == 2 * frame * WAN21_1_3B.layers * 10 * branches
    assert FIELD_DOCS["refresh"].unit == "latent frames per forward"


@pytest.mark.parametrize("first_frame", [True, False])
def test_a_call_that_recomputes_all_frames_costs_its_structured_part_too(first_frame: bool) -> None:
    """Residuals are exact minus structured attention: such a call computes both."""
    work = Work(WAN21_1_3B, GRID, 4, 1)
    without = load_preset("paper").model_copy(update={"first_frame": first_frame})
    turns = GRID[0] - int(first_frame)
    all_once = without.model_copy(update={"refresh": turns / 4, "first_turns": 1.0})
    costs = [work.step_costs(preset) for preset in (all_once, without)]
    frame = 4 * GRID[0] * (GRID[1] * GRID[2]) ** 2 * WAN21_1_3B.head_dim * WAN21_1_3B.heads
    assert [row.frames_exact for row in costs[0]] == [21.0, *[float(first_frame)] * 3]
    assert costs[0][0].flops - costs[1][0].flops == turns * frame * WAN21_1_3B.layers
    assert [row.flops for row in costs[0][1:]] == [row.flops for row in costs[1][1:]]


def test_other_kinds_of_guidance_have_forwards_of_their_own() -> None:
    """LTX-2's two, which its pipeline has on by default; without guidance all of it is off."""
    assert branches_of(LTX_2, 3.0) == 4
    assert branches_of(LTX_2, 1.0) == 1


def test_what_an_exact_call_would_keep_is_not_counted() -> None:
    warm = load_preset("fast").model_copy(update={"band": None, "refresh": 0})
    assert kept_by(WAN21_1_3B, GRID, warm, 5.0) == 2 * 30 * l_bytes(GRID, 12)
    assert kept_by(WAN21_1_3B, GRID, warm.model_copy(update={"band": 10}), 5.0) == 0
    assert kept_by(WAN21_1_3B, GRID, warm.model_copy(update={"warm_start": False, "refresh": 21}), 5.0) == 0
