"""The schedule of a clip in words: neighbouring steps that do the same share a line."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from rich.table import Table

from vmonarch_cli.cli.tables import table
from vmonarch_cli.models.wan import WAN21_1_3B
from vmonarch_cli.plan.costs import StepCost, Work
from vmonarch_cli.presets import Preset

EXAMPLE_STEPS = (4, 8, 20, 50)
EXAMPLE_GRID = (21, 30, 52)
"""81 frames of 832 x 480: what the costs of a preset are shown for."""


def example_costs(preset: Preset, steps: int, forwards: int) -> list[StepCost]:
    """A preset's schedule in a clip of the example's size."""
    layers = WAN21_1_3B.layers if preset.layer_refresh is None else len(preset.layer_refresh)
    model = WAN21_1_3B.model_copy(update={"layers": layers})
    return Work(model, EXAMPLE_GRID, steps, forwards).step_costs(preset)


def mean_units(rows: Sequence[StepCost]) -> float:
    """Units of a call, on the mean over a clip's steps."""
    return sum(row.units for row in rows) / len(rows)


def cost_table(preset: Preset) -> Table:
    """What a preset costs in clips of a few numbers of steps, with guidance and without."""
    made = table("steps", "units with guidance", "units without", "frames exact, with guidance")
    for steps in EXAMPLE_STEPS if preset.step_refresh is None else (len(preset.step_refresh),):
        guided, alone = (example_costs(preset, steps, forwards) for forwards in (2, 1))
        words = "; ".join(f"{name}: {_frames(rows)}" for name, rows in grouped(guided))
        made.add_row(str(steps), f"{mean_units(guided):.1f}", f"{mean_units(alone):.1f}", words)
    frames, rows, columns = EXAMPLE_GRID
    made.caption = (
        f"A unit is N P D operations a head, and the mean over all calls is shown: {frames} latent frames of "
        f"{rows} x {columns} tokens, of which dense attention takes {4 * frames}."
    )
    made.caption_justify = "left"
    return made


def grouped(rows: Sequence[StepCost]) -> list[tuple[str, list[StepCost]]]:
    """Neighbouring steps that do nearly the same, each group with its name: "step 1", "steps 2-4".

    Turns come in whole frames, so that a mean of 2.5 is 2 and 3 in turn: frames that differ by one are one group.
    """
    groups = [[rows[0]]]
    for before, row in pairwise(rows):
        exact = [entry.frames_exact for entry in (*groups[-1], row)]
        same = before.dense == row.dense and max(exact) - min(exact) <= 1 and _iterations_alike(groups[-1], row)
        if same:
            groups[-1].append(row)
        else:
            groups.append([row])
    return [(_name(group), group) for group in groups]


def _iterations_alike(group: Sequence[StepCost], row: StepCost) -> bool:
    """Whether steps differ by their exact frames alone: a cold step has an iteration more."""
    frames = 4 * (row.frames_exact - group[-1].frames_exact)
    return abs(row.units - group[-1].units - frames) < 0.5


def _name(group: Sequence[StepCost]) -> str:
    first, last = group[0].step, group[-1].step
    return f"step {first}" if first == last else f"steps {first}-{last}"


def _frames(group: Sequence[StepCost]) -> str:
    if group[0].dense:
        return "dense"
    exact = sorted(entry.frames_exact for entry in group)
    return f"{exact[0]:g}" if exact[0] == exact[-1] else f"{exact[0]:g} to {exact[-1]:g}"


def schedule_rows(rows: Sequence[StepCost]) -> list[tuple[str, str]]:
    """("schedule", "step 1: 13 frames exact, 62.5 units"), and a row without a title for every other group."""
    found = []
    for name, group in grouped(rows):
        exact = _frames(group)
        frames = exact if group[0].dense else f"{exact} frame{'' if exact == '1' else 's'} exact"
        found.append(f"{name}: {frames}, {mean_units(group):.1f} units")
    return [("" if index else "schedule", words) for index, words in enumerate(found)]


def schedule_words(rows: Sequence[StepCost]) -> str:
    """'12 frames exact in step 1, 1.5 on the mean after it', of the steps that are not dense."""
    dense = sum(row.dense for row in rows)
    if dense == len(rows):
        return "every step dense"
    first, later = rows[dense], rows[dense + 1 :]
    words = f"{first.frames_exact:g} frame{'' if first.frames_exact == 1 else 's'} exact in step {first.step}"
    if not later:
        return words
    return f"{words}, {sum(row.frames_exact for row in later) / len(later):.2g} on the mean after it"
