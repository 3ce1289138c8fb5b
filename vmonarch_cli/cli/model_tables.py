"""Tables of the models: what each makes by default, what that costs, and all that is known about one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from vmonarch_cli.cli.tables import facts, table
from vmonarch_cli.models.base import ModelEntry, PipelineFacts
from vmonarch_cli.models.catalogue import PIPELINES
from vmonarch_cli.models.tuned import read_adapter
from vmonarch_cli.plan import memory
from vmonarch_cli.plan.costs import Flops, branches_of, count_flops, kept_by
from vmonarch_cli.presets import at_steps, load_preset
from vmonarch_cli.text import binary_size, counted, flops

SHOWN_MODES = ("none", "model", "group")


def models_table(models: Sequence[ModelEntry]) -> Group:
    """What each model makes by default, what a call of its self-attention costs, and what memory it takes."""
    made = table("model", "by default", "attention", "memory", show_lines=True)
    for column in made.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for model in models:
        d, cost, peaks = model.defaults, _step(model), _peaks(model)
        made.add_row(
            Text.assemble(
                (model.alias, "bold"),
                (f"\n{model.hub_id or 'comes with vmonarch'}\n", "dim"),
                (f"{_billions(model.transformer_params * model.transformers)}, {model.licence}", "dim"),
                overflow="fold",
            ),
            f"{d.width}x{d.height}\n{d.num_frames} frames\n{_tokens(model):,} tokens",
            f"{flops(cost.dense_call)}\n{flops(cost.structured_call)}",
            "\n".join(binary_size(peaks[mode]) for mode in SHOWN_MODES),
        )
    legend = (
        "attention: of one layer's call, dense and with the model's default preset; memory: estimated peak in bfloat16 "
        "with --offload none, model and group"
    )
    return Group(Text(legend, style="dim"), made)


def models_json(models: Sequence[ModelEntry]) -> list[dict[str, Any]]:
    """The same for programs, with every number in full."""
    return [
        {
            "alias": model.alias,
            "aliases": list(model.aliases),
            "hub_id": model.hub_id,
            "title": model.title,
            "licence": model.licence,
            "transformer_params": model.transformer_params * model.transformers,
            "defaults": model.defaults.model_dump(),
            "tokens": _tokens(model),
            "attention_flops": {"dense_call": _step(model).dense_call, "structured_call": _step(model).structured_call},
            "peak_memory_bytes": _peaks(model),
        }
        for model in models
    ]


def model_table(model: ModelEntry, adapters: Sequence[Path] = ()) -> Group:
    """Everything known about one model; `adapters`: files of those that it brings."""
    d, cost = model.defaults, _step(model)
    pipeline = PIPELINES[model.pipeline]
    grid = " x ".join(str(n) for n in model.grid(d.height, d.width, d.num_frames))
    image = "needed" if model.takes_image else "possible" if model.image_pipeline else "not taken"
    both = f"{model.transformers} x " if model.transformers > 1 else ""
    forwards = "1 forward of 2 samples" if pipeline.guidance_by_batch else f"{branches_of(model, d.guidance_scale)}"
    forwards += f" and {model.extra_forwards} of 1" if model.extra_forwards else ""
    rows: list[tuple[str, RenderableType]] = [
        ("names", ", ".join((model.alias, *model.aliases))),
        ("weights", f"{model.hub_id or 'come with vmonarch'} ({model.licence})"),
        ("class", f"{model.pipeline} with {both}{pipeline.transformer}"),
        (
            "parameters",
            f"{both}{_billions(model.transformer_params)} transformer, {_billions(model.text_encoder_params)} text "
            f"encoders, {_billions(model.vae_params)} VAE",
        ),
        ("attention", f"{counted(model.layers, 'layer')}, {counted(model.heads, 'head')} x {model.head_dim}"),
        ("by default", f"{d.width}x{d.height}, {d.num_frames} frames at {d.fps} fps, {d.steps} steps"),
        ("guidance", f"{_guidance(model, pipeline)}, {forwards} a step"),
        ("flow shift", "the scheduler's own" if d.flow_shift is None else f"{d.flow_shift:g}"),
        ("sides", f"multiples of {model.side_multiple} pixels"),
        ("frames", _frames(model)),
        ("first frame", f"--image is {image}"),
        *([("last frame", "--last-image is possible, with a first one or alone")] if pipeline.last_image else []),
        *([("video", _video(model))] if model.video_pipeline else []),
        *([("sound", "made with the frames; --no-audio leaves it out")] if pipeline.sound else []),
        ("beside it", _additions(pipeline)),
        ("grid", f"{grid} = {_tokens(model):,} tokens (latent frames x rows x columns)"),
        ("one call", f"{flops(cost.dense_call)} dense, {flops(cost.structured_call)} with preset {d.preset}"),
    ]
    rows += [("tuned", read_adapter(path).words) for path in adapters]
    rows += [(f"offload {mode}", f"about {binary_size(peak)} in bfloat16") for mode, peak in _peaks(model).items()]
    return Group(Text(model.title, style="bold"), facts(rows))


def _guidance(model: ModelEntry, facts: PipelineFacts) -> str:
    if facts.distilled:
        return "in the weights"
    return f"{model.defaults.guidance_scale:g}{' (embedded)' if model.embedded_guidance else ''}"


def _video(model: ModelEntry) -> str:
    facts = PIPELINES[model.video_pipeline or model.pipeline]
    how = "noised as far as --strength says and denoised again" if facts.noises_video else "which the clip follows"
    if facts.continues:
        how = f"whose last {facts.continues} frames the clip goes on from"
    return f"--video is {'needed' if model.takes_video else 'possible'}, {how}"


def _frames(model: ModelEntry) -> str:
    counts = model.axes()[0]
    if model.chunks is not None:
        return f"multiples of {counts.step} plus {model.chunks.latents}, from {counts.first} to {counts.largest}"
    return f"multiples of {model.vae_temporal * model.patch[0]}{' plus one' if model.frame_offset else ''}"


def _additions(facts: PipelineFacts) -> str:
    """The flags that diffusers has an answer to in this pipeline, beside the attention."""
    flags = ["--quantize", "--offload"] + ["--lora", "--tuned"] * facts.lora + ["--compile"] * facts.compiles
    flags += ["--fuse"] * facts.fuses
    return ", ".join(flags + [f"--cache ({', '.join(facts.caches)})"] * bool(facts.caches))


def _step(model: ModelEntry) -> Flops:
    d = model.defaults
    shape = (d.height, d.width, d.num_frames)
    branches, others = branches_of(model, d.guidance_scale), model.other_tokens(*shape)
    return count_flops(model, model.grid(*shape), load_preset(d.preset), d.steps, branches, others=others)


def _peaks(model: ModelEntry) -> dict[str, int]:
    d = model.defaults
    shape = (d.height, d.width, d.num_frames)
    kept = kept_by(model, model.grid(*shape), at_steps(load_preset(d.preset), d.steps), d.guidance_scale)
    return memory.peaks(model, shape, "bfloat16", kept=kept)


def _tokens(model: ModelEntry) -> int:
    d = model.defaults
    frames, rows, columns = model.grid(d.height, d.width, d.num_frames)
    return frames * rows * columns


def _billions(count: int) -> str:
    return f"{count / 1e9:.1f} B" if count >= 1e8 else f"{count / 1e6:.0f} M"
