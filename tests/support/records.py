"""Clips and records that no model made: a plan, invented figures and grey frames, written as a run writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from vmonarch_cli.clip.latents import Denoised
from vmonarch_cli.clip.record import make_record, make_timing
from vmonarch_cli.clip.whole import file_facts
from vmonarch_cli.media.paths import record_path
from vmonarch_cli.media.write import pixels_of, write_clip, write_record
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.timing import Coverage, StepAttention


def denoised(plan: Plan, latents: torch.Tensor | None = None, **facts: Any) -> Denoised:
    """Latents of a plan's first clip (zeros, (1, 16, F, h, w)) with invented figures."""
    frames, rows, columns = plan.grid
    steps = [
        StepAttention(
            index=i,
            total=plan.steps,
            sigma=0.5,
            step_s=2.0,
            attention_s=1.0,
            calls=10,
            structured_calls=10,
        )
        for i in range(plan.steps)
    ]
    made: dict[str, Any] = {
        "latents": torch.zeros(1, 16, frames, 2 * rows, 2 * columns) if latents is None else latents,
        "seed": plan.seed,
        "impl": "torch",
        "grid": plan.grid,
        "coverage": Coverage(10 * plan.steps),
        "steps": steps,
        "text_encode_s": 0.1,
        "denoise_s": 2.0 * plan.steps,
        "excluded_s": 0.0,
        "total_s": 2.0 * plan.steps + 0.1,
        "peak_memory_bytes": 2**20,
        "warm_state_bytes": 0,
        "device": {"type": "cpu", "name": "CPU (1 threads)", "threads": 1},
        "dtype": "float32",
    }
    return Denoised(**{**made, **facts})


def write(plan: Plan, *, clip: bool = False) -> Path:
    """The record of the plan's first clip, beside where the clip would be; the clip itself, grey, only if asked for."""
    latents = denoised(plan)
    frames = np.full((plan.num_frames, plan.height, plan.width, 3), 128, np.uint8)
    timing = make_timing(latents, 1.0, 0.1, (2**20, "process"))
    path = plan.outputs[0]
    facts = file_facts(write_clip(frames, path, plan.fps, overwrite=True)) if clip else None
    return write_record(record_path(path), make_record(plan, latents, timing, path, pixels_of(frames), facts))
