"""The flags of `vmonarch tune`, resolved and checked before torch is imported."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vmonarch_cli.errors import InputError, OutputError
from vmonarch_cli.media.paths import output_path
from vmonarch_cli.models.base import PipelineFacts
from vmonarch_cli.models.catalogue import PIPELINES
from vmonarch_cli.plan import checks
from vmonarch_cli.plan.call_options import options_for
from vmonarch_cli.plan.costs import branches_of
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve
from vmonarch_cli.presets import at_steps
from vmonarch_cli.text import binary_size, shown, with_article
from vmonarch_cli.tune.clips import CaptionedClip, find_clips
from vmonarch_cli.tune.prompts import DEFAULT_EVAL, split_clips, split_prompts, unknown_words
from vmonarch_cli.tune.same_base import same_base

DEFAULT_STEPS = 500
"""Of training, where neither --steps nor --seconds says when it ends."""
DEFAULT_RANK, DEFAULT_LR = 16, 1e-3
_LR_CLIPS = 16
"""Of a step with DEFAULT_LR; see `default_lr`."""
DEFAULT_FULL_LR = 1e-5
"""Learning rate of all weights, which a LoRA's would destroy."""
ENDING = ".safetensors"
_STATE_BYTES = 2
"""States are kept in float16."""
_COPIED_BYTES = 2 * 4 * 4 + 2 * 4
"""Of each weight: two checkpoints of value, average and the optimiser's two; the tuned weights twice."""
TRAINING_NOISE = 1_000_000
"""Seeds of the trajectories begin so far above those of the held-out clips."""


@dataclass(frozen=True)
class TuneRequest:
    """The flags of `vmonarch tune` as they came; None means not given."""

    clip: GenerateRequest
    """Model, preset and its changes, sampler steps, guidance, shape, seed, device, dtype."""
    output: str | None = None
    steps: int | None = None
    rank: int | None = None
    lr: float | None = None
    batch: int | None = None
    seconds: float | None = None
    eval_prompts: int | None = None
    videos: str | None = None
    """A folder of clips to learn from, in the place of the teacher's trajectories."""
    full: bool = False
    """All weights are trained, in the place of a LoRA."""
    also_for: tuple[str, ...] = ()
    """Further models of the same base that the adapter may be used with."""
    resume: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class TunePlan:
    """Everything that tuning needs to know, resolved and checked."""

    clip: Plan
    """A clip of the model with the preset: what the adapter is made for."""
    prompts: tuple[str, ...]
    """Of the teacher's trajectories, or of the clips, one each."""
    held_out: tuple[str, ...]
    """Of the clips that are compared before and after; no trajectory has them."""
    output: Path
    steps: int | None
    """Of training; None: as many as fit `seconds`."""
    rank: int
    lr: float
    batch: int
    """Trajectories that a process trains on at once."""
    seconds: float | None
    """For trajectories and training; the evaluation comes on top."""
    videos: tuple[CaptionedClip, ...] = ()
    """Clips to learn from, in the place of the teacher's trajectories."""
    full: bool = False
    """All weights are trained, and `rank` means nothing."""
    also_for: dict[str, str] = field(default_factory=dict)
    """Further models that the adapter may be used with, name or folder -> fingerprint."""
    resume: bool = False
    overwrite: bool = False
    world: int = 1
    """Processes that train together."""
    notes: tuple[str, ...] = field(default=())
    warnings: tuple[str, ...] = field(default=())

    @property
    def work(self) -> Path:
        """The folder of trajectories, results and checkpoints, which is removed when the adapter is written."""
        return self.output.with_suffix(".tune")

    @property
    def dense_steps(self) -> int:
        """First denoising steps that the preset runs dense, in which the adapter is off."""
        return int(at_steps(self.clip.preset, self.clip.steps).dense_steps)

    @property
    def forwards(self) -> int:
        """Forwards of one denoising step."""
        return branches_of(self.clip.model, self.clip.guidance_scale)

    @property
    def guidance_scales(self) -> tuple[float, ...]:
        """Of the first transformer and, where it has its own, of the second one."""
        first, second = self.clip.guidance_scale, self.clip.guidance_scale_2
        return (first,) if second is None else (first, second)

    @property
    def trajectory_bytes(self) -> int:
        """Bytes on the disk of one trajectory: a state, and a velocity for each forward, of every step that is used.
        Of a clip: its latents.
        """
        model, (frames, rows, columns) = self.clip.model, self.clip.grid
        p_t, p_h, p_w = model.patch
        numbers = model.latent_channels * frames * p_t * rows * p_h * columns * p_w
        text = self.forwards * model.max_sequence_length * model.text_dim * 4
        if self.videos:
            return numbers * _STATE_BYTES + text
        steps = self.clip.steps - self.dense_steps
        states = self.forwards if PIPELINES[model.pipeline].guidance_by_batch else 1
        return steps * (states + self.forwards) * numbers * _STATE_BYTES + text

    @property
    def trained_words(self) -> str:
        """What is trained, for a sentence."""
        return "all weights" if self.full else f"rank {self.rank}"

    @property
    def kept_words(self) -> str:
        """What the work folder keeps, at most, for a sentence."""
        count = len(self.prompts)
        found = f"the latents of {count} clips" if self.videos else f"the teacher's {count} trajectories"
        return f"{found} and the checkpoints of all weights" if self.full else found

    @property
    def work_bytes(self) -> int:
        """Bytes on the disk of what the work folder keeps, at most, but for small files."""
        return self.trajectory_bytes * len(self.prompts) + self.weight_copies_bytes

    @property
    def weight_copies_bytes(self) -> int:
        """Bytes on the disk of checkpoints, while one replaces another, and of the tuned weights: 0 for a LoRA."""
        model = self.clip.model
        return model.transformer_params * model.transformers * _COPIED_BYTES if self.full else 0

    @property
    def seed(self) -> int:
        """Of the held-out clips, the order of the trajectories and the first weights."""
        return self.clip.seed

    def noise_seed(self, trajectory: int) -> int:
        """Of a trajectory's noise."""
        return self.clip.seed + TRAINING_NOISE + trajectory

    def identity(self) -> dict[str, Any]:
        """Every setting that a run must share with the one that it goes on from, ready for JSON."""
        clip = self.clip
        return {
            "model": clip.model_source,
            "preset": clip.preset.model_dump(exclude={"evidence"}),
            "sampler steps": clip.steps,
            "guidance scale": clip.guidance_scale,
            "size": f"{clip.width}x{clip.height}",
            "frames": clip.num_frames,
            "seed": clip.seed,
            "dtype": clip.dtype,
            "prompts": _digest(self.prompts),
            "held-out prompts": _digest(self.held_out),
            "clips": _digest([clip.stamp() for clip in self.videos]),
            "steps": self.steps,
            "rank": "all weights" if self.full else self.rank,
            "learning rate": self.lr,
            "batch of all processes": self.batch * self.world,
        }


