"""Measure the fused operations of a block against torch's eager and compiled ones on the GPU at hand.

    python kernels/bench/fused.py --json fused.json --seconds 100
    python kernels/bench/fused.py --only "product and gelu" --no-compiled
    python kernels/bench/fused.py --search --json tiles.json

The default shape is one block of Wan2.1-1.3B at 832x480 and 81 frames in bfloat16. Each operation is first compared
with float64 on a part of the tokens (its error may be 1.5 times that of torch's in bfloat16); a row that fails has no
times. Times are medians with quartiles of calls of all contenders in turn, on a GPU that is kept busy until they are
launched; `floor_ms` is bytes over the rate of a copy measured in the same run, which leaves out the work of a product.
``--search`` times other numbers of rows of a program and of elements of a thread; what it finds is written into
`vmonarch_kernels/launch_fused.py` by hand. Without a GPU a small shape runs in Triton's interpreter, which tests this
script and measures nothing (and rounds to e4m3 wrongly).
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vmonarch_kernels import (
    HeadNorm,
    Norm,
    Rotation,
    Rows,
    Term,
    gated_activation,
    gated_residual,
    gelu_tanh_,
    gelu_tanh_rows,
    launch_fused,
    layer_norm_modulate,
    linear_gelu_tanh,
    qk_norm_rope,
    quantize_rows,
    residual_norm,
)
from vmonarch_kernels.fused_spec import kept_rows

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
CHECKED = 8192
"""Tokens that are compared with float64: so many that programs take several rows, as in the whole."""
FACTOR = 1.5
REPEATS = 21
BUSY_CYCLES = 2_000_000
"""About a millisecond: longer than the launches of what is timed."""
SEARCHED = [(rows, elements) for elements in (16, 8, 32) for rows in (8, 1, 2, 4, 16)]


@dataclass(frozen=True)
class Block:
    """Sizes of a block: tokens, heads, head dimension, channels of its feed-forward network."""

    tokens: int
    heads: int
    dim: int
    inner: int

    @property
    def width(self) -> int:
        return self.heads * self.dim


Outputs = tuple[Tensor | Rows, ...]


@dataclass
class Operation:
    """One fused operation and what torch does in its place.

    `fused(impl, tensors)` and `stock(tensors)` return their outputs; `tensors` are made by `make(tokens)`.
    """

    name: str
    make: Callable[[int], dict[str, Tensor]]
    fused: Callable[[str, dict[str, Tensor]], Outputs]
    stock: Callable[[dict[str, Tensor]], Outputs]
    moved: int
    """Bytes that one pass reads and writes, for a token."""
    apart: Callable[[dict[str, Tensor]], object] | None = None
    """What came before it: the same in two fused passes, or behind a product."""


def draw(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(size, device=DEVICE, dtype=torch.float32).to(dtype)


def wan_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As diffusers' WanAttnProcessor has it."""
    x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = x1 * cos - x2 * sin
    out[..., 1::2] = x1 * sin + x2 * cos
    return out.type_as(x)


