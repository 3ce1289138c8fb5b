"""Attention alone: every preset and every dense backend on the same tensors, timed in turn and checked."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vmonarch_cli.plan.call_options import options_for
from vmonarch_cli.presets import Preset
from vmonarch_cli.profile.backends import DenseBackend, ExactSample, difference, installed_backends
from vmonarch_cli.profile.inputs import Kind, attention_inputs
from vmonarch_cli.profile.peers import PEER, SparsePeer, installed_peers
from vmonarch_cli.profile.repeat import BURST_S, Budget, OnWork, call_memory, reason, timed, unheard, wall
from vmonarch_cli.profile.results import QUANTISED, ChipPeak, KernelRow, KernelShape, OutputCheck, Spread
from vmonarch_cli.timing import Pace
from vmonarch_kernels import Inputs, Options, Residual, attend, resolve_impl
from vmonarch_kernels.cost import dense_bytes, dense_flops, monarch_bytes, monarch_flops, refresh_period

Tensors = tuple[Tensor, Tensor, Tensor]

SHAPES_GPU = ((20, 1456), (21, 1560), (47, 1456), (21, 3600), (81, 1456))
SHAPES_CPU = ((13, 144), (13, 400))
# (heads, head dimension) and repeats by kind of device
HEADS_GPU, HEADS_CPU = (12, 128), (4, 64)
REPEATS_GPU, REPEATS_CPU = 20, 7

EAGER_FACTOR = 1.5
"""A structured output may be this many times as far from the wide result as the eager algorithm in its own dtype."""
# What rounding of the output alone may cost, below which the eager error is no measure.
_ROUNDING = {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 1e-5}
_DENSE_BUDGET = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}
_QUANTISED_BUDGET = 0.1
_PEER_BUDGET = 1.0
_REFERENCE_BYTES = 1 << 30
_MAX_TIMING_S = 20.0


@dataclass(frozen=True)
class KernelSettings:
    """What to measure on which tensors."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    head_dim: int
    batch: int
    presets: Sequence[Preset]
    repeats: int
    inputs: Kind = "video"
    seed: int = 0


@dataclass(frozen=True)
class _Contender:
    """A row before it is measured, and the call behind it."""

    row: KernelRow
    run: Callable[[], Tensor]
    check: Callable[[Tensor, float], OutputCheck]
    """Of an output and its error against dense."""
    period: int = 1
    """After so many calls their work repeats."""

    def turns(self) -> None:
        """Calls until their work repeats."""
        for _ in range(self.period):
            self.run()


def profile_shape(
    settings: KernelSettings,
    chip: ChipPeak,
    frames: int,
    positions: int,
    seconds: float,
    on_work: Callable[[str, float], None],
) -> tuple[KernelShape, float]:
    """All rows of one shape, and what preparing them took; `seconds` bounds the repeats, not the preparation.
    `on_work` gets what comes next, and which share of the shape's work is behind it.

    Whatever a contender raises becomes its row's failure and the others go on.
    """
    began = time.monotonic()
    tensors = attention_inputs(
        settings.inputs,
        (settings.batch, frames, positions, settings.heads, settings.head_dim),
        dtype=settings.dtype,
        device=settings.device,
        seed=settings.seed,
    )
    on_work("float32 truth", 0.0)
    exact = ExactSample(*tensors)
    rows: list[KernelRow] = []
    contenders: dict[str, _Contender] = {}
    makers = _makers(settings, chip, tensors, frames, positions)
    for index, (name, make) in enumerate(makers):
        on_work(name, index / len(makers) / (1 + settings.repeats))
        row, contender = _first_run(make, exact, settings.device)
        rows.append(row)
        if contender is not None:
            contenders[row.name] = contender
    on_work("timing", 1 / (1 + settings.repeats))
    preparation_s = time.monotonic() - began
    runs = {name: contender.turns for name, contender in contenders.items()}
    limit = min(seconds, _MAX_TIMING_S)
    try:
        times = timed(runs, settings.device, settings.repeats, limit, burst_s=BURST_S)
    except Exception as error:
        rows = [row if row.failure else replace(row, failure=reason(error)) for row in rows]
        times = {}
    spreads = {name: Spread.of([s / contenders[name].period for s in found]) for name, found in times.items()}
    timed_rows = [replace(row, time=spreads.get(row.name, row.time)) for row in rows]
    return KernelShape(frames, positions, timed_rows), preparation_s


