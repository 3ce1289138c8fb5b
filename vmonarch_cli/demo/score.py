"""Scores the demo model: does a generated clip show what its prompt says, and how far are two presets apart?

`python -m vmonarch_cli.demo.score --weights DIR --json FILE` checks the reader on rendered clips, measures the
autoencoder on held-out clips, generates held-out prompts and reads the clips. `--preset` (repeatable) generates once
per preset; every preset after the first is compared with the first, pair by pair, from the same noise. `--tuned FILE`
(repeatable) adds a row with that adapter, for the preset that it was made for. `--frames` and `--size` choose clips of
another length and size, whose prompts tell more motions the longer they are.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmonarch_cli.demo.exits import one_sentence
from vmonarch_cli.demo.model import WEIGHTS_DIR
from vmonarch_cli.demo.score_table import show
from vmonarch_cli.demo.specs import ClipSpec, sample_spec
from vmonarch_cli.models.demo import DEMO
from vmonarch_cli.models.demo_vocabulary import MAX_TOKENS
from vmonarch_cli.plan.noise_levels import OWN, SAMPLERS, check_sampler, resolve_noise_levels, usual_sampling

if TYPE_CHECKING:
    from torch import Tensor

    from vmonarch_cli.plan.setup import AdapterFile

DENSE = "dense"
_HELD_OUT_SEED = 2  # the prompts' own name space; 0 is the autoencoder's clips, 1 the training's samples
_EQUAL_PSNR = 100.0  # stands for infinity, which JSON cannot say

SwapAttention = Callable[..., AbstractContextManager[Any]]


@dataclass(frozen=True)
class Settings:
    """How to generate: `prompts` held-out prompts of clips of `num_frames` of `size` x `size`, `batch` at a time."""

    prompts: int = 64
    steps: int = 20
    guidance: float = DEMO.defaults.guidance_scale
    batch: int = 16
    size: int = 96
    num_frames: int = 49
    flow_shift: float | None = None
    """Of the sampler's noise levels; None: the one in the weights' folder."""
    sampler: str = OWN
    """As `--sampler` of the program. Noise that it adds is one stream for a batch: it changes with `batch`."""


def swap_attention(pipeline: Any, preset: str, tuned: AdapterFile | None = None) -> AbstractContextManager[Any]:
    """Run the pipeline's self-attention as a preset says, with an adapter that the pipeline has loaded."""
    if preset == DENSE:
        return nullcontext()
    from vmonarch_cli.pipeline.swap import swapped
    from vmonarch_cli.presets import load_preset

    chosen = load_preset(preset) if tuned is None else tuned.adapter.made_for
    adapter = None if tuned is None else tuned.layer_name
    context: AbstractContextManager[Any] = swapped(pipeline, chosen, adapter=adapter)
    return context


def held_out_specs(count: int, frames: int = 49) -> list[ClipSpec]:
    """The clips whose prompts are scored: each has a (shape, colour, motion) triple that training never shows."""
    return [sample_spec("heldout", _HELD_OUT_SEED, i, frames) for i in range(count)]


def check_reader(count: int, device: Any, settings: Settings, vae: Any = None) -> dict[str, float]:
    """Share of rendered training clips whose attributes are read right; with a ``vae``, of what it makes of them."""
    import torch

    from vmonarch_cli.demo.clips import frame_times, render
    from vmonarch_cli.demo.reader import ATTRIBUTES, agreement, read_clip
    from vmonarch_cli.families.wan_vae import decode_raw, encode_mean

    right = dict.fromkeys(ATTRIBUTES, 0)
    for start in range(0, count, 4):
        specs = [sample_spec("train", 3, i, settings.num_frames) for i in range(start, min(start + 4, count))]
        videos = render(specs, frame_times(settings.num_frames), size=settings.size, device=device)
        if vae is not None:
            with torch.no_grad():
                videos = decode_raw(vae, encode_mean(vae, videos)).clamp(-1, 1)
        for spec, video in zip(specs, videos, strict=True):
            found = agreement(spec, read_clip(video, spec.motions))
            for name in ATTRIBUTES:
                right[name] += bool(getattr(found, name))
    return {name: value / count for name, value in right.items()}


def load(weights: Path, device: Any, tuned: Sequence[AdapterFile] = (), *, flow_shift: float | None = None) -> Any:
    """The pipeline as users run it: bfloat16 transformer and text encoder on a GPU, float32 otherwise."""
    import torch
    from diffusers import WanPipeline

    from vmonarch_cli.pipeline.load import set_flow_shift
    from vmonarch_cli.pipeline.tuned import load_adapters

    low = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipeline = WanPipeline.from_pretrained(weights, dtype={"vae": torch.float32, "default": low}).to(device)
    pipeline.set_progress_bar_config(disable=True)
    set_flow_shift(pipeline, flow_shift)
    load_adapters(pipeline, tuned)
    return pipeline