def default_lr(clips: int) -> float:
    """The learning rate of a LoRA with so many clips a step, of all processes.

    A gradient of fewer clips has more noise, and Adam's steps are as long all the same: they shrink with the root of
    the number (Malladi et al., 2022, "On the SDEs and scaling rules for adaptive gradient algorithms").
    """
    return DEFAULT_LR * math.sqrt(min(1.0, clips / _LR_CLIPS))


def resolve_tune(request: TuneRequest, prompts: Sequence[str] | None, *, world: int = 1) -> TunePlan:
    """Resolve and check a request; VmonarchError in one sentence for anything that cannot be done.

    prompts: of a file; None takes those of the demo model. world: processes that will train together.
    """
    output = _output(request)
    checks.whole("--sampler-steps", request.clip.steps, 1, 1000)
    checks.whole("--steps", request.steps, 1, 1_000_000)
    checks.whole("--rank", request.rank, 1, 1024)
    if request.full and request.rank is not None:
        raise InputError(f"--rank {request.rank} is of a LoRA, and --full trains all weights: leave out one of the two")
    checks.number("--lr", request.lr, 1e-8, 1)
    checks.whole("--batch", request.batch, 1, 1024)
    checks.number("--seconds", request.seconds, 1, 1e7)
    checks.whole("--eval-prompts", request.eval_prompts, 0, 1000)
    clip = resolve(request.clip, needs_prompt=False, needs_source=False, takes_dense=False)
    clip = clip.model_copy(update={"outputs": ()})  # no clip is written
    if clip.seed_was_drawn:
        raise InputError("--seed -1 draws another seed each time, so that --resume could not go on: give a seed")
    _check_model(clip, request.full)
    _check_preset(clip)
    videos: tuple[CaptionedClip, ...] = ()
    if request.videos is None:
        count = DEFAULT_EVAL if request.eval_prompts is None else request.eval_prompts
        training, held_out = split_prompts(clip, prompts, count)
    else:
        videos, held_out = split_clips(clip, find_clips(request.videos), prompts, request.eval_prompts)
        training = tuple(one.caption for one in videos)
    steps = request.steps
    if steps is None and request.seconds is None:
        steps = DEFAULT_STEPS
    plan = TunePlan(
        clip,
        training,
        held_out,
        output,
        steps,
        request.rank or DEFAULT_RANK,
        request.lr or (DEFAULT_FULL_LR if request.full else default_lr((request.batch or 1) * world)),
        request.batch or 1,
        request.seconds,
        videos,
        request.full,
        same_base(clip, request.also_for, full=request.full),
        request.resume,
        request.overwrite,
        world,
        notes=clip.notes,
        warnings=tuple(dict.fromkeys([*clip.warnings, *_unknown(clip, prompts, videos)])),
    )
    _check_disk(plan)
    return plan