def estimate_seconds(before: Sequence[tuple[KernelShape, float]], frames: int, positions: int) -> float:
    """About how long preparing a shape will take, from the shapes done (and what that took); repeats take what is left.

    Dense attention sets the scale; on a GPU first calls are compilation, which does not grow.
    """
    if not before:
        return 0.0
    shape, seconds = before[-1]
    first = sum(row.first_call_s or 0.0 for row in shape.rows)
    return first + (seconds - first) * max(0.3, (frames * positions / shape.tokens) ** 2)


def run_kernel(
    settings: KernelSettings,
    chip: ChipPeak,
    shapes: Sequence[tuple[int, int]],
    budget: Budget,
    on_shape: Callable[[KernelShape], None],
    on_work: OnWork = unheard,
) -> tuple[list[KernelShape], list[dict[str, str]]]:
    """Shapes measured, and those for which the time ran out; `on_shape` gets each as soon as it is done."""
    done: list[tuple[KernelShape, float]] = []
    skipped: list[dict[str, str]] = []
    costs = [float(frames * positions) ** 2 for frames, positions in shapes]
    pace = Pace(sum(costs))
    for index, (frames, positions) in enumerate(shapes):
        name = f"{frames}x{positions}"
        if not budget.allows(estimate_seconds(done, frames, positions)):
            skipped.append({"what": name, "why": f"--seconds {budget.seconds:g} would not be enough"})
            continue
        watched = _part(on_work, pace, name, sum(costs[:index]), costs[index])
        share = 0.5 * budget.left / (len(shapes) - index)
        try:
            shape, preparation_s = profile_shape(settings, chip, frames, positions, share, watched)
        except Exception as error:  # the tensors themselves do not fit, or the device is lost
            skipped.append({"what": name, "why": reason(error)})
            continue
        done.append((shape, preparation_s))
        on_shape(shape)
    return [shape for shape, _ in done], skipped


def _part(on_work: OnWork, pace: Pace, name: str, before: float, cost: float) -> Callable[[str, float], None]:
    """What a shape of this name and cost tells, with the time that all shapes have left after those `before`."""
    return lambda words, share: on_work(f"{name}: {words}", pace.left(before + share * cost))


def _makers(
    settings: KernelSettings, chip: ChipPeak, tensors: Tensors, frames: int, positions: int
) -> list[tuple[str, Callable[[], _Contender]]]:
    backends = installed_backends(settings.device, settings.dtype, settings.head_dim)
    makers: list[tuple[str, Callable[[], _Contender]]] = [
        (b.name, functools.partial(_dense, settings, chip, tensors, frames, positions, b)) for b in backends
    ]
    makers += [
        (peer.name, functools.partial(_peer, settings, tensors, frames, positions, peer))
        for peer in installed_peers(settings.device, settings.dtype, settings.head_dim)
    ]
    makers += [
        (p.name, functools.partial(_structured, settings, chip, tensors, frames, positions, p))
        for p in settings.presets
        if p.attention != "dense"
    ]
    return makers


def _first_run(
    make: Callable[[], _Contender], exact: ExactSample, device: torch.device
) -> tuple[KernelRow, _Contender | None]:
    """The row with its first call, error, check and memory; and what to time, or None when it failed."""
    row = KernelRow("", "dense")
    try:
        contender = make()
        row = contender.row
        first_s, out = wall(contender.run, device)
        error = exact.error(out)
        row = replace(row, first_call_s=first_s, error=error, check=contender.check(out, error))
        del out
        row = replace(row, peak_bytes=call_memory(contender.run, device))
    except Exception as error_:
        name, kind = _identity(make)
        return replace(row, name=name, kind=kind, failure=reason(error_)), None
    return row, contender


def _identity(make: Callable[[], _Contender]) -> tuple[str, str]:
    """Name and kind of a contender that could not even be made."""
    subject = make.args[-1]  # type: ignore[attr-defined]
    kind = "structured" if isinstance(subject, Preset) else PEER if isinstance(subject, SparsePeer) else "dense"
    return subject.name, kind


