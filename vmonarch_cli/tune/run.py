"""One run of `vmonarch tune`: load, evaluate, sample the teacher, train the student, evaluate again, write."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmonarch_cli.errors import ModelError
from vmonarch_cli.machine.group import Group, joined
from vmonarch_cli.machine.torchrun import read_rank
from vmonarch_cli.machine.versions import installed_versions
from vmonarch_cli.models import hub
from vmonarch_cli.models.registry import DEMO_ALIAS
from vmonarch_cli.models.tuned import TunedAdapter, fingerprint
from vmonarch_cli.pipeline.device import DTYPES
from vmonarch_cli.pipeline.load import load_pipeline
from vmonarch_cli.pipeline.parts import transformers_of
from vmonarch_cli.pipeline.preflight import Machine
from vmonarch_cli.pipeline.tuned import write_adapter
from vmonarch_cli.pipeline.tuned_weights import write_weights
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.plan.setup import ADAPTER_NAME, AdapterFile, Setup
from vmonarch_cli.plan.tuned import read
from vmonarch_cli.tune.checkpoint import TrainingProgress
from vmonarch_cli.tune.clips import check_clips
from vmonarch_cli.tune.evaluate import Figures, evaluate, read_figures
from vmonarch_cli.tune.flow_matching import encode_clip
from vmonarch_cli.tune.loop import Training, TrainingSchedule, TrainStep
from vmonarch_cli.tune.lora import put
from vmonarch_cli.tune.memory import free_bytes, needs_checkpointing
from vmonarch_cli.tune.request import TunePlan
from vmonarch_cli.tune.student import Student
from vmonarch_cli.tune.trained import TrainedLora, TrainedWeights, whole
from vmonarch_cli.tune.trajectories import sample_trajectories, side_by_side, trajectory_path
from vmonarch_cli.tune.work import prepare_work, remove_work

TEACHER_SHARE = 0.2
"""Of --seconds, for the teacher's trajectories."""
_FEWEST = 2
"""Trajectories of a process, however short the time is."""

OnPhase = Callable[[str, int, int | None], None]
"""(what is going on, how much of it is done, how much there is)."""


@dataclass(frozen=True)
class TuneResult:
    """What a run came to."""

    path: Path
    adapter: TunedAdapter
    before: Figures | None
    after: Figures | None
    losses: list[float]


def tune(
    plan: TunePlan,
    machine: Machine,
    *,
    on_phase: OnPhase = lambda words, done, total: None,
    on_step: Callable[[TrainStep], None] = lambda step: None,
) -> TuneResult | None:
    """Make the adapter of a plan; None in the processes of a torchrun but the first.

    A run that ends early leaves the work folder, from which one with `resume` goes on.
    """
    device, rank = torch.device(machine.device), read_rank()
    check_clips(plan.videos[rank.rank :: rank.world], plan.clip, functools.partial(on_phase, "checking the clips"))
    checkpointing = needs_checkpointing(plan, free_bytes(machine), machine.dtype)
    with joined(device) as group:
        if group.rank == 0:
            prepare_work(plan)
        group.wait()
        on_phase("loading the model", 0, None)
        checkpointing = group.agree(checkpointing)[0] > 0
        return _Run(plan, machine, group, on_phase).run(on_step, checkpointing)


