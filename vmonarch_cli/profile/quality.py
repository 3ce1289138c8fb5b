"""Accuracy against cost: the same prompts and noise with every variant, held against dense attention."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vmonarch_cli.attention.session import AttentionSession
from vmonarch_cli.attention.structured import Attention
from vmonarch_cli.media.metrics import psnr, relative_error, ssim
from vmonarch_cli.models.registry import DEMO_ALIAS
from vmonarch_cli.pipeline.call import decode_whole
from vmonarch_cli.pipeline.load import load_pipeline
from vmonarch_cli.pipeline.swap import swapped
from vmonarch_cli.plan.costs import count_flops
from vmonarch_cli.plan.setup import Setup
from vmonarch_cli.presets import Preset, load_preset
from vmonarch_cli.profile.blocks import attention_in_blocks, block_flops
from vmonarch_cli.profile.quality_results import QualityProfile, QualityRow
from vmonarch_cli.profile.repeat import Budget, OnWork, reason, unheard
from vmonarch_cli.profile.results import EXACT, OutputCheck
from vmonarch_cli.profile.settings import ProfiledClips
from vmonarch_cli.profile.variants import Variant
from vmonarch_cli.timing import Pace

EXACT_BUDGET = 1e-3
"""Relative latent error that the preset `exact` may have: it runs the same dense kernel on the same tensors."""
_FRAMES_AT_ONCE = 16


@dataclass(frozen=True)
class QualitySettings(ProfiledClips):
    """What to generate; clip number i has prompt i and starts from the noise of seed `seed + i`."""

    steps: int
    flow_shift: float | None
    prompts: tuple[str, ...]
    batch: int
    variants: Sequence[Variant]
    sweep: str
    seed: int = 0


@dataclass(frozen=True)
class _Clips:
    """All clips of one variant."""

    latents: Tensor
    """(clips, C, T, h, w), float32, on the CPU."""
    frames: list[Tensor]
    """Of each clip (F, 3, H, W), uint8, on the CPU."""
    attention_s: float
    """Of all clips together."""


def run_quality(
    settings: QualitySettings,
    budget: Budget,
    on_result: Callable[[QualityProfile, list[OutputCheck]], None],
    on_work: OnWork = unheard,
) -> tuple[QualityProfile, list[OutputCheck], list[dict[str, str]]]:
    """The profile, its checks, and the variants for which the time ran out.

    A variant that raises becomes a row with the reason. Raises ModelError when the model cannot be loaded.
    """
    profile = QualityProfile(
        model=settings.entry.alias,
        sweep=settings.sweep,
        size=(settings.width, settings.height, settings.num_frames),
        grid=settings.grid,
        steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        prompts=list(settings.prompts),
    )
    checks: list[OutputCheck] = []
    skipped: list[dict[str, str]] = []
    on_work("loading the model")
    pipeline = load_pipeline(
        settings.source,
        device=settings.device,
        dtype=settings.dtype,
        flow_shift=settings.flow_shift,
        setup=Setup(offload="none", tuned=tuple(v.tuned for v in settings.variants if v.tuned is not None)),
    )
    pace = Pace(1 + len(settings.variants))
    on_work("dense")
    dense = _clips(settings, pipeline, _session(settings, pipeline, load_preset("dense")))
    profile.dense_attention_s = dense.attention_s / len(settings.prompts)
    profile.dense_flops = count_flops(
        settings.entry, settings.grid, load_preset("dense"), settings.steps, settings.forwards
    ).dense
    longest = 0.0
    # The check of the plumbing comes first, so that a short budget never leaves figures without it.
    order = sorted(range(len(settings.variants)), key=lambda i: settings.variants[i].name != EXACT)
    rows: dict[int, QualityRow] = {}
    for place, index in enumerate(order):
        variant = settings.variants[index]
        if not budget.allows(longest):
            skipped.append({"what": variant.name, "why": f"--seconds {budget.seconds:g} would not be enough"})
            continue
        on_work(variant.name, pace.left(1 + place))
        began = time.monotonic()
        rows[index] = _row(settings, pipeline, variant, dense, profile.dense_flops)
        longest = max(longest, time.monotonic() - began)
        if variant.name == EXACT:
            worst = max(rows[index].latent_errors, default=math.inf)
            checks.append(OutputCheck(worst, EXACT_BUDGET, "preset exact against dense, final latents, worst clip"))
        profile.rows = [rows[i] for i in sorted(rows)]
        on_result(profile, checks)
    return profile, checks, skipped


def _row(settings: QualitySettings, pipeline: Any, variant: Variant, dense: _Clips, dense_flops: int) -> QualityRow:
    work = _flops(settings, variant)
    row = QualityRow(
        variant.name,
        variant.group,
        variant.is_preset,
        flops=work,
        flops_share=None if work is None else work / dense_flops,
        paper_psnr=variant.paper_psnr,
    )
    try:
        attention = _session(settings, pipeline, variant.preset, _other_attention(variant))
        adapter = None if variant.tuned is None else variant.tuned.layer_name
        clips = _clips(settings, pipeline, attention, adapter)
        metrics = [_frame_metrics(a, b, settings.device) for a, b in zip(clips.frames, dense.frames, strict=True)]
        errors = [relative_error(a, b) for a, b in zip(clips.latents, dense.latents, strict=True)]
    except Exception as error:
        return replace(row, failure=reason(error))
    return replace(
        row,
        latent_errors=errors,
        psnrs=[value for value, _ in metrics],
        ssims=[value for _, value in metrics],
        attention_s=clips.attention_s / len(settings.prompts) if variant.frames_per_block == 1 else None,
    )


def _other_attention(variant: Variant) -> Attention | None:
    """What attends in the place of the preset's own attention."""
    if variant.peer is not None:
        return variant.peer.attention
    blocks = variant.frames_per_block
    return attention_in_blocks(variant.preset, blocks) if blocks > 1 else None


