"""The scheduler of a clip: the model's own, or another sampler, held to the noise levels of the plan."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from vmonarch_cli.errors import InputError
from vmonarch_cli.pipeline.load import set_flow_shift
from vmonarch_cli.plan.noise_levels import OWN
from vmonarch_cli.plan.plan import Plan

_DPM = {"dpm++": "dpmsolver++", "dpm++sde": "sde-dpmsolver++"}
"""Samplers of one scheduler; the second adds noise in every step (Lu et al., arXiv 2211.01095)."""
_NOISELESS = 1e-6
"""How far below 1 the first level is for samplers that divide by 1 - sigma."""
_NOISE_SEED = 0x6C636D
"""Mixed into a clip's seed for the noise that a sampler adds, which is not the noise that the clip begins with."""


def set_schedule(pipeline: Any, plan: Plan, seed: int) -> None:
    """Give a pipeline, whose scheduler is the model's own, what a plan asks for; `seed`: of the clip."""
    if not plan.noise_levels_forced or plan.noise_levels is None:
        set_flow_shift(pipeline, plan.flow_shift)
        return
    use_sampler(pipeline, plan.sampler, plan.noise_levels, seed)


def use_sampler(pipeline: Any, sampler: str, levels: tuple[float, ...], seed: int) -> None:
    """Give a pipeline a sampler (see `SAMPLERS`) with these noise levels; noise that it adds comes from the seed."""
    pipeline.scheduler = held_to(_scheduler(pipeline.scheduler, sampler), levels, seed)


def _scheduler(own: Any, sampler: str) -> Any:
    """A scheduler of diffusers that runs a sampler on flow matching, without a shift of its own."""
    import diffusers

    train_steps = int(own.config.get("num_train_timesteps", 1000))
    solver: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 1.0}
    if sampler == OWN:
        keep = {"use_dynamic_shifting": False, "shift_terminal": None}
        return type(own).from_config(own.config, **{key: value for key, value in keep.items() if key in own.config})
    if sampler == "unipc":
        return diffusers.UniPCMultistepScheduler(num_train_timesteps=train_steps, **solver)
    if sampler in _DPM:
        return diffusers.DPMSolverMultistepScheduler(
            num_train_timesteps=train_steps, algorithm_type=_DPM[sampler], **solver
        )
    kind = diffusers.FlowMatchLCMScheduler if sampler == "lcm" else diffusers.FlowMatchEulerDiscreteScheduler
    return kind(num_train_timesteps=train_steps)


def held_to(scheduler: Any, sigmas: tuple[float, ...], seed: int) -> Any:
    """The scheduler with these noise levels, whatever a pipeline asks it for; noise that it adds comes from the seed.

    Returns another object, of a class made for it: pipelines copy schedulers, and the swap calls the class's methods.
    """
    kind = type(scheduler)
    if not hasattr(scheduler, "sigmas"):
        raise InputError(f"--sigmas cannot be set: {kind.__name__} of this model has none")
    divides = "flow_shift" in scheduler.config
    adds_noise = "generator" in inspect.signature(kind.step).parameters

    def set_timesteps(
        self: Any,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        kind.set_timesteps(self, len(levels), device=device)
        given = torch.tensor(levels, dtype=torch.float32)
        ends = given.clamp(max=1 - _NOISELESS) if divides else given
        self.sigmas = torch.cat([ends, torch.zeros(1)]).to(self.sigmas.device)
        self.timesteps = (given * self.config.num_train_timesteps).to(self.timesteps.device)
        self.num_inference_steps = len(levels)
        self.added_noise = torch.Generator("cpu").manual_seed(seed ^ _NOISE_SEED)

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if adds_noise and kwargs.get("generator") is None:
            kwargs["generator"] = self.added_noise
        return kind.step(self, *args, **kwargs)

    levels = sigmas
    held: Any = type(kind.__name__, (kind,), {"set_timesteps": set_timesteps, "step": step})
    return held.from_config(scheduler.config)
