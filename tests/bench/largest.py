"""Find the longest clip whose denoising step fits the GPU: one structured forward per length, random weights.

    python tests/bench/largest.py --model wan2.1-14b --size 1280x720 --card 79 --frames 81 --frames 401 --json x.json

Stops at the first length that does not fit. The time leaves out the first calls, which compile kernels; the peak is
the allocator's, weights included. `--card` stands for a smaller GPU than the one that is there.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from vmonarch_cli.families.base import LatentClip
from vmonarch_cli.families.registry import forward_inputs
from vmonarch_cli.models.base import ModelEntry
from vmonarch_cli.models.catalogue import ENTRIES, PIPELINES
from vmonarch_cli.pipeline.swap import swapped
from vmonarch_cli.presets import load_preset
from vmonarch_cli.profile.model import random_transformer
from vmonarch_cli.profile.record import Recorder, this_machine


def measure(entry: ModelEntry, transformer: Any, size: tuple[int, int], frames: int, preset: str) -> dict[str, Any]:
    """Seconds and peak bytes of one forward, whose prediction must be finite; or why there are none."""
    width, height = size
    grid = entry.grid(height, width, frames)
    clip = LatentClip.of(entry, height, width, frames)
    found: dict[str, Any] = {"frames": frames, "grid": grid, "tokens": grid[0] * grid[1] * grid[2]}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        latents = torch.randn(forward_inputs(entry).latents(entry, clip), device="cuda", dtype=torch.bfloat16)
        text = torch.randn(1, entry.max_sequence_length, entry.text_dim, device="cuda", dtype=torch.bfloat16)
        timestep = torch.tensor([500.0], device="cuda")
        others = forward_inputs(entry).others(entry, clip, torch.device("cuda"), torch.bfloat16)
        with torch.no_grad(), swapped(transformer, load_preset(preset)) as session:
            session.begin_step()
            out = transformer(latents, timestep, text, return_dict=False, **others)[0]
            step = session.end_step()
        if not torch.isfinite(out).all():
            raise ValueError("the prediction is not finite")
        found |= {"step_s": step.step_s, "attention_s": step.attention_s, "first_call_s": step.first_call_s}
    except torch.cuda.OutOfMemoryError:
        found["error"] = "out of memory"
    found["peak_bytes"] = torch.cuda.max_memory_allocated()
    return found


def main() -> None:
    """Measure length after length; the JSON is kept up after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", choices=[e.alias for e in ENTRIES if PIPELINES[e.pipeline].transformer_config], required=True
    )
    parser.add_argument("--size", default="1280x720", help="WIDTHxHEIGHT")
    parser.add_argument("--frames", type=int, action="append", required=True, help="repeatable, rising")
    parser.add_argument("--preset", default="paper")
    parser.add_argument("--card", type=float, help="GiB that may be used (default: all)")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    entry = next(e for e in ENTRIES if e.alias == args.model)
    width, height = (int(side) for side in args.size.split("x"))
    device = torch.device("cuda")
    if args.card is not None:
        torch.cuda.set_per_process_memory_fraction(
            args.card * 2**30 / torch.cuda.get_device_properties(device).total_memory
        )
    transformer = random_transformer(entry, device, torch.bfloat16)
    settings = {
        "model": args.model,
        "size": args.size,
        "preset": args.preset,
        "dtype": "bfloat16",
        "card_gib": args.card,
    }
    recorder = Recorder("largest", str(args.json), this_machine(device), settings, "python tests/bench/largest.py")
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
