"""`vmonarch tune`: an adapter that brings a preset's clips closer to dense ones, from prompts or clips."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from vmonarch_cli.cli.options import (
    MODEL,
    OUTPUT,
    SAMPLING,
    Debug,
    Shown,
    number_option,
    option,
    takes_request,
    whole_option,
)
from vmonarch_cli.cli.output import Output
from vmonarch_cli.cli.phase_progress import PhaseProgress
from vmonarch_cli.cli.prompt_lines import prompts_of
from vmonarch_cli.cli.tables import table
from vmonarch_cli.clip.interrupts import Interrupted, stoppable
from vmonarch_cli.machine.torchrun import read_rank
from vmonarch_cli.plan.noise_levels import OWN
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.profile.plot import check_plot
from vmonarch_cli.text import binary_size, counted
from vmonarch_cli.tune.request import TunePlan, TuneRequest, resolve_tune

if TYPE_CHECKING:
    from vmonarch_cli.tune.evaluate import Figures
    from vmonarch_cli.tune.run import TuneResult

TRAINING = "Training"
_NOT_OF_A_CLIP = (
    "prompt",
    "negative_prompt",
    "height",
    "width",
    "steps",
    "num_videos",
    "dense_every",
    "dense_attention",
    "output",
    "overwrite",
    "image",
    "last_image",
    "video",
    "strength",
    "offload",
    "vae_tiling",
    "vae_dtype",
    "quantize",
    "loras",
    "cache",
    "compile",
    "fuse",
    "graphs",
    "dense_below",
    "quality",
    "tuned",
    "transformer",
    "transformer_2",
    "recipe",
    "sampler",
    "sigmas",
    "audio",
)


@dataclass(frozen=True)
class TuneFlags:
    """How the adapter is trained, and where it goes."""

    prompts_file: Annotated[
        str | None,
        option("--prompts-file", panel=MODEL, help="One prompt per line. Default: the demo model's own prompts."),
    ] = None
    videos: Annotated[
        str | None,
        option(
            "--videos",
            panel=TRAINING,
            help="Learn from clips instead: a folder of NAME.mp4, each with its caption in NAME.txt.",
        ),
    ] = None
    sampler_steps: Annotated[
        int | None,
        whole_option("--sampler-steps", panel=SAMPLING, help="Denoising steps of the clips that it is for."),
    ] = None
    train_steps: Annotated[
        int | None, whole_option("--steps", panel=TRAINING, help="Steps of training. Default: 500, or by --seconds.")
    ] = None
    seconds: Annotated[
        float | None,
        number_option(
            "--seconds", panel=TRAINING, help="Time for sampling the teacher and training; evaluation comes on top."
        ),
    ] = None
    rank: Annotated[int | None, whole_option("--rank", panel=TRAINING, help="Rank of the LoRA. Default: 16.")] = None
    full: Annotated[
        bool, option("--full", panel=TRAINING, help="Train all weights instead of a LoRA. The file has their size.")
    ] = False
    lr: Annotated[
        float | None,
        number_option(
            "--lr",
            panel=TRAINING,
            help="Learning rate. Default: 0.001, for fewer than 16 clips a step less by the root of their number; "
            "with --full 0.00001.",
        ),
    ] = None
    batch: Annotated[
        int | None, whole_option("--batch", panel=TRAINING, help="Clips at once, of each process. Default: 1.")
    ] = None
    eval_prompts: Annotated[
        int | None,
        whole_option("--eval-prompts", panel=TRAINING, help="Held-out prompts to compare with dense. Default: 8."),
    ] = None
    also_for: Annotated[
        list[str] | None,
        option(
            "--also-for",
            panel=MODEL,
            metavar="MODEL",
            help="Let the adapter go with this model of the same base, too: a distilled student (repeatable).",
        ),
    ] = None
    resume: Annotated[
        bool, option("--resume", panel=TRAINING, help="Go on where a run with the same flags was stopped.")
    ] = False
    adapter: Annotated[
        str | None, option("--output", "-o", panel=OUTPUT, help="File of the adapter, ends in .safetensors.")
    ] = None
    replace: Annotated[bool, option("--overwrite", panel=OUTPUT, help="Replace what exists, start anew.")] = False
    plot: Annotated[str | None, option("--plot", panel=OUTPUT, help="Draw the loss to a .png or .svg file.")] = None


@takes_request(*_NOT_OF_A_CLIP)
def tune(request: GenerateRequest, flags: TuneFlags, shown: Shown, debug: Debug = False) -> None:
    """Tune a model to a preset: the same model with dense attention teaches it, and prompts are all it needs.

    Writes one file for `--tuned`, a LoRA or, with `--full`, all weights. What a run has done is kept in a folder beside
    it, OUTPUT.tune, until the file is there. Started by torchrun, processes share the work.
    """
    rank = read_rank()
    out = shown.output(main=rank.is_main)
    plan = _resolved(request, flags, rank.world)
    plot = check_plot(flags.plot, flags.replace)
    out.note(*plan.notes)
    out.warn(*plan.warnings)

    from vmonarch_cli.pipeline.preflight import check_machine
    from vmonarch_cli.tune.flow_matching import check_family
    from vmonarch_cli.tune.memory import check_memory, free_bytes
    from vmonarch_cli.tune.work import check_work

    check_work(plan)
    check_family(plan)
    machine = check_machine(plan.clip)
    check_memory(plan, free_bytes(machine), machine)
    out.say(_header(plan))

    from vmonarch_cli.tune.run import tune as run

    progress = PhaseProgress(out)
    try:
        with stoppable(out.insist), progress:
            tuned = run(plan, machine, on_phase=progress.phase, on_step=progress.step)
    except BaseException as error:
        if plan.work.is_dir() and rank.is_main:
            out.insist(f"what was done is kept in {plan.work}: the same command with --resume goes on")
        if isinstance(error, Interrupted):
            raise typer.Exit(error.exit_code) from None
        raise
    if tuned is not None:
        _finish(plan, tuned, plot, out)


def _resolved(request: GenerateRequest, flags: TuneFlags, world: int) -> TunePlan:
    given = TuneRequest(
        clip=replace(request, steps=flags.sampler_steps, tuned="none", sampler=OWN),
        output=flags.adapter,
        steps=flags.train_steps,
        rank=flags.rank,
        lr=flags.lr,
        batch=flags.batch,
        seconds=flags.seconds,
        eval_prompts=flags.eval_prompts,
        videos=flags.videos,
        full=flags.full,
        also_for=tuple(flags.also_for or ()),
        resume=flags.resume,
        overwrite=flags.replace,
    )
    return resolve_tune(given, prompts_of(flags.prompts_file, "tuning"), world=world)


def _header(plan: TunePlan) -> str:
    clip = plan.clip
    limits = [counted(plan.steps, "step") if plan.steps else "", f"{plan.seconds:g} s" if plan.seconds else ""]
    some = "up to " if plan.seconds else ""
    return (
        f"tuning {clip.model.alias} to {clip.preset.name}: {clip.width}x{clip.height}, {clip.num_frames} frames, "
        f"{clip.steps} sampler steps, guidance {clip.guidance_scale:g}; {plan.trained_words}, lr {plan.lr:g}, "
        f"{' or '.join(part for part in limits if part)}; {plan.kept_words} take "
        f"{some}{binary_size(plan.work_bytes)} in {plan.work}"
    )


def _finish(plan: TunePlan, tuned: TuneResult, plot: Any, out: Output) -> None:
    if plot is not None:
        from vmonarch_cli.tune.plot import plot_losses

        plot_losses(
            tuned.losses, f"{plan.clip.model.alias}, preset {plan.clip.preset.name}, {plan.trained_words}", plot
        )
    if out.as_json:
        out.json({"path": str(tuned.path), **tuned.adapter.model_dump(by_alias=True), "losses": tuned.losses})
    if tuned.before is not None and tuned.after is not None:
        out.show(_figures(plan, tuned.before, tuned.after))
        out.warn(*_no_gain(tuned.before, tuned.after, tuned.adapter.training))
    out.paths(tuned.path, *([plot] if plot is not None else []))


def _no_gain(before: Figures, after: Figures, training: Mapping[str, Any]) -> list[str]:
    """A sentence where held-out clips are as far from dense as without the adapter, or farther."""
    if after.latent_error_mean < before.latent_error_mean:
        return []
    return [
        f"the adapter brings held-out clips no closer to dense: latent error {before.latent_error_mean:.3f} before, "
        f"{after.latent_error_mean:.3f} after {training['steps']} steps with --batch {training['batch']}; clips have "
        "little in common to learn, and more of them help: a larger --batch, more --steps or --seconds, more prompts"
    ]


def _figures(plan: TunePlan, before: Figures, after: Figures) -> Any:
    shown = table(f"{len(plan.held_out)} held-out prompts against dense")
    for title in ("latent error, mean", "median", "PSNR", "SSIM"):
        shown.add_column(title, justify="right")
    for name, figures in (("before", before), ("after", after)):
        similar = "-" if figures.ssim is None else f"{figures.ssim:.3f}"
        cells = (
            f"{figures.latent_error_mean:.3f}",
            f"{figures.latent_error_median:.3f}",
            f"{figures.psnr:.1f} dB",
            similar,
        )
        shown.add_row(Text(name, style="bold"), *map(Text, cells))
    return shown
