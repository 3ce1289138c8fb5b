"""`--preset auto`: the preset for a clip by its tokens, steps and the device, from what was measured.

A gain in time is less than the gain in operations, the more so the shorter the clip. What must be there for a gain:

- On a GPU, from the attention calls of Wan 2.1 1.3B and Wan 2.2 5B on an H100 and an H200 (`kernels/bench/results`):
  from 13,000 tokens on, times gained about 0.8 of what operations did or more (presets `paper`, `fast`, `balanced`); at
  6,160 and 7,800 tokens 0.48 to 0.96. Calls that are shorter than their launches run dense whatever the preset is; from
  how many tokens on they do not depends on the card (`small_calls.py`).
- On a CPU, from the demo model on two cores (49 frames, `paper`): 0.53 of it.

Nothing else was measured: for other cards the same shares are taken, and the reason says so.
"""

from __future__ import annotations

from vmonarch_cli.errors import VmonarchError
from vmonarch_cli.machine.hardware import device_key
from vmonarch_cli.plan import checks
from vmonarch_cli.plan.history import will_use_gpu
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.plan.small_calls import dense_below, is_chip
from vmonarch_cli.presets import at_steps, load_preset
from vmonarch_cli.text import counted

AUTO = "auto"
MARK = f", {AUTO}"
"""Ends the origin of a preset that was chosen here."""
_DENSE = "dense"
_SHORT = 13_000
_GPU_SHORT, _GPU_LONG, _CPU = 2.1, 1.25, 2.0
"""Times fewer operations than dense that gain time: the reciprocals of the shares above, rounded up."""
_MEASURED = ("H100", "H200")


def choose_preset(plan: Plan) -> tuple[str, str]:
    """(name of a preset, why) for a plan whose own preset does not matter; the first of these that gains time: the
    model's default, `fast`, `dense`.
    """
    gpu, device = will_use_gpu(plan), device_key(plan.device)
    where = f"{plan.tokens:,} tokens, {counted(plan.steps, 'step')}, {device}"
    asked = plan.setup.dense_below
    if asked is not None and plan.tokens < asked:
        return _DENSE, f"{where}: --dense-below {asked} has all calls run dense"
    if gpu and plan.tokens < (limit := dense_below(device, plan.model.hidden_dim)):
        return _DENSE, f"{where}: below {limit:,} tokens dense attention is faster on this GPU"
    need = _CPU if not gpu else _GPU_SHORT if plan.tokens < _SHORT else _GPU_LONG
    measured = _measured_on(device) if gpu else "measured on two CPU cores"
    passed = []
    for name in dict.fromkeys((plan.model.defaults.preset, "fast")):
        gain = _gain(plan, name)
        if gain is None:
            passed.append(f"{name} does not take as many frames")
        elif gain >= need:
            why = "; ".join([f"{gain:.1f}x fewer operations than dense, where {need:g}x gain time", *passed, measured])
            return name, f"{where}: {why}"
        else:
            passed.append(f"{name} has {gain:.1f}x")
    return _DENSE, f"{where}: {need:g}x fewer operations than dense gain time, and {', '.join(passed)}; {measured}"


def _measured_on(gpu: str) -> str:
    """Where the needed gain was measured, against the GPU that will run the plan."""
    cards = " and ".join(f"an {name}" for name in _MEASURED)
    known = any(is_chip(gpu, name) for name in _MEASURED)
    return f"measured on {cards}" if known else f"measured on {cards}, not on this GPU"


def _gain(plan: Plan, name: str) -> float | None:
    """Operations of dense attention over those of a preset; None where it cannot run."""
    preset = at_steps(load_preset(name), plan.steps)
    try:
        checks.latent_frames(preset, plan.model, plan.grid[0], plan.num_frames)
    except VmonarchError:
        return None
    flops = plan.work.flops(preset, plan.work.step_costs(preset))
    return flops.dense / flops.planned
