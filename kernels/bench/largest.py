"""Find the longest clip whose denoising step fits the GPU: one structured forward per length, random weights.

    python kernels/bench/largest.py --model wan2.1-14b --size 1280x720 --frames 81 --frames 161 --json largest.json

Stops at the first length that does not fit. The time is that of a second forward, kernels compiled; the peak is the
allocator's, weights included.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from vmonarch_cli.attention import swapped
from vmonarch_cli.models.base import ModelEntry
from vmonarch_cli.models.registry import ENTRIES
from vmonarch_cli.presets import load_preset
from vmonarch_cli.profile.forward import FORWARDS, clip_in_latents
from vmonarch_cli.profile.model import random_transformer


def measure(entry: ModelEntry, transformer: Any, size: tuple[int, int], frames: int, preset: str) -> dict[str, Any]:
    """Seconds and peak bytes of one forward, or why there are none."""
    width, height = size
    grid = entry.grid(height, width, frames)
    clip = clip_in_latents(entry, height, width, frames)
    found: dict[str, Any] = {"frames": frames, "grid": grid, "tokens": grid[0] * grid[1] * grid[2]}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    try:
        latents = torch.randn(FORWARDS[entry.pipeline].latents(entry, clip), device="cuda", dtype=torch.bfloat16)
        text = torch.randn(1, entry.max_sequence_length, entry.text_dim, device="cuda", dtype=torch.bfloat16)
        timestep = torch.tensor([500.0], device="cuda")
        others = FORWARDS[entry.pipeline].others(entry, clip, torch.device("cuda"), torch.bfloat16)
        with torch.no_grad(), swapped(transformer, load_preset(preset)) as session:
            for _ in range(2):
                session.begin_clip()
                session.begin_step()
                start = time.monotonic()
                out = transformer(latents, timestep, text, return_dict=False, **others)[0]
                torch.cuda.synchronize()
                seconds.append(time.monotonic() - start)
                attention = session.end_step().attention_s
        if not torch.isfinite(out).all():
            raise ValueError("the prediction is not finite")
        found |= {"step_s": seconds[-1], "attention_s": attention, "first_s": seconds[0]}
    except torch.cuda.OutOfMemoryError:
        found["error"] = "out of memory"
    found["peak_bytes"] = torch.cuda.max_memory_allocated()
    return found


def main() -> None:
    """Measure length after length; the JSON is kept up after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[e.alias for e in ENTRIES if e.pipeline in FORWARDS], required=True)
    parser.add_argument("--size", default="1280x720", help="WIDTHxHEIGHT")
    parser.add_argument("--frames", type=int, action="append", required=True, help="repeatable, rising")
    parser.add_argument("--preset", default="paper")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    entry = next(e for e in ENTRIES if e.alias == args.model)
    width, height = (int(side) for side in args.size.split("x"))
    transformer = random_transformer(entry, torch.device("cuda"), torch.bfloat16)
    result: dict[str, Any] = {
        "model": args.model,
        "size": args.size,
        "preset": args.preset,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "commit": os.environ.get("VMONARCH_COMMIT"),
        "lengths": [],
    }
    for frames in args.frames:
        found = measure(entry, transformer, (width, height), frames, args.preset)
        result["lengths"].append(found)
        args.json.write_text(json.dumps(result, indent=2) + "\n")
        print(json.dumps(found))
        if "error" in found:
            break


if __name__ == "__main__":
    main()