class _Run:
    def __init__(self, plan: TunePlan, machine: Machine, group: Group, on_phase: OnPhase) -> None:
        self._plan, self._machine, self._group, self._on_phase = plan, machine, group, on_phase
        self._pipeline = self._load()

    def _load(self, *tuned: AdapterFile) -> Any:
        clip = self._plan.clip
        return load_pipeline(
            clip.model_source,
            device=torch.device(self._machine.device),
            dtype=DTYPES[self._machine.dtype],
            flow_shift=clip.flow_shift,
            revision=clip.revision,
            setup=Setup(offload="none", tuned=tuned),
        )

    def run(self, on_step: Callable[[TrainStep], None], checkpointing: bool) -> TuneResult | None:
        plan, group = self._plan, self._group
        self._evaluate("before")
        began = time.monotonic()
        paths = self._teacher()
        group.wait()
        seconds = None if plan.seconds is None else max(1.0, plan.seconds - (time.monotonic() - began))
        schedule = TrainingSchedule(plan.lr, plan.steps, seconds)
        state, progress = self._train(paths, schedule, on_step, checkpointing)
        adapter = self._adapter(progress, len(paths))
        name = ADAPTER_NAME
        if plan.full:
            name = self._exchanged(state, adapter)
        self._evaluate("after", adapter=name)
        if group.rank:
            return None
        return self._write(state, adapter, progress.losses)

    def _train(
        self,
        paths: list[Path],
        schedule: TrainingSchedule,
        on_step: Callable[[TrainStep], None],
        checkpointing: bool,
    ) -> tuple[dict[str, Tensor], TrainingProgress]:
        """What the adapter's file holds, and how the training went."""
        plan, group = self._plan, self._group
        kind: type[TrainedWeights] | type[TrainedLora] = TrainedWeights if plan.full else TrainedLora
        trained = kind(self._pipeline, plan, group)
        student = Student(
            self._pipeline,
            plan.clip.preset,
            plan.clip.steps,
            runs=trained.runs,
            scales=plan.guidance_scales,
            no_sync=trained.no_sync,
            dtype=trained.dtype,
            checkpointing=checkpointing,
        )
        checkpoint = plan.work / "checkpoint.safetensors"
        training = Training(trained, student, schedule, checkpoint, group, seed=plan.seed, batch=plan.batch)
        self._set_training(True)
        training.run(paths, on_step)
        self._set_training(False)
        if isinstance(trained, TrainedLora):
            put(trained.parameters, training.averages)
            return training.averages, training.progress
        state = {name: whole(value).to(trained.dtypes[name]).cpu() for name, value in training.averages.items()}
        return state, training.progress

    def _exchanged(self, state: dict[str, Tensor], adapter: TunedAdapter) -> str:
        """Load the model anew, with the trained weights beside its own as in every later use; their name."""
        plan = self._plan
        path = plan.work / "weights.safetensors"
        if self._group.rank == 0:
            write_weights(path, state, adapter, overwrite=True)
        self._group.wait()
        self._pipeline = None
        gc.collect()
        if self._machine.on_gpu:
            torch.cuda.empty_cache()
        file = read(path)
        self._pipeline = self._load(file)
        return file.layer_name

    def _evaluate(self, when: str, **swap: Any) -> None:
        """Each process has every n-th of the held-out clips."""
        plan, group = self._plan, self._group
        numbers = range(group.rank, len(plan.held_out), group.world)
        words = f"comparing held-out clips, {when} tuning"
        if numbers:
            self._on_phase(words, 0, len(numbers))
        done = 0

        def on_clip(number: int) -> None:
            nonlocal done
            done += 1
            self._on_phase(words, done, len(numbers))

        evaluate(self._pipeline, plan, when, numbers, on_clip, **swap)
        group.wait()

    def _teacher(self) -> list[Path]:
        """The files of all trajectories, or clips, of which each process makes every n-th."""
        plan, group = self._plan, self._group
        began, words = time.monotonic(), "encoding the clips" if plan.videos else "sampling the teacher"
        numbers = range(group.rank, len(plan.prompts), group.world)
        self._on_phase(words, 0, len(numbers))
        done = 0
        for some in side_by_side(self._pipeline, plan, numbers):
            over = plan.seconds is not None and time.monotonic() - began > TEACHER_SHARE * plan.seconds
            if over and done >= _FEWEST:
                break
            if plan.videos:
                for number in some:
                    encode_clip(self._pipeline, plan, number)
            else:
                sample_trajectories(self._pipeline, plan, some)
            done += len(some)
            self._on_phase(words, done, len(numbers))
        group.wait()
        paths = [trajectory_path(plan, number) for number in range(len(plan.prompts))]
        return [path for path in paths if path.exists()]

    def _set_training(self, on: bool) -> None:
        """Gradient checkpointing works in training mode only; none of the layers has dropout in it."""
        for transformer in transformers_of(self._pipeline):
            transformer.train(on)

    def _adapter(self, progress: TrainingProgress, trajectories: int) -> TunedAdapter:
        """What the file says of itself, without the evaluation."""
        plan, clip = self._plan, self._plan.clip
        versions = installed_versions()
        return TunedAdapter(
            kind="weights" if plan.full else "lora",
            model=_asked(clip),
            fingerprint=fingerprint(_folder(clip)),
            also_for=plan.also_for,
            preset_name=clip.preset.name,
            preset=clip.preset.model_dump(),
            steps=clip.steps,
            guidance_scale=clip.guidance_scale,
            size=f"{clip.width}x{clip.height}",
            num_frames=clip.num_frames,
            training={
                **({} if plan.full else {"rank": plan.rank, "alpha": plan.rank}),
                "lr": plan.lr,
                "steps": progress.step,
                "seconds": round(progress.seconds, 1),
                "batch": plan.batch * plan.world,
                "seed": plan.seed,
                ("clips" if plan.videos else "prompts"): trajectories,
                "loss_first": progress.losses[0],
                "loss_last": progress.losses[-1],
                "versions": {name: text for name, text in versions.items() if text},
                "device": self._machine.device_name,
                "dtype": self._machine.dtype,
            },
        )

    def _write(self, state: dict[str, Tensor], adapter: TunedAdapter, losses: list[float]) -> TuneResult:
        plan = self._plan
        before, after = read_figures(plan, "before"), read_figures(plan, "after")
        if before is not None and after is not None:
            evaluation = {"prompts": len(plan.held_out), "before": before.to_json(), "after": after.to_json()}
            adapter = adapter.model_copy(update={"evaluation": evaluation})
        write = write_weights if plan.full else write_adapter
        write(plan.output, state, adapter, overwrite=plan.overwrite)
        remove_work(plan)
        return TuneResult(plan.output, adapter, before, after, losses)


def _asked(clip: Plan) -> str:
    """The model as it was asked for: by its name, or by its folder."""
    is_own = Path(clip.model_source).is_dir() and clip.model.alias != DEMO_ALIAS
    return clip.model_source if is_own else clip.model.alias


def _folder(clip: Plan) -> Path:
    """Where the weights are, which have been loaded."""
    folder = Path(clip.model_source)
    found = folder if folder.is_dir() else hub.cached_folder(clip.model_source, clip.revision)
    if found is None:
        raise ModelError(f"the weights of {clip.model.alias} are not in the cache any more, from which they were read")
    return found
