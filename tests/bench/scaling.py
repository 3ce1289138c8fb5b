"""One denoising step of a model over several GPUs against the same step on one, dense and structured.

    torchrun --standalone --nproc-per-node 2 tests/bench/scaling.py --model wan2.1-1.3b --size 832x480 --json two.json

Every process holds the model with the same random weights and splits its attention by heads, as `vmonarch generate`
does under torchrun. Afterwards the first process runs it alone: those figures are the one card that the others are
compared with, and every split prediction is checked against it, cold and warm. The exchange between the processes is
timed on its own, layer by layer, with nothing computed between.
"""

import argparse
import functools
import gc
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from vmonarch_cli.attention.parallel import ulysses
from vmonarch_cli.attention.session import AttentionSession
from vmonarch_cli.errors import InputError
from vmonarch_cli.families.base import LatentClip
from vmonarch_cli.families.registry import FAMILIES, forward_inputs
from vmonarch_cli.machine.torchrun import read_rank
from vmonarch_cli.media.metrics import relative_error
from vmonarch_cli.models.base import ModelEntry
from vmonarch_cli.models.catalogue import ENTRIES
from vmonarch_cli.models.demo import DEMO
from vmonarch_cli.pipeline import context_parallel as distributed
from vmonarch_cli.pipeline.device import dtype_name, own_device
from vmonarch_cli.presets import Preset, load_preset
from vmonarch_cli.profile.contenders import Contender, skipped, structured
from vmonarch_cli.profile.model import random_transformer
from vmonarch_cli.profile.record import Recorder, this_machine
from vmonarch_cli.profile.repeat import order_of_round, timed
from vmonarch_cli.profile.results import Spread, StepRow

# What rounding adds up to over a model's layers when its heads are computed elsewhere.
TOLERANCE = {torch.bfloat16: 8e-2, torch.float32: 1e-4}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
WAN_ENTRIES = [entry for entry in (DEMO, *ENTRIES) if entry.pipeline == "WanPipeline"]
Size = tuple[int, int]


