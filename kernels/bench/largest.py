"""Find the longest clip whose denoising step fits the GPU: one structured forward per length, random weights.

    python kernels/bench/largest.py --model wan2.1-14b --size 1280x720 --frames 81 --frames 161 --json largest.json

Stops at the first length that does not fit. The time is that of a second forward, kernels compiled; the peak is the
allocator's, weights included.
"""

import argparse
import json
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
from vmonarch_cli.profile.record import Recorder, this_machine


def measure(entry: ModelEntry, transformer: Any, size: tuple[int, int], frames: int, preset: str) -> dict[str, Any]:
    """Seconds and peak bytes of one forward, whose prediction must be finite; or why there are none."""
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
    device = torch.device("cuda")
    transformer = random_transformer(entry, device, torch.bfloat16)
    settings = {"model": args.model, "size": args.size, "preset": args.preset, "dtype": "bfloat16"}
    recorder = Recorder("largest", str(args.json), this_machine(device), settings, "python kernels/bench/largest.py")
    lengths: list[dict[str, Any]] = []
    for frames in args.frames:
        lengths.append(measure(entry, transformer, (width, height), frames, args.preset))
        recorder.save(lengths=lengths)
        print(json.dumps(lengths[-1]))
        if "error" in lengths[-1]:
            break
    recorder.finish(any("step_s" in length for length in lengths))


if __name__ == "__main__":
    main()
