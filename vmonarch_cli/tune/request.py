"""The flags of `vmonarch tune`, resolved and checked before torch is imported."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vmonarch_cli.errors import InputError, OutputError
from vmonarch_cli.media.paths import output_path
from vmonarch_cli.models.catalogue import PIPELINES
from vmonarch_cli.models.demo_vocabulary import GLUE, tokens, vocabulary
from vmonarch_cli.models.registry import DEMO_ALIAS
from vmonarch_cli.plan import checks
from vmonarch_cli.plan.call_options import options_for
from vmonarch_cli.plan.costs import branches_of
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve
from vmonarch_cli.plan.warnings import of_demo
from vmonarch_cli.presets import at_steps
from vmonarch_cli.text import binary_size, shown

DEFAULT_STEPS = 500
"""Of training, where neither --steps nor --seconds says when it ends."""
DEFAULT_PROMPTS = 64
"""Trajectories of the demo model, where no file of prompts says how many."""
DEFAULT_RANK, DEFAULT_LR, DEFAULT_EVAL = 16, 1e-3, 8
ENDING = ".safetensors"
_STATE_BYTES = 2
"""States are kept in float16."""
_TRAINING_NOISE = 1_000_000
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
    resume: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class TunePlan:
    """Everything that tuning needs to know, resolved and checked."""

    clip: Plan
    """A clip of the model with the preset: what the adapter is made for."""
    prompts: tuple[str, ...]
    """Of the teacher's trajectories, one each."""
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
    def trajectory_bytes(self) -> int:
        """Bytes on the disk of one trajectory: a state, and a velocity for each forward, of every step that is used."""
        model, (frames, rows, columns) = self.clip.model, self.clip.grid
        p_t, p_h, p_w = model.patch
        numbers = model.latent_channels * frames * p_t * rows * p_h * columns * p_w
        text = self.forwards * model.max_sequence_length * model.text_dim * 4
        steps = self.clip.steps - self.dense_steps
        return steps * (1 + self.forwards) * numbers * _STATE_BYTES + text

    @property
    def seed(self) -> int:
        """Of the held-out clips, the order of the trajectories and the first weights."""
        return self.clip.seed

    def noise_seed(self, trajectory: int) -> int:
        """Of a trajectory's noise."""
        return self.clip.seed + _TRAINING_NOISE + trajectory

    def identity(self) -> dict[str, Any]:
        """Every setting that a run must share with the one that it goes on from, ready for JSON."""
        clip = self.clip
        return {
            "model": clip.model_source,
            "preset": clip.preset.model_dump(),
            "sampler steps": clip.steps,
            "guidance scale": clip.guidance_scale,
            "size": f"{clip.width}x{clip.height}",
            "frames": clip.num_frames,
            "seed": clip.seed,
            "dtype": clip.dtype,
            "prompts": _digest(self.prompts),
            "held-out prompts": _digest(self.held_out),
            "steps": self.steps,
            "rank": self.rank,
            "learning rate": self.lr,
            "batch of all processes": self.batch * self.world,
        }


def resolve_tune(request: TuneRequest, prompts: Sequence[str] | None, *, world: int = 1) -> TunePlan:
    """Resolve and check a request; VmonarchError in one sentence for anything that cannot be done.

    prompts: of a file; None takes those of the demo model. world: processes that will train together.
    """
    output = _output(request)
    checks.whole("--sampler-steps", request.clip.steps, 1, 1000)
    checks.whole("--steps", request.steps, 1, 1_000_000)
    checks.whole("--rank", request.rank, 1, 1024)
    checks.number("--lr", request.lr, 1e-8, 1)
    checks.whole("--batch", request.batch, 1, 1024)
    checks.number("--seconds", request.seconds, 1, 1e7)
    checks.whole("--eval-prompts", request.eval_prompts, 0, 1000)
    clip = resolve(request.clip, needs_prompt=False)
    if clip.seed_was_drawn:
        raise InputError("--seed -1 draws another seed each time, so that --resume could not go on: give a seed")
    _check_model(clip)
    _check_preset(clip)
    count = DEFAULT_EVAL if request.eval_prompts is None else request.eval_prompts
    training, held_out = _prompts(clip, prompts, count)
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
        request.lr or DEFAULT_LR,
        request.batch or 1,
        request.seconds,
        request.resume,
        request.overwrite,
        world,
        notes=clip.notes,
        warnings=tuple(dict.fromkeys([*clip.warnings, *_unknown(clip, prompts or ())])),
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