def forward_arguments(
    entry: ModelEntry, size: Size, frames: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """What one forward takes, the same in every process."""
    clip = LatentClip.of(entry, size[1], size[0], frames)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(forward_inputs(entry).latents(entry, clip), generator=generator)
    text = torch.randn(1, entry.max_sequence_length, entry.text_dim, generator=generator)
    return {
        "hidden_states": noise.to(device, dtype),
        "timestep": torch.tensor([500.0], device=device),
        "encoder_hidden_states": text.to(device, dtype),
        "return_dict": False,
    }


def contenders(transformer: Any, presets: list[Preset]) -> list[Contender]:
    """Dense attention on the device's fastest backend, the presets, and skipped attention."""
    layers = len(FAMILIES[type(transformer).__name__].self_attentions(transformer))
    found = [
        structured(transformer, StepRow(preset.name, preset.attention), AttentionSession(preset, [layers]))
        for preset in (load_preset("dense"), *presets)
    ]
    return [*found, skipped(transformer, layers)]


def step(contender: Contender, transformer: Any, arguments: dict[str, Any]) -> torch.Tensor:
    """One step's prediction, of a contender in its place; its session adds the step to its own."""
    session = contender.session
    assert session is not None
    session.begin_step()
    prediction: torch.Tensor = transformer(**arguments)[0]
    session.end_step()
    return prediction


def measure(
    transformer: Any, presets: list[Preset], arguments: dict[str, Any], device: torch.device, repeats: int
) -> tuple[dict[str, dict[str, Any]], dict[str, list[torch.Tensor]]]:
    """Per contender: times, attention's part of them and peak memory; and its predictions, cold and then warm."""
    predictions: dict[str, list[torch.Tensor]] = {}
    peaks: dict[str, int | None] = {}
    found = contenders(transformer, presets)
    on_gpu = device.type == "cuda"
    for contender in found:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        with contender.enter():
            predictions[contender.row.name] = [step(contender, transformer, arguments).cpu() for _ in range(2)]
        peaks[contender.row.name] = torch.cuda.max_memory_allocated(device) if on_gpu else None
    seconds: dict[str, list[float]] = {contender.row.name: [] for contender in found}
    for index in range(repeats):
        for contender in order_of_round(found, index):
            with contender.enter():  # which is no part of a step
                run = functools.partial(step, contender, transformer, arguments)
                seconds[contender.row.name] += timed({"step": run}, device, repeats=1)["step"]
    rows = {}
    for contender in found:
        name, session = contender.row.name, contender.session
        assert session is not None
        spread = Spread.of(seconds[name])
        row = {"step_s": spread.median, "quartiles_s": [spread.low, spread.high], "repeats": spread.count}
        if contender.row.kind != "skipped":
            row["attention_s"] = statistics.median(s.attention_s for s in session.steps[-spread.count :])
        rows[name] = row | {"peak_bytes": peaks[name]}
    return rows, predictions


def exchange_seconds(transformer: Any, entry: ModelEntry, tokens: int, device: torch.device, repeats: int) -> float:
    """Median seconds that all layers of one forward exchange their heads for tokens and back, with nothing between."""
    modules = FAMILIES[type(transformer).__name__].self_attentions(transformer)
    config = next(iter(modules.values())).processor._parallel_config
    shape = (1, tokens // read_rank().world, entry.heads, entry.head_dim)
    q, k, v = (torch.randn(shape, device=device, dtype=transformer.dtype) for _ in range(3))

    def exchange() -> None:
        for _ in modules:
            ulysses(q, k, v, config, lambda q, k, v: v)

    exchange()
    return statistics.median(timed({"exchange": exchange}, device, repeats)["exchange"])


def compared(
    together: dict[str, dict[str, Any]],
    predictions: dict[str, list[torch.Tensor]],
    alone: dict[str, dict[str, Any]],
    expected: dict[str, list[torch.Tensor]],
    tolerance: float,
) -> dict[str, dict[str, Any]]:
    """Rows of the record; the efficiency is 1 when N processes take an Nth of the time."""
    rows = {}
    for name, row in together.items():
        error = max(relative_error(*pair) for pair in zip(predictions[name], expected[name], strict=True))
        rows[name] = {
            "alone": alone[name],
            "together": row,
            "efficiency": alone[name]["step_s"] / (read_rank().world * row["step_s"]),
            "error": error,
            "passed": error <= tolerance,
        }
    return rows


def show(result: dict[str, Any], caption: str) -> None:
    """Print the table of one size."""
    count = read_rank().world
    columns = ("self-attention", "one, ms", f"{count}, ms", "of it attention, ms", "efficiency", "error", "check")
    table = Table(*columns, title=f"{result['size']}, {result['tokens']:,} tokens, one forward", caption=caption)
    for name, row in result["rows"].items():
        attention = row["together"].get("attention_s")
        table.add_row(
            name,
            f"{1e3 * row['alone']['step_s']:.1f}",
            f"{1e3 * row['together']['step_s']:.1f}",
            "" if attention is None else f"{1e3 * attention:.1f}",
            f"{100 * row['efficiency']:.0f} %",
            f"{row['error']:.1e}",
            "passed" if row["passed"] else "FAILED",
        )
    console = Console()
    console.print(table)
    console.print(f"exchange between the processes: {1e3 * result['exchange_s']:.1f} ms a forward")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[e.alias for e in WAN_ENTRIES], default="wan2.1-1.3b")
    parser.add_argument("--size", action="append", help="WIDTHxHEIGHT, repeatable (default: 832x480)")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--preset", action="append", help="repeatable (default: paper and balanced)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="default: bfloat16 on a GPU, float32 elsewhere")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> int:
    """Measure, check and write; 1 when a split prediction is not the one of a single process."""
    args = parsed()
    entry = next(e for e in WAN_ENTRIES if e.alias == args.model)
    presets = [load_preset(name) for name in args.preset or ("paper", "balanced")]
    device = own_device()
    dtype = DTYPES[args.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    sizes: list[Size] = []
    try:
        if read_rank().world == 1:
            raise InputError("one process has nothing to share: start this with torchrun --nproc-per-node 2 or more")
        for text in args.size or ("832x480",):
            width, height = (int(side) for side in text.split("x"))
            entry.check_shape(height, width, args.frames)
            distributed.check_tokens(tokens_of(entry, (width, height), args.frames))
            sizes.append((width, height))
        with torch.no_grad():
            return run(args, entry, presets, sizes, device, dtype)
    except InputError as error:
        if read_rank().is_main:
            sys.stderr.write(f"error: {error}\n")
        return error.exit_code


def tokens_of(entry: ModelEntry, size: Size, frames: int) -> int:
    grid = entry.grid(size[1], size[0], frames)
    return grid[0] * grid[1] * grid[2]


def run(
    args: argparse.Namespace,
    entry: ModelEntry,
    presets: list[Preset],
    sizes: list[Size],
    device: torch.device,
    dtype: torch.dtype,
) -> int:
    """All sizes together, then all of them alone in the first process, which compares and writes."""
    main_process, world = read_rank().is_main, read_rank().world
    transformer = random_transformer(entry, device, dtype)
    distributed.split(SimpleNamespace(transformer=transformer), device)
    shared: list[tuple[dict[str, Any], dict[str, Any], float]] = []
    for size in sizes:
        arguments = forward_arguments(entry, size, args.frames, device, dtype)
        together, predictions = measure(transformer, presets, arguments, device, args.repeats)
        exchange_s = exchange_seconds(transformer, entry, tokens_of(entry, size, args.frames), device, args.repeats)
        peaks: list[Any] = [None] * world
        dist.all_gather_object(peaks, {name: row["peak_bytes"] for name, row in together.items()})
        for name, row in together.items():
            row["peak_bytes"] = [peak[name] for peak in peaks]
        shared.append((together, predictions, exchange_s))
    del transformer, arguments, together, predictions
    gc.collect()
    if device.type == "cuda":  # what one card needs alone is measured from here on
        torch.cuda.empty_cache()
    passed = True
    if main_process:
        machine = this_machine(device)
        settings = {
            "model": args.model, "frames": args.frames, "processes": world, "repeats": args.repeats,
            "dtype": dtype_name(dtype), "presets": [preset.model_dump() for preset in presets],
        }  # fmt: skip
        program = f"torchrun --standalone --nproc-per-node {world} tests/bench/scaling.py"
        recorder = Recorder("scaling", args.json and str(args.json), machine, settings, program)
        single = random_transformer(entry, device, dtype)
        found: list[dict[str, Any]] = []
        for size, (together, predictions, exchange_s) in zip(sizes, shared, strict=True):
            arguments = forward_arguments(entry, size, args.frames, device, dtype)
            alone, expected = measure(single, presets, arguments, device, args.repeats)
            rows = compared(together, predictions, alone, expected, TOLERANCE[dtype])
            result = {
                "size": "x".join(map(str, size)), "tokens": tokens_of(entry, size, args.frames),
                "exchange_s": exchange_s, "rows": rows,
            }  # fmt: skip
            found.append(result)
            recorder.save(clips=found)
            show(result, machine.caption())
        passed = all(row["passed"] for result in found for row in result["rows"].values())
        recorder.finish(passed)
    dist.barrier()
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
