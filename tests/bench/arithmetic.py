"""Measure what arithmetic costs in quality: the demo model's clips with fused blocks, `--quantize fp8` and a bfloat16
VAE, each on and off, from the same prompts and noise.

    python tests/bench/arithmetic.py --preset paper --preset fast --json arithmetic.json

Every preset's first row has stock blocks, 16-bit products and the float32 VAE of an ordinary run; each row after it
changes one of them, the last all. fp8 needs a GPU that computes in it; without one those rows are left out.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmonarch_cli.demo.model import WEIGHTS_DIR
from vmonarch_cli.demo.reader import ATTRIBUTES
from vmonarch_cli.demo.score import DENSE, Settings, compare, generate, held_out_specs, load, read_agreement
from vmonarch_cli.errors import DeviceError, InputError
from vmonarch_cli.pipeline.device import pick_device
from vmonarch_cli.pipeline.fuse import fuse
from vmonarch_cli.pipeline.load import quiet_libraries
from vmonarch_cli.pipeline.quantize import check_quantize, compute_in
from vmonarch_cli.presets import load_preset
from vmonarch_cli.profile.record import Recorder, check_target, this_machine
from vmonarch_kernels import resolve_fused_impl

Clips = tuple[Tensor, Tensor]
"""Final latents and decoded clips, as `generate` gives them."""


@dataclass(frozen=True)
class Variant:
    """One way to compute a clip."""

    name: str
    fused: bool = False
    fp8: bool = False
    narrow_vae: bool = False


STOCK = Variant("stock")
VARIANTS = (
    STOCK,
    Variant("fused blocks", fused=True),
    Variant("bfloat16 VAE", narrow_vae=True),
    Variant("fp8", fp8=True),
    Variant("all", fused=True, fp8=True, narrow_vae=True),
)


def variants_on(device: torch.device) -> tuple[list[Variant], list[dict[str, str]]]:
    """(those that the device can run, the others with the reason)."""
    try:
        check_quantize("fp8", device, torch.bfloat16)
    except (DeviceError, InputError) as error:
        skipped = [{"what": one.name, "why": error.message} for one in VARIANTS if one.fp8]
        return [one for one in VARIANTS if not one.fp8], skipped
    return list(VARIANTS), []


def pipeline_of(variant: Variant, device: torch.device) -> Any:
    """The demo's pipeline, which computes as the variant says."""
    pipeline = load(WEIGHTS_DIR, device)
    transformer = pipeline.transformer
    if variant.fp8:
        compute_in(transformer, "fp8", device)
    if variant.fused:
        fuse(transformer, resolve_fused_impl("auto", device, transformer.dtype))
    if variant.narrow_vae:
        pipeline.vae.to(torch.bfloat16)
    return pipeline


def row_of(
    preset: str,
    variant: Variant,
    clips: Clips,
    references: dict[str, Clips],
    scored: dict[str, Any],
    device: torch.device,
) -> dict[str, Any]:
    """What is written of one variant: attributes shown, distance from dense and from the preset's own stock clips."""
    from_dense = compare(references[DENSE], clips, device)
    from_stock = None if variant == STOCK else compare(references[preset], clips, device)
    return {
        "preset": preset,
        "variant": variant.name,
        **{name: scored[name] for name in ATTRIBUTES},
        "latent_error": from_dense["latent_error_mean"],
        "psnr": from_dense["psnr_median"],
        "from_stock": None if from_stock is None else from_stock["latent_error_mean"],
        "psnr_from_stock": None if from_stock is None else from_stock["psnr_median"],
    }


def main(argv: list[str] | None = None) -> None:
    """Measure row after row; the JSON is kept up after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", action="append", help="repeatable, beside dense (default: paper)")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--frames", type=int, default=49)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args(argv)
    quiet_libraries()
    presets = [DENSE, *(name for name in args.preset or ("paper",) if name != DENSE)]
    for name in presets:
        load_preset(name)  # an unknown one would be found when the clips before it are made
    check_target(str(args.json), overwrite=True)
    device = pick_device(args.device)
    chosen = Settings(args.prompts, args.steps, batch=args.batch, size=args.size, num_frames=args.frames)
    specs = held_out_specs(chosen.prompts, chosen.num_frames)
    variants, skipped = variants_on(device)
    settings = {name: getattr(chosen, name) for name in ("prompts", "steps", "guidance", "size", "num_frames")}
    recorder = Recorder(
        "arithmetic", str(args.json), this_machine(device), settings, "python tests/bench/arithmetic.py"
    )
    recorder.save(skipped=skipped)
    references: dict[str, Clips] = {}
    rows: list[dict[str, Any]] = []
    for variant in variants:
        pipeline = pipeline_of(variant, device)
        for preset in presets:
            clips = generate(pipeline, specs, chosen, preset)
            if variant == STOCK:
                references[preset] = clips
            scored = read_agreement(specs, clips[1], device)
            rows.append(row_of(preset, variant, clips, references, scored, device))
            recorder.save(rows=rows)
            print(rows[-1], flush=True)
    recorder.finish(all(math.isfinite(row["latent_error"]) for row in rows))


if __name__ == "__main__":
    main()