def generate(
    pipeline: Any,
    specs: Sequence[ClipSpec],
    settings: Settings,
    preset: str = DENSE,
    swap: SwapAttention = swap_attention,
    **adapter: AdapterFile,
) -> tuple[Tensor, Tensor]:
    """Final latents (N, z, T, h, w) and clips (N, 3, F, H, W) in [-1, 1] of the specs' prompts, both on the CPU.

    Clip number i starts from noise of seed i, whatever the batch.
    """
    import torch

    from vmonarch_cli.demo.captions import plain_caption
    from vmonarch_cli.families.wan_vae import decode_normalised
    from vmonarch_cli.pipeline.samplers import use_sampler

    latents, clips, own = [], [], pipeline.scheduler
    levels = None
    if settings.sampler != OWN:
        levels = resolve_noise_levels(DEMO, settings.sampler, (), settings.steps, own.config.flow_shift).sigmas
    for start in range(0, len(specs), settings.batch):
        rows = range(start, min(start + settings.batch, len(specs)))
        if levels is not None:
            use_sampler(pipeline, settings.sampler, levels, start)
        with swap(pipeline, preset, **adapter):
            final = pipeline(
                [plain_caption(specs[i]) for i in rows],
                height=settings.size,
                width=settings.size,
                num_frames=settings.num_frames,
                num_inference_steps=settings.steps,
                guidance_scale=settings.guidance,
                max_sequence_length=MAX_TOKENS,
                generator=[torch.Generator().manual_seed(i) for i in rows],
                output_type="latent",
            ).frames
        for one in final.float().split(4):
            with torch.no_grad():
                clips.append(decode_normalised(pipeline.vae, one.to(pipeline.vae.dtype)).float().cpu())
        latents.append(final.float().cpu())
    pipeline.scheduler = own
    return torch.cat(latents), torch.cat(clips)


def read_agreement(specs: Sequence[ClipSpec], clips: Tensor, device: Any = "cpu") -> dict[str, Any]:
    """Share of clips that show each attribute of their prompt, for single objects and pairs, and every miss; `device`
    reads. A clip of several motions shows them if all are there, in their order.
    """
    from vmonarch_cli.demo.captions import plain_caption
    from vmonarch_cli.demo.reader import ATTRIBUTES, agreement, read_clip

    rows, misses = [], []
    for spec, clip in zip(specs, clips, strict=True):
        reading = read_clip(clip.to(device), spec.motions)
        found = asdict(agreement(spec, reading))
        rows.append({**found, "pair": len(spec.objects) == 2, "several": spec.motions > 1})
        if not all(found.values()):
            wrong = [name for name, right in found.items() if not right]
            misses.append({"prompt": plain_caption(spec), "wrong": wrong, "read": asdict(reading)})

    def share(name: str, chosen: list[dict[str, Any]]) -> float | None:
        return sum(r[name] for r in chosen) / len(chosen) if chosen else None

    single = [r for r in rows if not r["pair"]]
    pairs = [r for r in rows if r["pair"]]
    several = [r for r in rows if r["several"]]
    return {
        "prompts": len(rows),
        "pairs": len(pairs),
        "several_motions": len(several),
        **{name: share(name, rows) for name in ATTRIBUTES},
        "single": {name: share(name, single) for name in ATTRIBUTES},
        "pair": {name: share(name, pairs) for name in ATTRIBUTES},
        "several": {name: share(name, several) for name in ATTRIBUTES},
        "misses": misses,
    }


def compare(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], device: Any = "cpu") -> dict[str, float | int]:
    """How far the second preset's clips are from the first's: medians, the mean error and the worst.

    Each is (latents, clips), as `generate` gives them; `device` computes.
    """
    from statistics import fmean, median

    from vmonarch_cli.media.metrics import psnr, relative_error, ssim

    count = len(first[0])
    ours, theirs = ([(clip.to(device) + 1) / 2 for clip in side[1]] for side in (second, first))
    psnrs = [min(_EQUAL_PSNR, psnr(a, b)) for a, b in zip(ours, theirs, strict=True)]
    ssims = [ssim(a, b) for a, b in zip(ours, theirs, strict=True)]
    errors = [relative_error(second[0][i], first[0][i]) for i in range(count)]
    return {
        "prompts": count,
        "psnr_median": median(psnrs),
        "psnr_worst": min(psnrs),
        "ssim_median": median(ssims),
        "ssim_worst": min(ssims),
        "latent_error_median": median(errors),
        "latent_error_mean": fmean(errors),
        "latent_error_worst": max(errors),
    }


