"""From results to rich renderables; nothing prints here. Every table names device and versions."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import TypeVar

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vmonarch_cli.cli.report import ABSENT
from vmonarch_cli.profile.results import (
    QUANTISED,
    BreakEven,
    Check,
    ChipPeak,
    KernelRow,
    KernelShape,
    ModelProfile,
    QualityProfile,
    QualityRow,
    Spread,
)
from vmonarch_cli.text import binary_size, seconds

Value = TypeVar("Value")
WORTH_IT = 1.05
"""A step must become faster by this factor before a preset is called worth it."""
WIDE = 100
"""Columns of a terminal from which on the less important figures are shown, too."""


def _table(title: str, caption: str) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        title=title,
        title_justify="left",
        title_style="bold",
        caption=caption,
        caption_justify="left",
        caption_style="dim",
        header_style="bold",
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    return table


def _columns(table: Table, *titles: str) -> None:
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)


# Attention alone


def kernel_table(shape: KernelShape, caption: str, width: int) -> RenderableType:
    """One shape: a row per backend and preset, and sentences for what failed."""
    fastest, flash = shape.fastest_dense, shape.row("flash")
    title = f"{shape.frames} x {shape.positions} = {shape.tokens:,} tokens"
    table = _table(f"{title} (latent frames x positions)", caption)
    unit, shown = time_unit([row.time for row in shape.rows])
    against = [flash] if flash is not None and flash.time is not None else []
    if fastest is not None and fastest not in against:
        against.append(fastest)
    rate_unit, _ = _rate_unit([row.flops_per_s for row in shape.rows])
    _columns(table, f"median\n{unit}", "spread\n%", f"rate\n{rate_unit}", "floor\n%")
    _columns(table, *(f"times\n{row.name}" for row in against))
    _columns(table, "error\n", *(["memory\n"] if any(row.peak_bytes for row in shape.rows) else []))
    if width >= WIDE:
        _columns(table, f"quartiles\n{unit}", "first call\n", "check\n")
    for row in shape.rows:
        table.add_row(*_kernel_cells(row, shape, against, shown, width), style="" if row.passed else "red")
    return Group(table, *_kernel_sentences(shape.rows), Text())


def _kernel_cells(
    row: KernelRow, shape: KernelShape, against: Sequence[KernelRow], shown: Callable[[float], str], width: int
) -> list[RenderableType]:
    name = _name(row.name, row.kind, row.note)
    cells: list[RenderableType] = [
        name if row.passed else name.append(" ✗"),
        _maybe(row.time, lambda t: shown(t.median)),
        _maybe(row.time, lambda t: f"{100 * t.width:.0f}"),
        _maybe(row.flops_per_s, _rate_unit([r.flops_per_s for r in shape.rows])[1]),
        _maybe(row.floor_share, lambda share: f"{100 * share:.0f}"),
    ]
    cells += [_times(shape.speedup(row, other)) for other in against]
    cells.append(_maybe(row.error, _error))
    if any(r.peak_bytes for r in shape.rows):
        cells.append(_maybe(row.peak_bytes, binary_size))
    if width >= WIDE:
        cells.append(_maybe(row.time, lambda t: f"{shown(t.low)}-{shown(t.high)}"))
        cells.append(_maybe(row.first_call_s, seconds))
        cells.append(_maybe(row.check, _check_words))
    return cells


def _kernel_sentences(rows: Sequence[KernelRow]) -> list[Text]:
    found = [Text(f"{row.name} has no figures: {row.failure}", style="yellow") for row in rows if row.failure]
    for row in rows:
        if row.check is not None and not row.check.passed:
            found.append(Text(f"{row.name}: {failed_check(row.check)}", style="red"))
    if any(row.note == QUANTISED and row.time for row in rows):
        found.append(Text("quantised backends are not what speedups refer to: their result is another", style="dim"))
    return found


def failed_check(check: Check) -> str:
    """Why a check failed, as half a sentence."""
    return f"check failed: error {check.error:.2g} against {check.against}, at most {check.budget:.2g} is right"


def kernel_legend(chip: ChipPeak, inputs: str) -> Text:
    """What the columns mean and what the floor is made of."""
    peaks = (
        f"{_per_second(chip.flops_per_s, 'FLOP')} in a matrix product, {_per_second(chip.bytes_per_s, 'B')} in a copy"
    )
    return Text(
        "spread: distance of the quartiles. rate: by honest operation counts. floor: the least time for "
        f"operations and bytes at what this chip did in this run ({peaks}) over the time taken. times: speedup. "
        f"error: relative L2 against float32 dense attention on the same tensors ({inputs}). warm: from the L of an "
        "earlier call.",
        style="dim",
    )


# Whole steps of a model


def model_table(profile: ModelProfile, caption: str, width: int) -> RenderableType:
    """Steps of one model, then the verdicts."""
    w, h, frames = profile.size
    forwards = f"{profile.forwards} forwards" if profile.forwards > 1 else "1 forward"
    how = ", ".join(
        [*(["random weights"] if profile.random_weights else []), "compiled" if profile.compiled else "eager"]
    )
    title = f"{profile.model}, {w}x{h}, {frames} frames = {profile.tokens:,} tokens, one step of {forwards}, {how}"
    table = _table(title, caption)
    unit, shown = time_unit([row.step for row in profile.rows])
    flash, fastest = profile.row("flash"), profile.fastest_dense
    against = [flash] if flash is not None and flash.step is not None else []
    if fastest is not None and fastest not in against:
        against.append(fastest)
    errors = any(row.error is not None for row in profile.rows)
    memory = any(row.peak_bytes for row in profile.rows)
    _columns(table, f"step\n{unit}", "spread\n%", "attention\nshare %", *(f"times\n{row.name}" for row in against))
    _columns(
        table,
        *(["error\n"] if errors else []),
        *(["memory\n"] if memory else []),
        f"clip of\n{profile.clip_steps} steps",
    )
    if width >= WIDE:
        _columns(table, "first step\n", f"quartiles\n{unit}")
    for row in profile.rows:
        cells: list[RenderableType] = [
            _name(row.name, row.kind, row.note),
            _maybe(row.step, lambda s: shown(s.median)),
            _maybe(row.step, lambda s: f"{100 * s.width:.0f}" if s.count > 1 else ABSENT),
            _maybe(row.share(profile.skipped), lambda share: f"{100 * share:.0f}"),
            *(_times(profile.speedup(row, other)) for other in against),
        ]
        cells += [_maybe(row.error, _error)] if errors else []
        cells += [_maybe(row.peak_bytes, binary_size)] if memory else []
        cells.append(_maybe(profile.end_to_end(row), seconds))
        if width >= WIDE:
            cells.append(_maybe(row.first_call_s, seconds))
            cells.append(_maybe(row.step, lambda s: f"{shown(s.low)}-{shown(s.high)}"))
        table.add_row(*cells, style="dim" if row.kind == "skipped" else "")
    parts: list[RenderableType] = [table]
    parts += [Text(f"{row.name} has no figures: {row.failure}", style="yellow") for row in profile.rows if row.failure]
    parts.append(Text(_model_legend(profile), style="dim"))
    parts += [Text(note, style="dim") for note in profile.notes]
    parts += [Text(sentence, style="bold") for sentence in verdicts(profile)]
    return Group(*parts, Text())


def _model_legend(profile: ModelProfile) -> str:
    parts = ["attention share: what skipping self-attention saves", "times: speedup of the step"]
    if profile.decode_s is not None and profile.text_encode_s is not None:
        parts.append(
            f"clip: {seconds(profile.text_encode_s)} of text and {seconds(profile.decode_s)} of decoding included"
        )
    else:
        parts.append("clip: denoising alone")
    if any(row.note == "cold" for row in profile.rows):
        parts.append("cold: the first step of a clip")
    return "; ".join(parts)


def verdicts(profile: ModelProfile) -> list[str]:
    """One sentence per structured preset: the gain, or that there is none, and from which length on there is."""
    found = []
    fastest, flash = profile.fastest_dense, profile.row("flash")
    for row in profile.rows:
        gain = profile.speedup(row)
        if row.kind != "structured" or row.note == "cold" or gain is None or fastest is None:
            continue
        clip, dense_clip = profile.end_to_end(row), profile.end_to_end(fastest)
        whole = f", {dense_clip / clip:.2f}x on the clip" if clip and dense_clip else ""
        if gain >= WORTH_IT:
            over_flash = profile.speedup(row, flash) if flash is not None and flash is not fastest else None
            also = f" and {over_flash:.2f}x as fast as with {flash.name}" if over_flash and flash else ""
            words = f"{row.name}: a step is {gain:.2f}x as fast as with {fastest.name}, the fastest dense{also}{whole}"
        else:
            words = f"{row.name}: not worth it at this size ({gain:.2f}x on a step against {fastest.name}{whole})"
        crossing = next((b for b in profile.break_even if b.preset == row.name), None)
        found.append(f"{words}; {break_even_words(crossing, profile.size)}" if crossing else words)
    return found


def break_even_words(crossing: BreakEven, size: tuple[int, int, int]) -> str:
    """Where a preset begins to pay, with the frame size that the figure belongs to."""
    at = f"at {size[0]}x{size[1]}"
    shortest, longest = crossing.points[0][0], crossing.points[-1][0]
    if crossing.kind == "below":
        return f"its attention call is faster from the shortest length measured on ({shortest:,} tokens {at})"
    if crossing.tokens is None:
        return f"no break-even in sight up to {longest:,} tokens {at}"
    if crossing.kind == "between":
        return f"the attention call breaks even near {round(crossing.tokens, -2):,.0f} tokens {at}"
    return f"break-even would be near {round(crossing.tokens, -2):,.0f} tokens {at}, by extrapolation from {longest:,}"


# Accuracy against cost


def quality_table(profile: QualityProfile, caption: str, width: int) -> RenderableType:
    """One row per variant; the ones that nothing beats in both operations and error are marked."""
    w, h, frames = profile.size
    clips = f"{len(profile.prompts)} prompt{'s' if len(profile.prompts) > 1 else ''}"
    how = f"{profile.steps} steps, guidance {profile.guidance_scale:g}, {clips}"
    title = f"{profile.model}, {w}x{h}, {frames} frames, {how}"
    table = _table(title, caption)
    paper = any(row.paper_psnr is not None for row in profile.rows)
    _columns(table, "work\n%", "latent\nerror", "PSNR\ndB", "SSIM\n", "attention\ns/clip")
    if paper:
        _columns(table, "paper's\nPSNR")
    if width >= WIDE:
        _columns(table, "worst\nerror", "attention\nspeedup")
    frontier = {row.name for row in profile.frontier()}
    group = None
    for row in profile.rows:
        if group is not None and row.group != group:
            table.add_section()
        group = row.group
        table.add_row(*_quality_cells(row, profile, row.name in frontier, paper, width))
    parts: list[RenderableType] = [table]
    parts += [Text(f"{row.name} has no figures: {row.failure}", style="yellow") for row in profile.rows if row.failure]
    parts.append(Text(_quality_legend(profile, paper), style="dim"))
    parts += [Text(note, style="dim") for note in profile.notes]
    return Group(*parts, Text())


def _quality_cells(
    row: QualityRow, profile: QualityProfile, on_frontier: bool, paper: bool, width: int
) -> list[RenderableType]:
    cells: list[RenderableType] = [
        Text.assemble((row.name, "bold" if row.is_preset else ""), (" *" if on_frontier else "", "green")),
        _maybe(row.flops_share, lambda share: f"{100 * share:.0f}"),
        _maybe(row.latent_error, lambda value: f"{value:.3f}"),
        _maybe(row.psnr, lambda value: "equal" if value >= 100 else f"{value:.1f}"),
        _maybe(row.ssim, lambda value: f"{value:.3f}"),
        _maybe(row.attention_s, lambda value: f"{value:.3g}"),
    ]
    if paper:
        cells.append(_maybe(row.paper_psnr, lambda value: f"{value:.2f}"))
    if width >= WIDE:
        cells.append(f"{max(row.latent_errors):.3f}" if row.latent_errors else ABSENT)
        dense = profile.dense_attention_s
        cells.append(_times(dense / row.attention_s if dense and row.attention_s else None))
    return cells


def _quality_legend(profile: QualityProfile, paper: bool) -> str:
    words = (
        "against dense attention with the same prompts and noise. work: self-attention operations, of dense. latent "
        "error: relative L2 of the final latents, mean over the clips. *: no other row has less work and less error."
    )
    if profile.dense_attention_s is not None:
        words += f" Dense attention takes {profile.dense_attention_s:.3g} s/clip."
    if paper:
        words += " The paper's PSNR is of Wan2.1-1.3B: the order compares, the level does not."
    return words


# Cells


def time_unit(spreads: Sequence[Spread | None]) -> tuple[str, Callable[[float], str]]:
    """One unit for a column by its median value, and a formatter with three or more digits for the smaller ones."""
    known = [spread.median for spread in spreads if spread is not None]
    middle = statistics.median(known) if known else 1.0
    unit, scale = ("s", 1.0) if middle >= 2 else ("ms", 1e3)

    def shown(value: float) -> str:
        scaled = value * scale
        return f"{scaled:.{3 if scaled < 1 else 2 if scaled < 10 else 1 if scaled < 1000 else 0}f}"

    return unit, shown


def _rate_unit(rates: Sequence[float | None]) -> tuple[str, Callable[[float], str]]:
    """One unit for a column of rates, and a formatter with two digits or more."""
    top = max((rate for rate in rates if rate is not None), default=0.0)
    unit, size = ("TFLOP/s", 1e12) if top >= 1e12 else ("GFLOP/s", 1e9)
    return unit, lambda rate: f"{rate / size:.0f}" if rate / size >= 10 else f"{rate / size:.1f}"


def _per_second(rate: float, what: str) -> str:
    """'798 TFLOP/s', '41 GB/s'."""
    size, prefix = (1e12, "T") if rate >= 1e12 else (1e9, "G")
    return f"{rate / size:.3g} {prefix}{what}/s"


def _name(name: str, kind: str, note: str) -> Text:
    return Text.assemble(
        (name, "bold" if kind == "structured" else ""), (f" {note}" if note not in ("", name) else "", "dim")
    )


def _error(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"


def _check_words(check: Check) -> Text:
    return Text(f"{check.error:.1e} ✓", style="green") if check.passed else Text(f"{check.error:.1e} ✗", style="red")


def _times(value: float | None) -> Text:
    if value is None:
        return Text(ABSENT)
    return Text(f"{value:.2f}x" if value < 100 else f"{value:.0f}x", style="green" if value >= 1 else "yellow")


def _maybe(value: Value | None, shown: Callable[[Value], str | Text]) -> str | Text:
    return ABSENT if value is None else shown(value)
