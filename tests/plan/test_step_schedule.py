"""The schedule of a clip: what is planned and shown is what runs, and no preset costs more than it says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from vmonarch_cli.attention.session import AttentionSession
from vmonarch_cli.cli.schedule_tables import example_costs, grouped, mean_units, schedule_rows
from vmonarch_cli.errors import PresetError
from vmonarch_cli.models.demo import DEMO
from vmonarch_cli.models.wan import WAN21_1_3B
from vmonarch_cli.plan.costs import Work
from vmonarch_cli.plan.noise_levels import changeover
from vmonarch_cli.plan.step_schedule import FIRST_STAGE, schedule_for
from vmonarch_cli.presets import Preset, apply_overrides, at_steps, load_preset, parse_preset, shipped_names
from vmonarch_kernels import dense_attention

GRID = (13, 1, 2)
EXAMPLE_STEPS = (4, 8, 20, 50)
STRUCTURED = [name for name in shipped_names() if name not in ("dense", "exact")]
TWO_STAGES = DEMO.model_copy(update={"transformers": 2, "boundary_ratio": 0.5, "layers": 1})


def exact_frames(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> int:
    """How many latent frames of a call's output are as dense attention has them."""
    wrong = (out - dense_attention(q, k, v)).abs().unflatten(1, (GRID[0], -1)).amax((0, 2, 3, 4))
    return int((wrong < 1e-5).sum())


def played(preset: Preset, steps: int, forwards: int, stages: Iterator[int] | None = None) -> list[list[int]]:
    """Exact frames of each forward of each step of a clip that runs with one layer."""
    session = AttentionSession(preset, [1, 1] if stages else [1])
    session.begin_clip(steps)
    found = []
    for step in range(steps):
        session.begin_step()
        transformer = next(stages) if stages else 0
        counts = []
        for forward in range(forwards):
            session.begin_forward(transformer, GRID, torch.device("cpu"), forwards=forwards)
            generator = torch.Generator().manual_seed(step)
            q, k, v = (torch.randn(1, GRID[0] * 2, 1, 16, generator=generator) for _ in range(3))
            q = 2 * q + 0.1 * forward
            counts.append(exact_frames(session.attend(q, k, v, transformer, 0), q, k, v))
        found.append(counts)
        session.end_step()
    return found


@pytest.mark.parametrize("forwards", [1, 2])
@pytest.mark.parametrize("steps", [4, 8, 20])
@pytest.mark.parametrize("name", STRUCTURED)
def test_what_runs_is_what_is_planned(name: str, steps: int, forwards: int) -> None:
    preset = load_preset(name)
    model = DEMO.model_copy(update={"layers": 1})
    planned = [row.frames_exact * forwards for row in Work(model, GRID, steps, forwards).step_costs(preset)]
    assert [sum(counts) for counts in played(preset, steps, forwards)] == planned


@pytest.mark.parametrize("forwards", [1, 2])
@pytest.mark.parametrize("steps", EXAMPLE_STEPS)
@pytest.mark.parametrize("name", shipped_names())
def test_no_preset_costs_more_than_it_says_or_than_dense(name: str, steps: int, forwards: int) -> None:
    rows = example_costs(load_preset(name), steps, forwards)
    said = {"paper": 14.2, "fast": 15.5, "balanced": 22.5, "quality": 41.2, "exact": 84.0, "dense": 84.0}
    assert mean_units(rows) <= said[name]
    assert all(row.units <= 84 for row in rows)


@pytest.mark.parametrize("forwards", [1, 2])
@pytest.mark.parametrize("steps", EXAMPLE_STEPS)
@pytest.mark.parametrize("name", STRUCTURED)
def test_no_preset_costs_more_than_dense_on_the_demo(name: str, steps: int, forwards: int) -> None:
    """With 13 latent frames exact ones weigh more than in the table of `presets show`."""
    said = {"paper": 14.8, "fast": 16.0, "balanced": 22.9, "quality": 35.6}
    assert mean_units(Work(DEMO, (13, 12, 12), steps, forwards).step_costs(load_preset(name))) <= said[name] < 52


def test_a_share_of_the_steps_is_dense() -> None:
    preset = Preset(name="share", dense_steps=0.2)
    assert [at_steps(preset, steps).dense_steps for steps in (1, 2, 3, 4, 8, 20, 50)] == [0, 0, 1, 1, 2, 4, 10]
    assert at_steps(at_steps(preset, 20), 20) == at_steps(preset, 20)
    with pytest.raises(PresetError, match="the number of steps is not known"):
        at_steps(preset, None)
    session = AttentionSession(preset, [1])
    session.begin_step(total=8)
    session.begin_forward(0, GRID, torch.device("cpu"))
    q = torch.randn(1, 26, 1, 16)
    session.attend(q, q, q, 0, 0)
    assert session.coverage().dense == {"dense_steps": 1}


