"""What a preset costs in units of algorithm.md, and the least that one can. No torch."""

from __future__ import annotations

from vmonarch_cli.plan.costs import Work
from vmonarch_cli.presets import Preset


def units_of(work: Work, preset: Preset) -> float:
    """Mean units of a clip's calls: dense attention is 4 T, of T latent frames."""
    flops = work.flops(preset, work.step_costs(preset))
    return 4 * work.grid[0] * flops.planned / flops.dense


def bare(preset: Preset) -> Preset:
    """A preset, as `at_steps` resolved it, without any exact frames, dense steps or dense layers."""
    nothing = {"refresh": 0, "step_refresh": None, "layer_refresh": None, "dense_steps": 0, "dense_layers": 0}
    return preset.model_copy(update={"first_frame": False, "first_turns": None, "evidence": None, **nothing})


def cheapest(work: Work, preset: Preset) -> float:
    """Units of the least that can be asked for."""
    return units_of(work, bare(preset))