def _check_model(clip: Plan) -> None:
    model, facts = clip.model, PIPELINES[clip.model.pipeline]
    if not facts.lora:
        raise InputError(f"{model.alias} cannot be tuned: diffusers loads no LoRA into a {facts.name}")
    if facts.takes_image:
        raise InputError(f"{model.alias} cannot be tuned: it needs a first frame, and trajectories come from prompts")
    if facts.guidance_by_batch or facts.guider or facts.text_with_image:
        able = [name for name, other in PIPELINES.items() if _tunable(other)]
        raise InputError(
            f"{model.alias} cannot be tuned: only pipelines with a forward for each prompt can "
            f"({', '.join(able)}), and it is a {facts.name}"
        )
    if find_spec("peft") is None:
        raise InputError('tuning needs peft: pip install "vmonarch[lora]"')


def _tunable(facts: Any) -> bool:
    parts = (facts.takes_image, facts.guidance_by_batch, facts.guider, facts.text_with_image)
    return bool(facts.lora) and not any(parts)


def _check_preset(clip: Plan) -> None:
    preset, model = at_steps(clip.preset, clip.steps), clip.model
    if preset.attention == "dense":
        raise InputError(f"preset {preset.name} is dense attention, which is the teacher: name a structured preset")
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


def _prompts(clip: Plan, given: Sequence[str] | None, held_out: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(prompts of the trajectories, held-out prompts), which have none in common."""
    is_demo = clip.model.alias == DEMO_ALIAS
    if given is None:
        if not is_demo:
            raise InputError(
                f"no prompts to tune {clip.model.alias} with: --prompts-file takes a file with one prompt per line"
            )
        return _demo_prompts(held_out)
    texts = list(dict.fromkeys(checks.prompt(text) for text in given))
    if not texts:
        raise InputError("no prompts: --prompts-file takes a file with one prompt per line")
    if is_demo:
        known = set(vocabulary())
        for text in texts:
            if not known.intersection(_words(text)):
                raise InputError(
                    f"the demo model knows no word of the prompt {shown(text)}: it draws moving shapes, as in "
                    f'"{checks.EXAMPLE_PROMPT}"'
                )
    if len(texts) <= held_out:
        raise InputError(
            f"--eval-prompts {held_out} leaves no prompt to train with: there are {len(texts)} different ones, and "
            "those that are held out are not trained with"
        )
    cut = len(texts) - held_out
    return tuple(texts[:cut]), tuple(texts[cut:])


def _unknown(clip: Plan, prompts: Sequence[str]) -> list[str]:
    """Of the demo model: words that it was not trained on."""
    return of_demo(clip.model, " ".join(prompts), (clip.height, clip.width, clip.num_frames))


def _words(text: str) -> set[str]:
    """Words of a prompt that name something."""
    return set(tokens(text)) - set(GLUE)


def _demo_prompts(held_out: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Captions of clips that the demo model was trained on, and those of its held-out clips."""
    import random

    from vmonarch_cli.demo.captions import caption, plain_caption
    from vmonarch_cli.demo.score import held_out_specs
    from vmonarch_cli.demo.specs import sample_spec

    training = [caption(sample_spec("train", 7, i), random.Random(i)) for i in range(DEFAULT_PROMPTS)]
    return tuple(training), tuple(plain_caption(spec) for spec in held_out_specs(held_out))


def _check_disk(plan: TunePlan) -> None:
    """OutputError when the trajectories do not fit the disk."""
    need = plan.trajectory_bytes * len(plan.prompts)
    folder = next(parent for parent in plan.work.absolute().parents if parent.is_dir())
    done = sum(file.stat().st_size for file in plan.work.glob("trajectories/*")) if plan.resume else 0
    free = shutil.disk_usage(folder).free + done
    if need > free:
        fitting = free // plan.trajectory_bytes
        raise OutputError(
            f"the teacher's {len(plan.prompts)} trajectories take {binary_size(need)} and {folder} has "
            f"{binary_size(free)} free: {fitting} prompts would fit"
        )


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()[:16]
