"""One denoising step of a model over several GPUs against the same step on one, dense and structured.

    torchrun --standalone --nproc-per-node 2 kernels/bench/scaling.py --model wan2.1-1.3b --size 832x480 --json two.json

Every process holds the model with the same random weights and splits its attention by heads, as `vmonarch generate`
does under torchrun. The first process also runs it alone: those figures are the one card that the others are compared
with, and every split prediction is checked against it, cold and warm. The exchange between the processes is timed on
its own, layer by layer, with nothing computed between.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from vmonarch_cli import distributed
from vmonarch_cli.attention import AttentionSession
from vmonarch_cli.attention.parallel import ulysses
from vmonarch_cli.attention.processors import FAMILIES
from vmonarch_cli.errors import InputError
from vmonarch_cli.metrics import relative_error
from vmonarch_cli.models.base import ModelEntry
from vmonarch_cli.models.demo import DEMO
from vmonarch_cli.models.registry import ENTRIES
from vmonarch_cli.presets import load_preset
from vmonarch_cli.profile.contenders import Contender, contenders
from vmonarch_cli.profile.forward import FORWARDS, clip_in_latents
from vmonarch_cli.profile.model import random_transformer
from vmonarch_cli.profile.record import commit, this_machine
from vmonarch_cli.profile.repeat import timed
from vmonarch_cli.profile.results import Spread
from vmonarch_cli.ranks import read_rank
from vmonarch_kernels import dense_backends

# What rounding adds up to over a model's layers when its heads are computed elsewhere.
TOLERANCE = {torch.bfloat16: 8e-2, torch.float32: 1e-4}
WAN_ENTRIES = [entry for entry in (DEMO, *ENTRIES) if entry.pipeline == "WanPipeline"]


def forward_arguments(
    entry: ModelEntry, size: tuple[int, int], frames: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """What one forward takes, the same in every process."""
    clip = clip_in_latents(entry, size[1], size[0], frames)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(FORWARDS[entry.pipeline].latents(entry, clip), generator=generator)
    text = torch.randn(1, entry.max_sequence_length, entry.text_dim, generator=generator)
    return {
        "hidden_states": noise.to(device, dtype),
        "timestep": torch.tensor([500.0], device=device),
        "encoder_hidden_states": text.to(device, dtype),
        "return_dict": False,
    }


def step(contender: Contender, transformer: Any, arguments: dict[str, Any]) -> torch.Tensor:
    """One step's prediction; the session of a structured contender adds the step to its own."""
    with contender.enter():
        if contender.session is not None:
            contender.session.begin_step()
        prediction: torch.Tensor = transformer(**arguments)[0]
        if contender.session is not None:
            contender.session.end_step()
    return prediction


def measure(
    found: list[Contender], transformer: Any, arguments: dict[str, Any], device: torch.device, repeats: int
) -> tuple[dict[str, dict[str, Any]], dict[str, list[torch.Tensor]]]:
    """Per contender: times, attention's part of them and peak memory; and its predictions, cold and then warm."""
    predictions: dict[str, list[torch.Tensor]] = {}
    peaks: dict[str, int | None] = {}
    for contender in found:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        predictions[contender.row.name] = [step(contender, transformer, arguments).cpu() for _ in range(2)]
        peaks[contender.row.name] = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    calls: dict[str, Callable[[], Any]] = {
        c.row.name: lambda c=c: step(c, transformer, arguments)  # type: ignore[misc]
        for c in found
    }
    seconds = timed(calls, device, repeats)
    rows = {}
    for contender in found:
        spread = Spread.of(seconds[contender.row.name])
        row = {"step_s": spread.median, "quartiles_s": [spread.low, spread.high], "repeats": spread.count}
        if isinstance(contender.session, AttentionSession) and contender.row.kind == "structured":
            row["attention_s"] = statistics.median(s.attention_s for s in contender.session.steps[-repeats:])
        rows[contender.row.name] = row | {"peak_bytes": peaks[contender.row.name]}
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


def efficiency(alone_s: float, together_s: float) -> float:
    """Share of the ideal speedup: 1 when N processes take an Nth of the time."""
    return alone_s / (read_rank().world * together_s)


def show(result: dict[str, Any]) -> None:
    """Print the table of the record."""
    count = result["processes"]
    columns = ("self-attention", "one, ms", f"{count}, ms", "attention, ms", "efficiency", "error", "check")
    table = Table(*columns, title=f"{result['model']} {result['size']}, {result['frames']} frames, one forward")
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
    console.print(f"exchange between the processes: {1e3 * result['exchange_s']:.1f} ms a forward; {result['caption']}")


def main() -> int:
    """Measure, check and write; 1 when a split prediction is not the one of a single process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[e.alias for e in WAN_ENTRIES], default="wan2.1-1.3b")
    parser.add_argument("--size", default="832x480", help="WIDTHxHEIGHT")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--preset", action="append", help="repeatable (default: paper and balanced)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    entry = next(e for e in WAN_ENTRIES if e.alias == args.model)
    width, height = (int(side) for side in args.size.split("x"))
    presets = [load_preset(name) for name in args.preset or ("paper", "balanced")]
    device = distributed.own_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    entry.check_shape(height, width, args.frames)
    grid = entry.grid(height, width, args.frames)
    tokens = grid[0] * grid[1] * grid[2]
    backends = dense_backends(device, dtype)[:1] if device.type == "cuda" else ()
    try:
        if read_rank().world == 1:
            raise InputError("one process has nothing to share: start this with torchrun --nproc-per-node 2 or more")
        distributed.check_tokens(tokens)
        transformer = random_transformer(entry, device, dtype)
        distributed.split(SimpleNamespace(transformer=transformer), device)
    except InputError as error:
        if read_rank().is_main:
            sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    with torch.no_grad():
        arguments = forward_arguments(entry, (width, height), args.frames, device, dtype)
        together, predictions = measure(
            contenders(transformer, presets, device, dtype, backends), transformer, arguments, device, args.repeats
        )
        exchange_s = exchange_seconds(transformer, entry, tokens, device, args.repeats)
        peaks: list[Any] = [None] * read_rank().world
        dist.all_gather_object(peaks, {name: row["peak_bytes"] for name, row in together.items()})
        failed = False
        if read_rank().is_main:
            single = random_transformer(entry, device, dtype)
            alone, expected = measure(
                contenders(single, presets, device, dtype, backends), single, arguments, device, args.repeats
            )
            machine = this_machine(device)
            result: dict[str, Any] = {
                "kind": "scaling", "model": args.model, "size": args.size, "frames": args.frames, "tokens": tokens,
                "processes": read_rank().world, "dtype": str(dtype).removeprefix("torch."),
                "device": machine.details, "versions": machine.versions, "caption": machine.caption(),
                "commit": commit(), "exchange_s": exchange_s, "rows": {},
            }  # fmt: skip
            for name, row in together.items():
                error = max(relative_error(*pair) for pair in zip(predictions[name], expected[name], strict=True))
                result["rows"][name] = {
                    "alone": alone[name],
                    "together": row | {"peak_bytes": [peak[name] for peak in peaks]},
                    "efficiency": efficiency(alone[name]["step_s"], row["step_s"]),
                    "error": error,
                    "passed": error <= TOLERANCE[dtype],
                }
            failed = not all(row["passed"] for row in result["rows"].values())
            if args.json is not None:
                args.json.write_text(json.dumps(result, indent=1) + "\n")
            show(result)
        dist.barrier()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
