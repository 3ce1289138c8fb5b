"""Whole clips, dense and structured, first in the process and warm: the time that a user waits, part by part."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from vmonarch_cli.clip.make import ClipMaker
from vmonarch_cli.media.metrics import relative_error
from vmonarch_cli.models.catalogue import PIPELINES
from vmonarch_cli.pipeline.dense import dense_words, fastest_first
from vmonarch_cli.pipeline.preflight import Machine, check_machine_for
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.presets import load_preset
from vmonarch_cli.profile.clip_results import Circumstances, ClipProfile, ClipRow
from vmonarch_cli.profile.repeat import Budget, OnWork, unheard
from vmonarch_cli.timing import Pace

DENSE = "dense"
_KERNEL_CACHE = "TRITON_CACHE_DIR"


@dataclass(frozen=True)
class ClipSettings:
    """What to measure: a plan with its structured preset, and how many warm clips of each kind."""

    plan: Plan
    repeats: int


def run_clips(
    settings: ClipSettings,
    budget: Budget,
    on_result: Callable[[ClipProfile], None],
    on_work: OnWork = unheard,
) -> ClipProfile:
    """Clips of the plan's seed, into a folder that is removed: structured and dense, one cold and then warm in turn.

    `on_result` gets the profile whenever something was added. Kernels are compiled as on a machine that never did.
    Raises as `clip.make.generate` does.
    """
    with tempfile.TemporaryDirectory(prefix="vmonarch-profile-") as folder, _empty_kernel_cache(Path(folder)):
        plans = {
            name: settings.plan.model_copy(update={**changed, "outputs": (_clip(settings.plan, Path(folder), name),)})
            for name, changed in _kinds(settings.plan).items()
        }
        machine = fastest_first(settings.plan, check_machine_for(list(plans.values())))
        profile = _empty(settings.plan, machine)
        if machine.on_gpu:
            profile.notes.append(f"dense attention by {dense_words(machine)}")
        profile.notes += _machine_notes(settings.plan, machine)
        on_work("loading the model")
        maker = ClipMaker(settings.plan, machine, retry_dense=False)
        run = _Run(maker, plans, profile, on_result, _paced(on_work, 2 * (1 + settings.repeats)))
        for row in profile.rows:
            run.cold(row)
        run.compare()
        for index in range(settings.repeats):
            round_s = sum((row.warm_s or row.cold_s or 0.0) for row in profile.rows)
            if not budget.allows(round_s):
                profile.notes.append(f"--seconds left time for {index} of {settings.repeats} warm clips of each kind")
                break
            for row in profile.rows:
                run.warm(row)
    return profile


def _machine_notes(plan: Plan, machine: Machine) -> Iterator[str]:
    """What the machine decided and the user did not."""
    if (fused := machine.fused_of(plan)) is not None:
        yield f"blocks fused by {fused} in both kinds"
    if (why := machine.why_dense(plan)) is not None:
        yield f"{plan.preset.name}: {why}"


def _paced(on_work: OnWork, clips: int) -> OnWork:
    """Tells of one clip after the other, with the time that all have left."""
    pace, begun = Pace(clips), itertools.count()
    return lambda words, left=None: on_work(words, pace.left(next(begun)))


class _Run:
    def __init__(
        self,
        maker: ClipMaker,
        plans: dict[str, Plan],
        profile: ClipProfile,
        on_result: Callable[[ClipProfile], None],
        on_work: OnWork,
    ) -> None:
        self._maker = maker
        self._plans = plans
        self._profile = profile
        self._on_result = on_result
        self._on_work = on_work
        self._load_s = 0.0
        self._latents: dict[str, torch.Tensor] = {}

    def cold(self, row: ClipRow) -> None:
        self._on_work(f"first clip, {row.name}")
        parts = self._make(row)
        # The first of all paid for loading, and any other would have, were it the first.
        self._load_s = parts.get("load", self._load_s)
        row.cold = {"load": self._load_s, **parts}
        self._on_result(self._profile)

    def warm(self, row: ClipRow) -> None:
        self._on_work(f"warm clip {len(row.warm) + 1}, {row.name}")
        row.warm.append(self._make(row))
        self._on_result(self._profile)

    def compare(self) -> None:
        """How far the structured clip's latents are from the dense one's."""
        structured = self._profile.structured
        structured.error = relative_error(self._latents[structured.name], self._latents[DENSE])

    def _make(self, row: ClipRow) -> dict[str, float]:
        plan = self._plans[row.name]
        denoised = self._maker.denoise(plan, 0)
        self._latents[row.name] = denoised.latents.float().cpu()
        path = plan.outputs[0].with_suffix(".safetensors")
        timing = self._maker.finish(plan, 0, self._maker.save(path, plan, 0, denoised), overwrite=True).timing
        row.peak_bytes = max(row.peak_bytes or 0, timing.peak_memory_bytes or 0)
        return timing.parts


def _kinds(plan: Plan) -> dict[str, dict[str, object]]:
    """Name -> what a plan of that kind changes; dense attention is not sampled, because it runs."""
    return {plan.preset.name: {"dense_every": 0}, DENSE: {"dense_every": 0, "preset": load_preset(DENSE)}}


def _clip(plan: Plan, folder: Path, name: str) -> Path:
    return folder / f"{'dense' if name == DENSE else 'structured'}{plan.outputs[0].suffix}"


def _empty(plan: Plan, machine: Machine) -> ClipProfile:
    return ClipProfile(
        model=plan.model.alias,
        size=(plan.width, plan.height, plan.num_frames),
        steps=plan.steps,
        dense=ClipRow(DENSE),
        structured=ClipRow(plan.preset.name),
        circumstances=Circumstances(
            on_gpu=machine.on_gpu,
            offload=machine.offload,
            vae_dtype=machine.vae_dtype,
            compiled=plan.setup.compile,
            can_compile=PIPELINES[plan.model.pipeline].compiles,
            cached=plan.setup.cache is not None,
            guided=plan.guidance_scale > 1 and not plan.model.embedded_guidance,
            steps=plan.steps,
            ending=plan.outputs[0].suffix.lower(),
        ),
    )


@contextmanager
def _empty_kernel_cache(folder: Path) -> Iterator[None]:
    """Triton finds no kernel that an earlier process compiled."""
    before = os.environ.get(_KERNEL_CACHE)
    os.environ[_KERNEL_CACHE] = str(folder / "kernels")
    try:
        yield
    finally:
        if before is None:
            del os.environ[_KERNEL_CACHE]
        else:
            os.environ[_KERNEL_CACHE] = before
