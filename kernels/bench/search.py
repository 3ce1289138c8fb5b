"""Measure tiles of the attention and L-step kernels on the GPU at hand and print the best.

    python kernels/bench/search.py --shape 21x1560x12x128 --json tiles.json

Compiles the candidates in parallel processes first, then times each one (median of CUDA-event
timings) after comparing its output with the table's own tile. Nothing here runs in the product:
what it finds is written into `vmonarch_kernels/configs.py` by hand.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, TimeoutError
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from vmonarch_kernels import launch
from vmonarch_kernels.configs import AttendConfig, HopperConfig, LStepConfig, chip, shared_memory_bytes
from vmonarch_kernels.spec import PAPER, Inputs, Options
from vmonarch_kernels.structure import L_DTYPE, empty_l

KINDS = ("r", "rv", "first", "band")


def make_call(shape: tuple[int, int, int, int], dtype: torch.dtype) -> launch.Call:
    frames, positions, heads, dim = shape
    torch.manual_seed(0)
    size = (1, frames * positions, heads, dim)
    q, k, v = (torch.randn(size, device="cuda", dtype=dtype) for _ in range(3))
    return launch.Call.of(Inputs(q, k, v, (frames, 1, positions)), PAPER)


def attend_runner(call: launch.Call, kind: str) -> tuple[Callable[[], None], list[torch.Tensor], int]:
    """(launch, outputs, units of N P D heads floating-point operations) of one kind of call."""
    frames = call.sizes[1]
    rk, c_l, out, lse = call.like_q(), call.statistic(), call.like_q(), call.statistic()
    if kind == "r":
        return lambda: launch.r_step(call, call.q, rk, c_l, None), [rk, c_l], 4
    if kind == "rv":
        return lambda: launch.r_step(call, call.q, rk, c_l, out), [rk, c_l, out], 6
    if kind == "first":
        return lambda: launch._attend_frame(call, 0, out[:, 0], lse[:, :, 0]), [out[:, 0]], 4
    targets, window = launch._Targets(out=out, lse=lse), launch._Window(0, frames, band=0, width=1)
    return lambda: launch._attend(call, call.q, targets, window), [out, lse], 4


def median_ms(run: Callable[[], object], repeats: int = 15) -> float:
    """Calls are queued back to back, so that the GPU and not the host's launching is timed."""
    for _ in range(3):
        run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))


def use_attend(config: AttendConfig | HopperConfig) -> None:
    """Make every launch take this tile, and the kernel that it belongs to."""
    hopper = config if isinstance(config, HopperConfig) else None
    launch.hopper_config = lambda *_, **__: hopper  # type: ignore[assignment]
    if isinstance(config, AttendConfig):
        launch.attend_config = lambda *_, **__: config  # type: ignore[assignment]


def use_table() -> None:
    launch.attend_config, launch.hopper_config, launch.l_output_config, launch.r_queries_config = TABLE


def use_l_step(config: LStepConfig) -> None:
    launch.l_output_config = lambda *_, **__: config  # type: ignore[assignment]
    launch.r_queries_config = lambda *_, **__: config  # type: ignore[assignment]


def try_attend(shape: tuple[int, int, int, int], kind: str, config: AttendConfig | HopperConfig) -> str:
    """Compile and run once in a worker process; the compiled kernel stays in Triton's disk cache."""
    use_attend(config)
    run, _, _ = attend_runner(make_call(shape, torch.bfloat16), kind)
    run()
    torch.cuda.synchronize()
    return "ok"


# (query rows, warps) and (key rows, stages) worth crossing; larger tiles spill on every chip tried.
QUERY_TILES = ((64, 4), (128, 4), (128, 8))
KEY_TILES = ((64, 2), (64, 3), (128, 2))


def candidates(dim: int, limit: int, kind: str) -> list[AttendConfig | HopperConfig]:
    """Tiles that fit shared memory and whose accumulators fit the registers, and the Hopper kernel's on its chip."""
    accumulators, value_tiles = (2 if kind == "rv" else 1), int(kind != "r")
    found: list[AttendConfig | HopperConfig] = []
    for (block_m, warps), (block_n, stages) in itertools.product(QUERY_TILES, KEY_TILES):
        config = AttendConfig(block_m, block_n, warps, stages)
        if block_m // warps == 32 and (accumulators * dim > 128 or block_n > 64):
            continue
        if shared_memory_bytes(config, dim, 2, value_tiles) <= limit:
            found.append(config)
    if torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0):
        for block_n, stages, query_stages in itertools.product((64, 128), (2, 3, 4, 5, 8), (1, 2)):
            queries, keys = 2 * 64 * dim * 2 * query_stages, (1 + value_tiles) * block_n * dim * 2 * stages
            if queries + keys + 1024 <= limit and (accumulators == 1 or dim * block_n <= 64 * 128):
                found.append(HopperConfig(block_n, stages, query_stages))
    return found


def search_attend(shape: tuple[int, int, int, int], kind: str) -> list[dict[str, Any]]:
    call = make_call(shape, torch.bfloat16)
    run, outputs, units = attend_runner(call, kind)
    table_ms = median_ms(run)
    expected = [x.clone() for x in outputs]
    frames, positions, heads, dim = shape
    flops = units * frames * positions * positions * dim * heads
    if kind == "first":
        flops = 4 * frames * positions * positions * dim * heads
    rows: list[dict[str, Any]] = [{"kind": kind, "config": "table", "ms": table_ms, "tflops": flops / table_ms / 1e9}]
    for config in candidates(dim, call.chip.shared_memory, kind):
        use_attend(config)
        try:
            run()
            ok = all(
                torch.allclose(a.float(), b.float(), atol=3e-2, rtol=3e-2)
                for a, b in zip(outputs, expected, strict=True)
            )
            ms = median_ms(run) if ok else float("nan")
            rows.append({"kind": kind, "config": asdict(config), "ms": ms, "tflops": flops / ms / 1e9, "right": ok})
        except Exception as error:  # a tile that does not compile is a result of the search
            rows.append({"kind": kind, "config": asdict(config), "ms": float("nan"), "error": str(error)[:200]})
    use_table()
    return rows