def _dense(
    settings: KernelSettings, chip: ChipPeak, tensors: Tensors, frames: int, positions: int, backend: DenseBackend
) -> _Contender:
    size = ((frames, positions, 1), settings.heads, settings.head_dim, settings.batch)
    work = dense_flops(*size)
    row = KernelRow(
        backend.name,
        "dense",
        note=backend.note,
        flops=work,
        floor_s=chip.floor(work, dense_bytes(*size, settings.dtype.itemsize)),
    )
    budget = _QUANTISED_BUDGET if backend.note == QUANTISED else _DENSE_BUDGET[settings.dtype]
    return _Contender(row, functools.partial(backend.attend, *tensors), functools.partial(_dense_check, budget))


def _peer(settings: KernelSettings, tensors: Tensors, frames: int, positions: int, peer: SparsePeer) -> _Contender:
    """Sparse attention of another package: nothing says what its error should be, only that it must be below 1.

    The chip's peaks are of 16 bit and its products of 8, so that it has no floor.
    """
    dense = dense_flops((frames, positions, 1), settings.heads, settings.head_dim, settings.batch)
    row = KernelRow(peer.name, PEER, note=peer.note, flops=None if peer.share is None else round(dense * peer.share))
    return _Contender(row, functools.partial(peer.attend, *tensors), functools.partial(_dense_check, _PEER_BUDGET))


def _dense_check(budget: float, out: Tensor, error: float) -> OutputCheck:
    return OutputCheck(error, budget, "dense attention in float32")


def _structured(
    settings: KernelSettings, chip: ChipPeak, tensors: Tensors, frames: int, positions: int, preset: Preset
) -> _Contender:
    """A preset as a model calls it: warm ones in steady state, from the L of an earlier call and keeping the next."""
    grid = (frames, positions, 1)
    impl = resolve_impl(preset.impl, settings.device, settings.dtype, settings.head_dim)
    cold, chosen = options_for(preset, frames), options_for(preset, frames, warm=True)
    exact, warm, refresh, options = chosen.exact, chosen.warm, chosen.refresh, chosen.kernel
    inputs = Inputs(*tensors, grid)
    if warm:
        inputs = replace(inputs, l_prev=attend(inputs, cold.kernel, impl=impl, return_l=True)[1])
    size = (grid, settings.heads, settings.head_dim, settings.batch)
    work = monarch_flops(*size, **chosen.cost())
    moved = monarch_bytes(*size, settings.dtype.itemsize, **chosen.cost())
    row = KernelRow(
        preset.name,
        "structured",
        note="exact" if exact else ("warm" if warm else "cold"),
        impl=impl,
        flops=work,
        floor_s=chip.floor(work, moved),
    )

    residual = Residual(tensors[0], frames, first_frame=preset.first_frame) if refresh else None

    def run() -> Tensor:
        if residual is not None:
            return residual.attention(inputs, options, refresh, impl=impl, return_l=warm)[0]
        return attend(inputs, options, impl=impl, return_l=warm)[0]

    def check(out: Tensor, error: float) -> OutputCheck:
        if exact:
            return _dense_check(_DENSE_BUDGET[settings.dtype], out, error)
        return _structured_check(out, inputs, options, refresh, impl)

    return _Contender(row, run, check, refresh_period(refresh))


def _structured_check(out: Tensor, inputs: Inputs, options: Options, refresh: float, impl: str) -> OutputCheck:
    """A first call's output against the same algorithm in wider arithmetic, by another implementation where one fits.

    The budget is EAGER_FACTOR times the error that the eager algorithm makes in the tensors' own dtype.
    """
    dtype = out.dtype
    batch, tokens, heads, _ = out.shape
    fits = batch * heads * tokens * (tokens // inputs.frames) * 8 <= _REFERENCE_BYTES
    other = "reference" if impl == "torch" and fits else "torch"
    on_cpu = out.device.type == "cpu"
    wide = torch.float64 if dtype == torch.float32 and on_cpu else torch.float32

    def run(dtype: torch.dtype) -> Tensor:
        call = replace(inputs, q=inputs.q.to(dtype), k=inputs.k.to(dtype), v=inputs.v.to(dtype))
        if refresh:
            residual = Residual(call.q, call.frames, first_frame=options.first_frame)
            return residual.attention(call, options, refresh, impl=other)[0]
        return attend(call, options, impl=other)[0]

    truth, eager = run(wide), run(dtype)
    budget = max(_ROUNDING[dtype], EAGER_FACTOR * difference(eager, truth))
    return OutputCheck(difference(out, truth), budget, f"impl={other} in {str(wide).removeprefix('torch.')}")
