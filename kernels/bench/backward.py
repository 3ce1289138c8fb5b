"""Measure the backward pass of `monarch_attention` against dense backward passes on the GPU at hand.

    python kernels/bench/backward.py --json backward.json --seconds 500
    python kernels/bench/backward.py --search --json tiles.json --seconds 550

Every row is independent: what cannot run is written down as failed, and the next row starts. ``--search`` times tiles
of every backward kernel instead; what it finds is written into `vmonarch_kernels/configs_backward.py` by hand.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vmonarch_kernels import Inputs, Options, attend, frame_attention, launch_backward, monarch_factors
from vmonarch_kernels.configs import AttendConfig, LStepConfig
from vmonarch_kernels.configs_backward import HopperGradConfig, Parts

Shape = tuple[int, int, int, int]
SHAPES = ("21x1560x12x128", "47x1456x12x128", "21x3600x12x128")
ROWS = ("correct", "structured", "dense")
STRUCTURED: dict[str, Options] = {
    "paper": Options(2),
    "balanced": Options(1, band=0),
    "fast": Options(1, first_frame=False, band=0),
    "warm": Options(1, first_frame=False),
}
WARM = ("balanced", "fast", "warm")
DENSE = {"fa2": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
KINDS = {"r": Parts(k=True, v=False), "rv": Parts(k=True, v=True), "exact": Parts(k=False, v=True)}
# Rows of queries and of keys, warps, stages; two numbers are a Hopper kernel's tile; of L-steps warps, stages, strip.
TILES = {
    "queries": [
        (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (128, 32, 8, 3), (128, 64, 4, 2), (64, 64, 4, 2),
        (64, 64, 4, 3), (64, 128, 4, 2), (64, 32, 4, 3), (128, 128, 8, 1), (3, 0), (3, 1), (3, 2), (4, 0), (4, 2),
    ],
    "keys": [
        (64, 128, 8, 2), (64, 128, 8, 3), (32, 128, 8, 3), (32, 128, 8, 2), (128, 128, 8, 1), (128, 128, 8, 2),
        (64, 64, 4, 2), (64, 64, 4, 3), (32, 64, 4, 3), (128, 64, 4, 2), (64, 128, 4, 2), (3, 0), (4, 0), (4, 1),
    ],
    "l": [(4, 1, 1), (4, 1, 8), (4, 2, 8), (2, 1, 8), (2, 2, 8), (8, 1, 8), (8, 2, 8)],
}  # fmt: skip


def parse(text: str) -> Shape:
    frames, positions, heads, dim = map(int, text.split("x"))
    return frames, positions, heads, dim


def inputs_of(shape: Shape, *, warm: bool, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    """Correlated frames, as a video's are; with ``warm`` the L of a first call."""
    frames, positions, heads, dim = shape
    generator = torch.Generator("cuda").manual_seed(0)

    def draw() -> Tensor:
        base = torch.randn(1, 1, positions, heads, dim, device="cuda", generator=generator)
        each = torch.randn(1, frames, positions, heads, dim, device="cuda", generator=generator)
        return (0.7 * base + 0.7 * each).flatten(1, 2).to(dtype)

    q, k, v = draw(), draw(), draw()
    grid = (frames, 1, positions)
    if not warm:
        return Inputs(q, k, v, grid)
    _, l_prev = attend(Inputs(q, k, v, grid), Options(2), impl="triton", return_l=True)
    return Inputs(q, k, v, grid, l_prev=l_prev)


def leaves(inputs: Inputs) -> tuple[Inputs, list[Tensor]]:
    """The same call on tensors that want gradients."""
    wanted = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    return Inputs(*wanted, inputs.grid, inputs.l_prev), wanted


def timed(run: Callable[[], object], repeats: int = 15) -> dict[str, float]:
    """Median, least and most milliseconds of calls that are queued back to back."""
    for _ in range(3):
        run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
    return {"median": round(statistics.median(times), 4), "min": round(min(times), 4), "max": round(max(times), 4)}


def both_ways(run: Callable[[], Tensor], wanted: list[Tensor]) -> dict[str, Any]:
    """Milliseconds forwards (without autograd, and with it) and backwards, and the memory that backwards adds."""
    with torch.no_grad():
        forward = timed(run)
    out = run()
    grad = torch.randn_like(out)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, wanted, grad, retain_graph=True)

    result: dict[str, Any] = {"forward_ms": forward, "forward_kept_ms": timed(run), "backward_ms": timed(backward)}
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    grads = backward()
    torch.cuda.synchronize()
    result["peak_tensors_of_q"] = round((torch.cuda.max_memory_allocated() - before) / wanted[0].nbytes, 2)
    result["finite"] = all(bool(x.isfinite().all()) for x in grads)
    result["kernels_ms"] = kernel_times(backward)
    return result