def test_few_steps_replace_fields_and_an_override_holds_for_any_number() -> None:
    preset = parse_preset("refresh = 2\nfew_steps = {up_to = 8, refresh = 3, dense_steps = 1}", source="x", stem="x")
    assert [(at_steps(preset, n).refresh, at_steps(preset, n).dense_steps) for n in (8, 9)] == [(3, 1), (2, 0)]
    given = apply_overrides(preset, {"refresh": ("--set", 5)})
    assert [(at_steps(given, n).refresh, at_steps(given, n).dense_steps) for n in (8, 9)] == [(5, 1), (5, 0)]


def test_a_list_by_step_and_weights_by_layer_are_what_runs() -> None:
    preset = Preset(name="own", band=0, step_refresh=(3.0, 0.0, 1.5, 0.5), layer_refresh=(1.0, 0.0, 2.0))
    schedule = schedule_for(preset, 13, 4, 3)
    due = [[schedule.due(step, layer, 2, FIRST_STAGE) for step in range(4)] for layer in range(3)]
    assert due == [[3, 0, 2, 0], [0, 0, 0, 0], [6, 0, 3, 1]]
    assert [counts[0] - 1 for counts in played(preset.model_copy(update={"layer_refresh": None}), 4, 1)] == due[0]
    for steps, layers, words in ((5, 3, "4 numbers, one for each step, and there are 5 steps"), (4, 2, "there are 2")):
        with pytest.raises(PresetError, match=words):
            schedule_for(preset, 13, steps, layers)


@pytest.mark.parametrize("first_frame", [True, False])
def test_no_turn_is_lost_where_the_first_step_would_take_more_than_there_are_frames(first_frame: bool) -> None:
    preset = Preset(name="early", band=0, refresh=3, first_frame=first_frame, shared_refresh=True, first_turns=0.8)
    due = [schedule_for(preset, 13, 8, 1).due(step, 0, 2, FIRST_STAGE) for step in range(8)]
    assert sum(due) == 3 * 2 * 8
    assert due[:2] == [13 - first_frame] * 2
    assert max(due[3:]) <= 13 - first_frame


@pytest.mark.parametrize("forwards", [1, 2])
@pytest.mark.parametrize("name", ["fast", "balanced"])
@pytest.mark.parametrize("takes_over", [1, 8, 19])
def test_a_second_transformer_takes_no_more_than_the_clip_has(name: str, takes_over: int, forwards: int) -> None:
    """Its first step takes many turns, as the first one's did, and together they keep the mean."""
    preset = load_preset(name)
    counts = played(preset, 20, forwards, iter([0] * takes_over + [1] * (20 - takes_over)))
    recomputed = sum(map(sum, counts)) - 20 * forwards * int(preset.first_frame)
    assert recomputed <= preset.refresh * 20 * forwards + 1
    assert counts[takes_over][0] > counts[takes_over - 1 if takes_over > 1 else 18][0]


def test_the_step_at_which_a_second_transformer_takes_over_is_planned() -> None:
    assert changeover(WAN21_1_3B, 20, 3.0) is None
    assert changeover(TWO_STAGES, 20, 1.0) == 11
    assert changeover(TWO_STAGES, 4, 8.0) == 4
    assert changeover(TWO_STAGES, 4, 1.0, (1.0, 0.4, 0.3, 0.2)) == 1, "levels that are known win"
    rows = Work(TWO_STAGES, GRID, 20, 1, 1.0).step_costs(load_preset("balanced"))
    assert rows[11].frames_exact > rows[10].frames_exact
    assert rows[11].units - rows[10].units > 4 * (rows[11].frames_exact - rows[10].frames_exact), "it starts cold"


def test_steps_that_do_the_same_share_a_line() -> None:
    rows = Work(DEMO, (13, 12, 12), 20, 2).step_costs(load_preset("quality"))
    words = schedule_rows(rows)
    assert words[0] == ("schedule", "steps 1-4: dense, 52.0 units")
    assert [title for title, _ in words[1:]] == [""] * (len(words) - 1)
    assert len(words) < 8
    assert [row for _, group in grouped(rows) for row in group] == rows