def l_candidates(frames: int, dim: int) -> list[LStepConfig]:
    """One tile of all frames up to 64; up to 128 all key frames, or all query frames, beside fewer of the others."""
    padded = max(16, 1 << (frames - 1).bit_length())
    if padded <= 64:
        tiles = [(padded, padded)]
    else:
        tiles = [(32, 128), (128, 64), (128, 32)] if padded == 128 else [(32, 32)]
    rows = ((1, 1), (1, 8), (2, 8), (3, 8)) if padded <= 128 else ((1, 1), (2, 1))
    parts = (1, 2) if 32 <= padded <= 128 and dim == 128 else (1,)
    return [
        LStepConfig(block_l, block_k, warps, stages, strip, part)
        for (block_l, block_k), warps, (stages, strip), part in itertools.product(tiles, (2, 4, 8), rows, parts)
    ]


def l_runners(call: launch.Call, config: LStepConfig) -> dict[str, Callable[[], object]]:
    """The L-step kernels as `paper` and as `fast` run them, those that the tile fits."""
    frames, positions = call.sizes[1:3]
    rk, y, c_l = call.like_q().normal_(), call.like_q().normal_(), call.statistic().normal_()
    r_step = (rk, c_l, y)
    l_prev = empty_l(call.q).copy_(torch.rand(frames, frames, device="cuda") / frames)
    exact = (call.like_q().normal_(), call.statistic().normal_())
    values = call.like_q().normal_().to(L_DTYPE)
    residual = (values, torch.rand(1, positions, call.sizes[3], frames, device="cuda"))
    banded = replace(call, options=Options(first_frame=False, band=0))
    whole_rows = frames <= config.block_k or config.block_l == config.block_k
    runners: dict[str, Callable[[], object]] = {"queries from L": lambda: launch.r_queries(call, l_prev=l_prev)}
    if whole_rows:
        runners["queries"] = lambda: launch.r_queries(call, rk=rk, c_l=c_l)
        runners["out"] = lambda: launch._l_output(call, r_step, None, None, False)
        runners["out fast"] = lambda: launch._l_output(banded, r_step, exact, residual, True)
    return runners


def try_l(shape: tuple[int, int, int, int], config: LStepConfig) -> str:
    """As ``try_attend``, for the L-step kernels."""
    use_l_step(config)
    for run in l_runners(make_call(shape, torch.bfloat16), config).values():
        run()
    torch.cuda.synchronize()
    return "ok"


def search_l(shape: tuple[int, int, int, int]) -> list[dict[str, Any]]:
    call = make_call(shape, torch.bfloat16)
    rows = []
    for config in l_candidates(shape[0], shape[3]):
        use_l_step(config)
        for name, run in l_runners(call, config).items():
            row: dict[str, Any] = {"kind": name, "config": asdict(config), "ms": float("nan")}
            try:
                row["ms"] = median_ms(run)
            except Exception as error:
                row["error"] = str(error)[:200]
            rows.append(row)
    use_table()
    return rows


TABLE = (launch.attend_config, launch.hopper_config, launch.l_output_config, launch.r_queries_config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="21x1560x12x128", help="frames x positions x heads x head dim")
    parser.add_argument("--kinds", default=",".join((*KINDS, "l")))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--compile-seconds", type=float, default=120)
    parser.add_argument("--compile-only", action="store_true", help="fill Triton's cache and time nothing")
    arguments = parser.parse_args()
    shape = tuple(int(x) for x in arguments.shape.split("x"))
    assert len(shape) == 4
    kinds = arguments.kinds.split(",")
    limit = chip(torch.device("cuda")).shared_memory
    started = time.time()
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
        jobs = [
            pool.submit(try_attend, shape, kind, config)
            for kind in kinds
            if kind != "l"
            for config in candidates(shape[3], limit, kind)
        ]
        jobs += [pool.submit(try_l, shape, config) for config in l_candidates(shape[0], shape[3]) if "l" in kinds]
        for job in jobs:
            try:
                job.result(timeout=max(0.1, arguments.compile_seconds - (time.time() - started)))
            except TimeoutError:
                job.cancel()
            except Exception as error:
                print(f"worker: {error}"[:200], file=sys.stderr)
    print(f"compiled in {time.time() - started:.0f} s", flush=True)
    if arguments.compile_only:
        return
    rows = []
    for kind in kinds:
        found = search_l(shape) if kind == "l" else search_attend(shape, kind)
        rows += found
        timed = sorted((r for r in found if r["ms"] == r["ms"]), key=lambda r: (r["kind"], float(r["ms"])))
        for _, best in itertools.groupby(timed, key=lambda r: r["kind"]):
            for row in itertools.islice(best, 5):
                line = f"{row['ms']:.3f} ms" + (f" {row['tflops']:.0f} TFLOP/s" if "tflops" in row else "")
                print(row["kind"], row["config"], line, flush=True)
    if arguments.json:
        props = torch.cuda.get_device_properties(0)
        record = {"device": props.name, "torch": torch.__version__, "shape": shape, "rows": rows}
        arguments.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