def score(
    weights: Path,
    settings: Settings,
    presets: Sequence[str | AdapterFile] = (DENSE,),
    *,
    device: Any,
    reader_clips: int = 120,
    vae_clips: int = 16,
    swap: SwapAttention = swap_attention,
    sheet: Path | None = None,
) -> dict[str, Any]:
    """Everything the scorer measures, as plain data; `presets`: names, and adapters with the preset of each."""
    from vmonarch_cli.demo.training.loop import save_sheet
    from vmonarch_cli.demo.training.vae_quality import score_vae
    from vmonarch_cli.pipeline.device import device_name
    from vmonarch_cli.plan.tuned import adapter_names

    result: dict[str, Any] = {"device": device_name(device), "settings": asdict(settings)}
    if reader_clips:
        result["reader"] = {"clips": reader_clips, **check_reader(reader_clips, device, settings)}
    tuned = [one for one in presets if not isinstance(one, str)]
    pipeline = load(weights, device, tuned, flow_shift=settings.flow_shift)
    if vae_clips:
        shape = {"size": settings.size, "frames": settings.num_frames}
        result["vae"] = score_vae(pipeline.vae, device, count=vae_clips, **shape)[0]
        shares = check_reader(vae_clips, device, settings, pipeline.vae)
        result["reader_through_vae"] = {"clips": vae_clips, **shares}
    specs = held_out_specs(settings.prompts, settings.num_frames)
    result["presets"] = {}
    reference: tuple[Tensor, Tensor] | None = None
    rows: dict[str, tuple[str, dict[str, AdapterFile]]] = {one: (one, {}) for one in presets if isinstance(one, str)}
    rows |= {name: (one.adapter.preset_name, {"tuned": one}) for name, one in adapter_names(tuned).items()}
    for name, (preset, adapter) in rows.items():
        start = time.monotonic()
        generated = generate(pipeline, specs, settings, preset, swap, **adapter)
        seconds = time.monotonic() - start
        entry = {**read_agreement(specs, generated[1], device), "seconds": seconds}
        if reference is None:
            reference = generated
            if sheet is not None:
                save_sheet(sheet, list(generated[1]), columns=max(1, len(specs) // 16))
        else:
            entry["against_first"] = compare(reference, generated, device)
        result["presets"][name] = entry
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of the scorer; SystemExit with one sentence for what cannot be done."""
    parser = argparse.ArgumentParser(
        prog="python -m vmonarch_cli.demo.score",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    defaults = Settings()
    parser.add_argument("--weights", type=Path, default=WEIGHTS_DIR)
    parser.add_argument("--prompts", type=int, default=defaults.prompts)
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--guidance", type=float, help="default: what the program takes for such clips")
    parser.add_argument("--batch", type=int, default=defaults.batch)
    parser.add_argument("--size", type=int, default=defaults.size)
    parser.add_argument("--frames", type=int, default=defaults.num_frames)
    parser.add_argument("--flow-shift", type=float, help="shift of the noise levels (default: that of the weights)")
    parser.add_argument("--sampler", help=f"{', '.join(SAMPLERS)} (default: what the program takes for such clips)")
    parser.add_argument("--preset", action="append", help=f"repeatable; the first is the reference (default: {DENSE})")
    parser.add_argument("--tuned", action="append", type=Path, help="an adapter, for a row of its own (repeatable)")
    parser.add_argument("--device")
    parser.add_argument("--reader-clips", type=int, default=120, help="rendered clips to check the reader on; 0: none")
    parser.add_argument("--vae-clips", type=int, default=16, help="clips for the autoencoder; 0: none")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--sheet", type=Path, help="write a PNG of the first preset's clips here")
    args = parser.parse_args(argv)
    with one_sentence():
        _run(args)


def _run(args: argparse.Namespace) -> None:
    from vmonarch_cli.pipeline.device import pick_device
    from vmonarch_cli.pipeline.load import quiet_libraries
    from vmonarch_cli.plan.tuned import read
    from vmonarch_cli.presets import load_preset

    presets = args.preset or (DENSE,)
    for name in presets:
        load_preset(name)  # an unknown one would be found when the clips of those before it are made
    check_sampler(args.sampler)
    tuned = [read(path) for path in args.tuned or ()]
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    quiet_libraries()
    sampler, guidance = usual_sampling(DEMO, args.frames, args.steps)
    sampler, guidance = args.sampler or sampler, guidance if args.guidance is None else args.guidance
    result = score(
        args.weights,
        Settings(args.prompts, args.steps, guidance, args.batch, args.size, args.frames, args.flow_shift, sampler),
        [*presets, *tuned],
        device=pick_device(args.device or "auto"),
        reader_clips=args.reader_clips,
        vae_clips=args.vae_clips,
        sheet=args.sheet,
    )
    show(result)
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