def kernel_times(run: Callable[[], object], calls: int = 5) -> dict[str, Any]:
    """Milliseconds of each GPU kernel in one call, by torch's profiler."""
    try:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as found:
            for _ in range(calls):
                run()
            torch.cuda.synchronize()
        rows = {}
        for event in found.key_averages():
            spent = getattr(event, "self_device_time_total", 0) / 1000 / calls
            if spent > 0.005:
                rows[event.key[:70]] = {"ms": round(spent, 4), "launches": round(event.count / calls, 1)}
        return dict(sorted(rows.items(), key=lambda row: -row[1]["ms"]))
    except Exception as error:
        return {"failed": repr(error)[:300]}


def structured(shape: Shape, name: str) -> dict[str, Any]:
    inputs, wanted = leaves(inputs_of(shape, warm=name in WARM))
    options = STRUCTURED[name]
    result = both_ways(lambda: attend(inputs, options, impl="triton")[0], wanted)
    frames, positions, heads, dim = shape
    result["unit_gflop"] = frames * positions * positions * dim * heads / 1e9
    return result


def one_frame(shape: Shape, _: str) -> dict[str, Any]:
    inputs, wanted = leaves(inputs_of(shape, warm=False))
    return both_ways(lambda: frame_attention(*wanted, inputs.grid, 1, impl="triton"), wanted)


def dense(shape: Shape, name: str) -> dict[str, Any]:
    _, wanted = leaves(inputs_of(shape, warm=False))
    if name == "fa4":
        from flash_attn.cute import flash_attn_func

        def run() -> Tensor:
            found = flash_attn_func(*wanted)
            return found[0] if isinstance(found, tuple) else found

        return both_ways(run, wanted)
    with sdpa_kernel(DENSE[name]):
        return both_ways(lambda: F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in wanted)), wanted)


def relative(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected.double()).norm() / expected.double().norm())


