"""What this machine makes of the small calls of a plan, as far as it can be known without torch."""

from __future__ import annotations

from vmonarch_cli.machine.hardware import device_key, uses_gpu
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.plan.setup import Setup
from vmonarch_cli.plan.small_calls import all_dense, dense_limit
from vmonarch_cli.presets import Preset


def limit_on(device: str, setup: Setup, preset: Preset, channels: int) -> int:
    """Tokens below which calls run dense: as asked for, or by the name of the GPU that "auto", "cpu" or "cuda" will be.

    channels: heads times head dimension.
    """
    return dense_limit(setup, preset, device_key(device) if uses_gpu(device) else None, channels)


def small_limit(plan: Plan) -> int:
    """The same of a plan."""
    return limit_on(plan.device, plan.setup, plan.preset, plan.model.hidden_dim)


def runs_small(plan: Plan) -> bool:
    """Whether all calls of a plan will run dense because they are small."""
    return all_dense(plan.tokens, plan.preset, small_limit(plan))


def as_it_will_run(plan: Plan) -> Plan:
    """The plan, with the costs of dense attention where all its calls will run dense because they are small."""
    return plan.with_dense_costs() if runs_small(plan) else plan