def _flops(settings: QualitySettings, variant: Variant) -> int | None:
    """Self-attention operations of one clip; None where the tensors decide."""
    entry, grid = settings.entry, settings.grid
    if variant.peer is not None:
        dense = count_flops(entry, grid, load_preset("dense"), settings.steps, settings.forwards).dense
        return None if variant.peer.share is None else round(dense * variant.peer.share)
    if variant.frames_per_block == 1:
        return count_flops(entry, grid, variant.preset, settings.steps, settings.forwards).planned
    call = block_flops(grid, entry.heads, entry.head_dim, variant.preset, variant.frames_per_block)
    return call * entry.layers * settings.steps * settings.forwards


def _session(
    settings: QualitySettings, pipeline: Any, preset: Preset, attention: Attention | None = None
) -> tuple[Preset, AttentionSession]:
    count = 1 if getattr(pipeline, "transformer_2", None) is None else 2
    layers = [settings.entry.layers] * count
    return preset, AttentionSession(preset, layers, attention=attention)


@torch.no_grad()
def _clips(
    settings: QualitySettings,
    pipeline: Any,
    attention: tuple[Preset, AttentionSession],
    adapter: str | None = None,
) -> _Clips:
    """Every prompt's clip, `batch` at a time; what a clip is does not depend on its batch."""
    preset, session = attention
    latents: list[Tensor] = []
    seconds = 0.0
    entry = settings.entry
    for first in range(0, len(settings.prompts), settings.batch):
        prompts = list(settings.prompts[first : first + settings.batch])
        seeds = range(settings.seed + first, settings.seed + first + len(prompts))
        with swapped(pipeline, preset, session=session, adapter=adapter):
            final = pipeline(
                prompt=prompts,
                negative_prompt=[entry.defaults.negative_prompt] * len(prompts),
                height=settings.height,
                width=settings.width,
                num_frames=settings.num_frames,
                num_inference_steps=settings.steps,
                guidance_scale=settings.guidance_scale,
                guidance_scale_2=entry.defaults.guidance_scale_2,
                max_sequence_length=entry.max_sequence_length,
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
                output_type="latent",
            ).frames
        seconds += sum(step.attention_s for step in session.steps)
        latents.append(final.float().cpu())
    together = torch.cat(latents)
    if not torch.isfinite(together).all():
        raise ValueError("the latents are not finite")
    return _Clips(together, _decoded(settings, pipeline, together), seconds)


def _decoded(settings: QualitySettings, pipeline: Any, latents: Tensor) -> list[Tensor]:
    """Frames of each clip as (F, 3, H, W), uint8, on the CPU."""
    if settings.entry.alias == DEMO_ALIAS:
        # Small clips: the whole-clip decoder is the same network without the chunks, and many times faster on a GPU.
        from vmonarch_cli.families.wan_vae import decode_normalised

        vae = pipeline.vae
        parts = [decode_normalised(vae, part.to(settings.device, vae.dtype)) for part in latents.split(4)]
        frames = ((torch.cat(parts) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()
        return list(frames.transpose(1, 2))
    return [torch.from_numpy(decode_whole(pipeline, clip[None])).permute(0, 3, 1, 2) for clip in latents]


def _frame_metrics(a: Tensor, b: Tensor, device: torch.device) -> tuple[float, float]:
    """(PSNR, SSIM) of two clips (F, 3, H, W), uint8; a few frames at a time, in double precision."""
    squares, similar, counts = [], [], []
    for first in range(0, len(a), _FRAMES_AT_ONCE):
        x, y = (clip[first : first + _FRAMES_AT_ONCE].to(device).double() / 255 for clip in (a, b))
        squares.append(10 ** (-psnr(x, y) / 10))
        similar.append(ssim(x, y))
        counts.append(len(x))
    mse = statistics.fmean(squares, counts)
    return (math.inf if mse == 0 else -10 * math.log10(mse)), statistics.fmean(similar, counts)
