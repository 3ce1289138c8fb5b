"""The table of `vmonarch profile kernel`; nothing prints here."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from vmonarch_cli.cli.profile.cells import (
    WIDE,
    add_columns,
    check_cell,
    error_cell,
    name_cell,
    per_second,
    profile_table,
    rate_unit,
    squeezed,
    time_unit,
)
from vmonarch_cli.cli.tables import maybe, times
from vmonarch_cli.profile.peers import PEER
from vmonarch_cli.profile.results import QUANTISED, ChipPeak, KernelRow, KernelShape, OutputCheck
from vmonarch_cli.text import binary_size, seconds


def kernel_table(shape: KernelShape, caption: str, width: int) -> RenderableType:
    """One shape: a row per backend and preset, and sentences for what failed."""
    fastest, flash = shape.fastest_dense, shape.row("flash")
    title = f"{shape.frames} x {shape.positions} = {shape.tokens:,} tokens"
    made = profile_table(f"{title} (latent frames x positions)", caption)
    unit, shown = time_unit([row.time for row in shape.rows])
    against = [flash] if flash is not None and flash.time is not None else []
    if fastest is not None and fastest not in against:
        against.append(fastest)
    per, _ = rate_unit([row.flops_per_s for row in shape.rows])
    add_columns(made, f"median\n{unit}", "spread\n%", f"rate\n{per}", "floor\n%")
    add_columns(made, *(f"times\n{row.name}" for row in against))
    add_columns(made, "error\n", *(["memory\n"] if any(row.peak_bytes for row in shape.rows) else []))
    if width >= WIDE:
        add_columns(made, f"quartiles\n{unit}", "first call\n", "check\n")
    for row in shape.rows:
        made.add_row(*_kernel_cells(row, shape, against, shown, width), style="" if row.passed else "red")
    made = squeezed(made, width, "quartiles", "first call", "check", "memory", "floor", "spread", "rate", "error")
    return Group(made, *_kernel_sentences(shape.rows), Text())


def _kernel_cells(
    row: KernelRow, shape: KernelShape, against: Sequence[KernelRow], shown: Callable[[float], str], width: int
) -> list[RenderableType]:
    name = name_cell(row.name, row.kind, "" if row.kind == PEER else row.note)
    cells: list[RenderableType] = [
        name if row.passed else name.append(" ✗"),
        maybe(row.time, lambda t: shown(t.median)),
        maybe(row.time, lambda t: f"{100 * t.width:.0f}"),
        maybe(row.flops_per_s, rate_unit([r.flops_per_s for r in shape.rows])[1]),
        maybe(row.floor_share, lambda share: f"{100 * share:.0f}"),
    ]
    cells += [times(shape.speedup(row, other)) for other in against]
    cells.append(maybe(row.error, error_cell))
    if any(r.peak_bytes for r in shape.rows):
        cells.append(maybe(row.peak_bytes, binary_size))
    if width >= WIDE:
        cells.append(maybe(row.time, lambda t: f"{shown(t.low)}-{shown(t.high)}"))
        cells.append(maybe(row.first_call_s, seconds))
        cells.append(maybe(row.check, check_cell))
    return cells


def _kernel_sentences(rows: Sequence[KernelRow]) -> list[Text]:
    found = [Text(f"{row.name} has no figures: {row.failure}", style="yellow") for row in rows if row.failure]
    for row in rows:
        if row.check is not None and not row.check.passed:
            found.append(Text(f"{row.name}: {failed_check(row.check)}", style="red"))
    if any(row.note == QUANTISED and row.time for row in rows):
        found.append(Text("quantised backends are not what speedups refer to: their result is another", style="dim"))
    peers = sorted({row.note for row in rows if row.kind == PEER})
    if peers:
        found.append(Text(f"sol: Sol-Attn, INT8, by top-k share or threshold tau; {', '.join(peers)}", style="dim"))
    return found


def failed_check(check: OutputCheck) -> str:
    """Why a check failed, as half a sentence."""
    return f"check failed: error {check.error:.2g} against {check.against}, at most {check.budget:.2g} is right"


def kernel_legend(chip: ChipPeak, inputs: str) -> Text:
    """What the columns mean and what the floor is made of."""
    peaks = f"{per_second(chip.flops_per_s, 'FLOP')} in a matrix product, {per_second(chip.bytes_per_s, 'B')} in a copy"
    return Text(
        "spread: distance of the quartiles. rate: by honest operation counts. floor: the least time for "
        f"operations and bytes at what this chip did in this run ({peaks}) over the time taken. times: speedup. "
        f"error: relative L2 against float32 dense attention on the same tensors ({inputs}). warm: from the L of an "
        "earlier call.",
        style="dim",
    )