def _output(request: TuneRequest) -> Path:
    """The adapter's path; OutputError when it could not be written, or something would be lost."""
    if request.output is None:
        raise OutputError(f"--output is missing: it takes the file of the adapter, as in --output fast{ENDING}")
    path = output_path(request.output)
    if path.suffix != ENDING:
        raise OutputError(f"--output takes a file that ends in {ENDING}, got {shown(request.output)}")
    if path.is_dir():
        raise OutputError(f"--output takes a file, and {path} is a folder")
    if path.exists() and not request.overwrite:
        raise OutputError(f"{path} exists already: pass --overwrite to replace it, or another --output")
    work = path.with_suffix(".tune")
    if work.exists() and not work.is_dir():
        raise OutputError(f"{work} is a file, and the work of this run goes into a folder of that name: move it")
    if request.resume and not work.is_dir():
        raise InputError(f"--resume: there is no {work}, which a run that was stopped leaves behind")
    if work.is_dir() and not request.resume and not request.overwrite:
        raise OutputError(f"{work} is of a run that did not end: pass --resume to go on, or --overwrite to start anew")
    return path


def _check_model(clip: Plan, full: bool) -> None:
    model, facts = clip.model, PIPELINES[clip.model.pipeline]
    if not (facts.lora or full):
        raise InputError(f"{model.alias} cannot be tuned: diffusers loads no LoRA into {with_article(facts.name)}")
    reason = _obstacle(facts)
    if reason is not None:
        able = [name for name, other in PIPELINES.items() if (other.lora or full) and _obstacle(other) is None]
        raise InputError(f"{model.alias} cannot be tuned: {reason}; {', '.join(able)} can")
    if not full and find_spec("peft") is None:
        raise InputError("tuning needs peft: pip install peft")


def _obstacle(facts: PipelineFacts) -> str | None:
    """Why a pipeline's forwards cannot be repeated from a file, or None."""
    if facts.takes_image or facts.text_with_image:
        return "it continues a first frame, and trajectories come from prompts"
    if facts.takes_video:
        return "it changes a video, and trajectories come from prompts"
    if not facts.text:
        return "its pipeline is modular, and takes no text that was encoded before"
    if facts.guider:
        return "its guider decides in every step which forwards run, and a trajectory has the same in each"
    if facts.sound:
        return "it makes sound in the same forward, which would be changed and not compared"
    return None


def _check_preset(clip: Plan) -> None:
    preset, model = at_steps(clip.preset, clip.steps), clip.model
    checks.structured(preset, "which is the teacher", clip.preset_reason)
    if options_for(preset, clip.grid[0]).exact:
        raise InputError(
            f"preset {preset.name} is exact on {clip.grid[0]} latent frames, so that there is nothing to learn: choose "
            "more frames or another preset"
        )
    if preset.dense_steps >= clip.steps:
        raise InputError(
            f"preset {preset.name} runs its first {preset.dense_steps} steps dense, which are all of "
            f"{clip.steps}: choose more --sampler-steps, or --set dense_steps=0"
        )
    if preset.dense_layers >= model.layers:
        raise InputError(
            f"preset {preset.name} runs {preset.dense_layers} layers dense, which are all {model.layers} of "
            f"{model.alias}: choose fewer with --set dense_layers"
        )


def _unknown(clip: Plan, prompts: Sequence[str] | None, videos: Sequence[CaptionedClip]) -> list[str]:
    return unknown_words(clip, [*(prompts or ()), *(one.caption for one in videos)])


def _check_disk(plan: TunePlan) -> None:
    """OutputError when the trajectories do not fit the disk."""
    need = plan.work_bytes
    folder = next(parent for parent in plan.work.absolute().parents if parent.is_dir())
    done = sum(file.stat().st_size for file in plan.work.rglob("*") if file.is_file()) if plan.resume else 0
    free = shutil.disk_usage(folder).free + done
    if need > free:
        fitting = max(0, free - plan.weight_copies_bytes) // plan.trajectory_bytes
        raise OutputError(
            f"{plan.kept_words} take {binary_size(need)} and {folder} has {binary_size(free)} free: {fitting} "
            f"{'clips' if plan.videos else 'prompts'} would fit"
        )


def _digest(texts: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()[:16]