def gradients(inputs: Inputs, options: Options, dtype: torch.dtype, impl: str) -> list[Tensor]:
    """Of q, k and v; "eager" is autograd through the reference in that dtype."""
    wanted = [x.detach().to(dtype).requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    call = Inputs(*wanted, inputs.grid, inputs.l_prev)
    if impl == "eager":
        out = monarch_factors(call, options, compute_dtype=dtype).out
    else:
        out, _ = attend(call, options, impl=impl)
    grad = torch.randn(out.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    return list(torch.autograd.grad(out, wanted, grad.to(torch.bfloat16).to(out.dtype)))


def correct(shape: Shape, name: str) -> dict[str, Any]:
    """Relative errors of dq, dk and dv against float64, and those of eager bfloat16 autograd, on few positions; against
    the torch implementation in float32 on two heads of the full shape.
    """
    frames, positions, _, dim = shape
    small = inputs_of((frames, 97, 2, dim), warm=name in WARM)
    options = STRUCTURED[name]
    truth = gradients(small, options, torch.float64, "reference")
    found = gradients(small, options, torch.bfloat16, "triton")
    eager = gradients(small, options, torch.bfloat16, "eager")
    full = inputs_of((frames, positions, 2, dim), warm=name in WARM)
    wide = gradients(full, options, torch.float32, "torch")
    ours = gradients(full, options, torch.bfloat16, "triton")
    return {
        "small_triton": [relative(a, b) for a, b in zip(found, truth, strict=True)],
        "small_eager": [relative(a, b) for a, b in zip(eager, truth, strict=True)],
        "full_triton": [relative(a, b) for a, b in zip(ours, wide, strict=True)],
    }


def rows(
    shapes: list[Shape], kinds: list[str]
) -> Iterator[tuple[str, Shape, str, Callable[[Shape, str], dict[str, Any]]]]:
    """What is measured, in the order of ``kinds``."""
    for kind in kinds:
        for shape in shapes[:1] if kind == "correct" else shapes:
            if kind == "dense":
                for name in ("fa2", "cudnn", "fa4"):
                    yield kind, shape, name, dense
                continue
            for name in STRUCTURED:
                yield kind, shape, name, structured if kind == "structured" else correct
            if kind == "structured":
                yield kind, shape, "one frame", one_frame


# Tiles


def kernel_runner(shape: Shape, side: str, kind: str) -> tuple[Callable[[], None], list[Tensor]]:
    """One launch of a backward kernel, and what it writes."""
    inputs = inputs_of(shape, warm=False)
    torch.cuda.manual_seed(0)  # one gradient for all tiles, which are compared
    run = launch_backward._Structured(
        inputs, Options(2), launch_backward.Forward(inputs.q, None, None), torch.randn_like(inputs.q)
    )
    run._written = {"dq", "dk", "dv"}
    if side == "l":
        first = run._first_step(with_y=False)
        steps = [run._recomputed(first, i) for i in (0, 1)]
        gk, gv, product = run.call.like_q(), run.call.like_q(), run.call.statistic().zero_()
        if kind == "last":
            return lambda: void(run._l_step(steps[1], gk, gv, (None, None))), [gk, gv]
        return lambda: void(run._l_step(steps[0], gk, None, (run.grad, product))), [gk]
    parts = KINDS[kind]
    lse, delta = (run.call.statistic().zero_() for _ in range(2))
    queries = launch_backward._Queries(
        run.call.q, run.grad if parts.k else None, run.grad if parts.v else None, lse + 30.0, delta, delta
    )
    window = launch_backward._Window(0, 1)
    if side == "queries":
        return lambda: run.grad_queries(queries, window, run.dk, False, None), [run.dk]
    run._written = set()

    def keys() -> None:
        run._written = set()
        run.grad_keys(queries, window)

    return keys, [run.dk, run.dv] if parts.v else [run.dk]


def void(_: object) -> None:
    return None


def use_tile(side: str, tile: tuple[int, ...], frames: int) -> None:
    """Make the launches of one kind of kernel take this tile."""
    if side == "l":
        warps, stages, strip = tile
        block = max(16, 1 << (frames - 1).bit_length())
        config = LStepConfig(block, block, warps, stages, strip)
        launch_backward.l_backward_config = lambda *_, **__: config  # type: ignore[assignment]
        return
    hopper = HopperGradConfig(*tile) if len(tile) == 2 else None
    launch_backward.grad_hopper_configs = lambda *_, **__: hopper and (hopper, hopper)  # type: ignore[assignment]
    if hopper is None:
        name = f"grad_{side}_config"
        setattr(launch_backward, name, lambda *_, **__: AttendConfig(*tile))


def compile_tile(shape: Shape, side: str, kind: str, tile: tuple[int, ...]) -> str | None:
    """Compile in a process of its own, into Triton's cache; the reason where that fails."""
    try:
        use_tile(side, tile, shape[0])
        # Triton compiles apart for sizes that 16 divides.
        run, _ = kernel_runner((shape[0], 160 if shape[1] % 16 == 0 else 168, 12, shape[3]), side, kind)
        run()
        torch.cuda.synchronize()
    except Exception as error:
        return repr(error)[:200]
    return None


def search(shapes: list[Shape], save: Callable[[dict[str, Any]], None], until: float) -> None:
    work = [("l", kind, tile) for tile in TILES["l"] for kind in ("last", "early")]
    for side in ("queries", "keys"):
        work += [(side, kind, tile) for kind in KINDS for tile in TILES[side]]
    names = ("grad_queries_config", "grad_keys_config", "grad_hopper_configs", "l_backward_config")
    tables = {name: getattr(launch_backward, name) for name in names}
    for shape in shapes:
        frames, positions, heads, dim = shape
        unit = frames * positions * positions * dim * heads
        with ProcessPoolExecutor(8, mp_context=get_context("spawn")) as pool:
            asked = zip(*((shape, *one) for one in work), strict=True)
            failed = dict(zip(work, pool.map(compile_tile, *asked), strict=True))
        expected: dict[tuple[str, str], list[Tensor]] = {}
        for side, kind, tile in work:
            if time.monotonic() > until or (side == "l" and frames > 64):
                continue
            row: dict[str, Any] = {"row": "tile", "shape": shape, "side": side, "kind": kind, "tile": tile}
            try:
                if reason := failed[side, kind, tile]:
                    raise RuntimeError(reason)
                if (side, kind) not in expected:
                    for name, table in tables.items():
                        setattr(launch_backward, name, table)
                    run, outs = kernel_runner(shape, side, kind)
                    run()
                    expected[side, kind] = [x.clone() for x in outs]
                use_tile(side, tile, frames)
                run, outs = kernel_runner(shape, side, kind)
                run()
                row["differs"] = max(relative(a, b) for a, b in zip(outs, expected[side, kind], strict=True))
                row["ms"] = timed(run, 11)
                if side != "l":
                    parts = KINDS[kind]
                    products = 2 + parts.tensors if side == "queries" else 2 * (1 + parts.tensors)
                    row["tflops"] = round(products * 2 * unit / row["ms"]["median"] / 1e9, 1)
            except Exception as error:
                row["failed"] = repr(error)[:300]
            save(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help="TxPxHEADSxD; may be repeated")
    parser.add_argument("--row", action="append", choices=ROWS, help="measure these rows alone; may be repeated")
    parser.add_argument("--json", type=Path, help="write the rows here, after each of them")
    parser.add_argument("--seconds", type=float, default=500, help="start no row after so many seconds")
    parser.add_argument("--search", action="store_true", help="time tiles of the backward kernels instead")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("This benchmark needs a CUDA GPU, and torch sees none.")
    shapes = [parse(text) for text in arguments.shape or (SHAPES[:2] if arguments.search else SHAPES)]
    until = time.monotonic() + arguments.seconds
    import triton

    found: list[dict[str, Any]] = [
        {
            "row": "machine",
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
        }
    ]

    def save(row: dict[str, Any]) -> None:
        found.append(row)
        print(json.dumps(row), flush=True)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(found, indent=1))

    if arguments.search:
        search(shapes, save, until)
        return
    for kind, shape, name, run in rows(shapes, arguments.row or list(ROWS)):
        if time.monotonic() > until:
            save({"row": kind, "shape": shape, "name": name, "failed": "out of time"})
            continue
        try:
            save({"row": kind, "shape": shape, "name": name, **run(shape, name)})
        except Exception as error:
            save({
                "row": kind, "shape": shape, "name": name,
                "failed": repr(error)[:600], "where": traceback.format_exc()[-1200:],
            })  # fmt: skip
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