def operations(block: Block, low: torch.dtype) -> Iterator[Operation]:
    """The passes of one block, in its order."""
    width, heads, size = block.width, block.heads, low.itemsize
    wide = torch.float32

    def heads_of(tokens: int) -> dict[str, Tensor]:
        angles = draw(1, tokens, 1, block.dim // 2, dtype=wide).repeat_interleave(2, -1)
        weights = {name: 1 + draw(width, dtype=wide).to(low) / 8 for name in ("wq", "wk")}
        x = {name: draw(1, tokens, width, dtype=low) for name in ("q", "k")}
        return {**x, **weights, "cos": angles.cos(), "sin": angles.sin()}

    def stock_heads(t: dict[str, Tensor]) -> tuple[Tensor, ...]:
        pairs = ((t["q"], t["wq"]), (t["k"], t["wk"]))
        normed = (F.rms_norm(x, (width,), w, 1e-6).unflatten(2, (heads, -1)) for x, w in pairs)
        return tuple(wan_rotary(x, t["cos"], t["sin"]) for x in normed)

    def fused_heads(impl: str, t: dict[str, Tensor]) -> tuple[Tensor, ...]:
        norm, rotation = HeadNorm(t["wq"], t["wk"], 1e-6), Rotation(t["cos"], t["sin"])
        q, k = qk_norm_rope(t["q"], t["k"], heads, norm=norm, rotation=rotation, impl=impl)
        assert k is not None
        return q, k

    moved = 4 * width * size + 8 * block.dim
    yield Operation("norms and rotation of q and k", heads_of, fused_heads, stock_heads, moved)

    def stream(tokens: int) -> dict[str, Tensor]:
        x = {name: draw(1, tokens, width, dtype=low) for name in ("x", "y")}
        names = ("gate", "scale", "shift")
        terms = {name: draw(1, 1, width, dtype=wide) / 4 for name in names}
        affine = {name: 1 + draw(width, dtype=wide) / 4 for name in ("weight", "bias")}
        return {**x, **terms, **affine}

    def normed(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        return F.layer_norm(x.to(torch.promote_types(x.dtype, wide)), (width,), weight, bias, 1e-6)

    def modulated(x: Tensor, t: dict[str, Tensor]) -> Tensor:
        return (normed(x) * (1 + t["scale"]) + t["shift"]).type_as(x)

    def gated(t: dict[str, Tensor]) -> Tensor:
        x = t["x"]
        return (x.to(torch.promote_types(x.dtype, wide)) + t["y"] * t["gate"]).type_as(x)

    def terms(t: dict[str, Tensor]) -> tuple[Term, Term]:
        return Term(t["scale"]), Term(t["shift"])

    row = width * size
    plain = Norm(1e-6)
    yield Operation(
        "norm and modulation",
        stream,
        lambda impl, t: (layer_norm_modulate(t["x"], plain, *terms(t), impl=impl),),
        lambda t: (modulated(t["x"], t),),
        2 * row,
    )
    yield Operation(
        "gate, sum and affine norm",
        stream,
        lambda impl, t: residual_norm(t["x"], t["y"], Term(t["gate"]), Norm(1e-6, t["weight"], t["bias"]), impl=impl),
        lambda t: (total := gated(t), normed(total, t["weight"], t["bias"]).type_as(total)),
        4 * row,
    )
    yield Operation(
        "sum, norm and modulation",
        stream,
        lambda impl, t: residual_norm(t["x"], t["y"], None, plain, *terms(t), impl=impl),
        lambda t: (total := t["x"] + t["y"], modulated(total, t)),
        4 * row,
    )
    yield Operation(
        "gate and sum",
        stream,
        lambda impl, t: (gated_residual(t["x"], t["y"], Term(t["gate"]), impl=impl),),
        lambda t: (gated(t),),
        3 * row,
    )
    yield Operation(
        "gelu in place",
        lambda tokens: {"x": draw(1, tokens, block.inner, dtype=low)},
        # A second call takes the first one's result: the work is the same, and the check makes its tensors anew.
        lambda impl, t: (gelu_tanh_(t["x"], impl=impl),),
        lambda t: (F.gelu(t["x"], approximate="tanh"),),
        2 * block.inner * size,
    )

    def layer(tokens: int) -> dict[str, Tensor]:
        x, weight = draw(1, tokens, width, dtype=low), draw(block.inner, width, dtype=low) / width**0.5
        return {"x": x, "weight": weight, "bias": draw(block.inner, dtype=low)}

    yield Operation(
        "product and gelu",
        layer,
        lambda impl, t: (linear_gelu_tanh(t["x"], t["weight"], t["bias"], impl=impl),),
        lambda t: (F.gelu(F.linear(t["x"], t["weight"], t["bias"]), approximate="tanh"),),
        (width + block.inner) * size,
        lambda t: gelu_tanh_(F.linear(t["x"], t["weight"], t["bias"]), impl="triton"),
    )

    def rows_of(x: Tensor) -> Rows:
        return Rows(*quantize_rows(x, impl="torch"), tuple(x.shape), x.dtype)

    def in_e4m3(impl: str, t: dict[str, Tensor]) -> Outputs:
        gate, affine = Term(t["gate"]), Norm(1e-6, t["weight"], t["bias"])
        total, out = residual_norm(t["x"], t["y"], gate, affine, rows=True, impl=impl)
        kept = kept_rows(out)
        assert kept is not None
        return total, kept

    def apart_in_e4m3(t: dict[str, Tensor]) -> object:
        gate, affine = Term(t["gate"]), Norm(1e-6, t["weight"], t["bias"])
        return quantize_rows(residual_norm(t["x"], t["y"], gate, affine, impl="triton")[1], impl="triton")

    yield Operation(
        "gate, sum and affine norm, in e4m3 too",
        stream,
        in_e4m3,
        lambda t: (total := gated(t), rows_of(normed(total, t["weight"], t["bias"]).type_as(total))),
        4 * row + width,
        apart_in_e4m3,
    )
    yield Operation(
        "gelu in e4m3",
        lambda tokens: {"x": draw(1, tokens, block.inner, dtype=low)},
        lambda impl, t: (gelu_tanh_rows(t["x"], impl=impl),),
        lambda t: (rows_of(F.gelu(t["x"], approximate="tanh")),),
        block.inner * (size + 1),
        lambda t: quantize_rows(gelu_tanh_(t["x"], impl="triton"), impl="triton"),
    )

    def swiglu(t: dict[str, Tensor]) -> tuple[Tensor, ...]:
        value, gate = t["x"].chunk(2, dim=-1)
        return (value * F.silu(gate),)

    yield Operation(
        "swiglu",
        lambda tokens: {"x": draw(1, tokens, 2 * block.inner, dtype=low)},
        lambda impl, t: (gated_activation(t["x"], "silu", impl=impl),),
        swiglu,
        3 * block.inner * size,
    )


def _error(found: Tensor | Rows, exact: Tensor | Rows) -> float:
    one, other = (
        (x.values.double() * x.scale).view(x.shape) if isinstance(x, Rows) else x.double() for x in (found, exact)
    )
    return float((one - other).norm() / other.norm())


def check(operation: Operation, tokens: int) -> dict[str, Any]:
    """Errors against float64 of the fused and the stock operation, and whether the fused one's is small enough."""
    tensors = operation.make(tokens)

    def copies(dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        return {name: x.clone() if dtype is None else x.to(dtype) for name, x in tensors.items()}

    exact = operation.stock(copies(torch.float64))
    found, stock = operation.fused("triton", copies()), operation.stock(copies())
    errors = [max(_error(one, other) for one, other in zip(outs, exact, strict=True)) for outs in (found, stock)]
    return {"error": errors[0], "stock_error": errors[1], "correct": errors[0] <= FACTOR * errors[1]}


def timed(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds of calls in turn: median, quartiles, least."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        for _ in range(3):
            run()
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(_once(run))
    return {name: _spread(values) for name, values in times.items()}


def _once(run: Callable[[], object]) -> float:
    if not CUDA:
        began = time.perf_counter()
        run()
        return 1000 * (time.perf_counter() - began)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(BUSY_CYCLES)
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def _spread(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 2 else sorted(values * 3)[:3]
    named = {"median": median, "low": low, "high": high, "min": min(values)}
    return {name: round(x, 4) for name, x in named.items()}


def measure(operation: Operation, block: Block, repeats: int, rate: float, *, compiles: bool) -> dict[str, Any]:
    """Times of one operation, after its check."""
    row = check(operation, min(CHECKED, block.tokens))
    if not row["correct"]:
        return row
    tensors = operation.make(block.tokens)
    ways: dict[str, Callable[[], object]] = {
        "triton": lambda: operation.fused("triton", tensors),
        "eager": lambda: operation.stock(tensors),
    }
    apart = operation.apart
    if apart is not None:
        ways["apart"] = lambda: apart(tensors)
    if compiles:
        compiled = torch.compile(operation.stock, dynamic=False)
        ways["compiled"] = lambda: compiled(tensors)
    moved = operation.moved * block.tokens
    row |= {"bytes": moved, "floor_ms": round(1000 * moved / rate, 4), "ms": timed(ways, repeats)}
    row["share_of_floor"] = round(row["floor_ms"] / row["ms"]["triton"]["median"], 3)
    return row


def search(operation: Operation, block: Block, repeats: int) -> Iterator[dict[str, Any]]:
    """Times of one operation with other rows of a program and elements of a thread."""
    before = launch_fused.SHARED_ROWS, launch_fused.ELEMENTS_A_THREAD
    tensors = operation.make(block.tokens)
    try:
        for rows, elements in SEARCHED:
            launch_fused.SHARED_ROWS, launch_fused.ELEMENTS_A_THREAD = rows, elements
            found = check(operation, min(CHECKED, block.tokens))
            if found["correct"]:
                found["ms"] = timed({"triton": lambda: operation.fused("triton", tensors)}, repeats)["triton"]
            yield {"rows": rows, "elements": elements, **found}
    finally:
        launch_fused.SHARED_ROWS, launch_fused.ELEMENTS_A_THREAD = before


def copy_rate() -> float:
    """Bytes a second that a device copy reads and writes."""
    x = torch.empty((256 if CUDA else 1) * 2**20, dtype=torch.uint8, device=DEVICE)
    y = torch.empty_like(x)
    return 2 * x.numel() / (timed({"copy": lambda: y.copy_(x)}, 11)["copy"]["median"] / 1000)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="32760x12x128x8960", help="TOKENSxHEADSxDxINNER")
    parser.add_argument("--json", type=Path, help="write the rows here, after each of them")
    parser.add_argument("--seconds", type=float, default=100, help="start no row after so many seconds")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--only", action="append", help="a row to measure; may be given again")
    parser.add_argument("--no-compiled", action="store_true", help="leave torch.compile out")
    parser.add_argument("--search", action="store_true", help="time rows of a program and elements of a thread instead")
    flags = parser.parse_args()
    block = Block(*map(int, flags.shape.split("x")))
    low = torch.bfloat16 if CUDA else torch.float16  # the interpreter cuts bfloat16 off
    until = time.monotonic() + flags.seconds
    import triton

    name = torch.cuda.get_device_name() if CUDA else "CPU, interpreter"
    found: list[dict[str, Any]] = []

    def save(row: dict[str, Any]) -> None:
        found.append(row)
        print(json.dumps(row), flush=True)
        if flags.json is not None:
            flags.json.write_text(json.dumps(found, indent=1))

    with torch.no_grad():
        torch.manual_seed(0)
        rate = copy_rate()
        machine = {"gpu": name, "torch": torch.__version__, "triton": triton.__version__, "copy_bytes_per_s": rate}
        save({"row": "machine", "shape": flags.shape, "dtype": str(low), **machine})
        for operation in operations(block, low):
            if flags.only and operation.name not in flags.only:
                continue
            if time.monotonic() > until:
                save({"row": operation.name, "failed": "out of time"})
                continue
            try:
                rows = search(operation, block, flags.repeats) if flags.search else None
                compiles = not flags.no_compiled
                for row in rows or [measure(operation, block, flags.repeats, rate, compiles=compiles)]:
                    save({"row": operation.name, **row})
            except Exception as error:
                save({"row": operation.name, "failed": repr(error)[:600]})
            if CUDA:
                torch.cuda.empty_cache()
    return 0 if all(row.get("correct", True) and "failed" not in row for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
