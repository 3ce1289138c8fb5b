"""Clips of held-out prompts, drawn with the exported pipeline as a user would, on one sheet."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from vmonarch_cli.demo.captions import plain_caption
from vmonarch_cli.demo.clips import FPS
from vmonarch_cli.demo.specs import sample_spec
from vmonarch_cli.demo.training import loop
from vmonarch_cli.models.demo_vocabulary import MAX_TOKENS


@torch.no_grad()
def draw_samples(weights: Path, args: argparse.Namespace, device: torch.device, log: loop.JsonLog) -> None:
    """Write dit_sheet.png into `args.out` with `args.samples` clips of the pipeline in `weights`."""
    from diffusers import WanPipeline

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipeline = WanPipeline.from_pretrained(weights, dtype=dtype).to(device)
    pipeline.set_progress_bar_config(disable=True)
    shape = args.clips[0]
    specs = [sample_spec("heldout", 1, i, shape.frames) for i in range(args.samples)]
    prompts = [plain_caption(s) for s in specs]
    start = time.monotonic()
    frames = pipeline(
        prompts, height=shape.size, width=shape.size, num_frames=shape.frames, guidance_scale=4.0,
        num_inference_steps=args.sample_steps, max_sequence_length=MAX_TOKENS, output_type="pt",
        generator=[torch.Generator(device).manual_seed(i) for i in range(len(specs))],
    ).frames  # fmt: skip
    clips = frames.float().permute(0, 2, 1, 3, 4) * 2 - 1
    loop.save_sheet(args.out / "dit_sheet.png", list(clips))
    log.write("samples", prompts=prompts, took=time.monotonic() - start, frames_per_second=FPS)
