"""`--preset auto`: the preset for a clip by its tokens, steps and the device, from what was measured.

A gain in time is less than the gain in operations, the more so the shorter the clip. What must be there for a gain:

- On a GPU, from the attention calls of Wan 2.1 1.3B and Wan 2.2 5B on an H100 and an H200 (`kernels/bench/results`):
  from 13,000 tokens on, times gained about 0.8 of what operations did or more (presets `paper`, `fast`, `balanced`); at
  6,160 and 7,800 tokens 0.48 to 0.96. Shorter calls are bound by their launch: the demo model's lose.
- On a CPU, from the demo model on two cores (49 frames, `paper`): 0.53 of it.
"""

from __future__ import annotations

from vmonarch_cli.errors import VmonarchError
from vmonarch_cli.machine.hardware import device_key
from vmonarch_cli.plan import checks
from vmonarch_cli.plan.history import will_use_gpu
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.presets import at_steps, load_preset

AUTO = "auto"
MARK = f", {AUTO}"
"""Ends the origin of a preset that was chosen here."""
_DENSE = "dense"
_LAUNCH_BOUND = 6_000
_SHORT = 13_000
_GPU_SHORT, _GPU_LONG, _CPU = 2.1, 1.25, 2.0
"""Times fewer operations than dense that gain time: the reciprocals of the shares above, rounded up."""


def choose_preset(plan: Plan) -> tuple[str, str]:
    """(name of a preset, why) for a plan whose own preset does not matter; the first of these that gains time: the
    model's default, `fast`, `dense`.
    """
    gpu = will_use_gpu(plan)
    where = f"{plan.tokens:,} tokens, {plan.steps} steps, {device_key(plan.device)}"
    if gpu and plan.tokens < _LAUNCH_BOUND:
        return _DENSE, f"{where}: below {_LAUNCH_BOUND:,} tokens a GPU is faster with dense attention"
    need = _CPU if not gpu else _GPU_SHORT if plan.tokens < _SHORT else _GPU_LONG
    passed = []
    for name in dict.fromkeys((plan.model.defaults.preset, "fast")):
        gain = _gain(plan, name)
        if gain is None:
            passed.append(f"{name} does not take as many frames")
        elif gain >= need:
            before = f"; {', '.join(passed)}" if passed else ""
            return name, f"{where}: {gain:.1f}x fewer operations than dense, where {need:g}x gain time{before}"
        else:
            passed.append(f"{name} has {gain:.1f}x")
    return _DENSE, f"{where}: {need:g}x fewer operations than dense gain time, and {', '.join(passed)}"


def _gain(plan: Plan, name: str) -> float | None:
    """Operations of dense attention over those of a preset; None where it cannot run."""
    preset = at_steps(load_preset(name), plan.steps)
    try:
        checks.latent_frames(preset, plan.model, plan.grid[0], plan.num_frames)
    except VmonarchError:
        return None
    flops = plan.work.flops(preset, plan.work.step_costs(preset))
    return flops.dense / flops.planned
