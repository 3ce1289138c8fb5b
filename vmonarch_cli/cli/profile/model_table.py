"""The table and the verdicts of `vmonarch profile model`; nothing prints here."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from vmonarch_cli.cli.profile.cells import WIDE, add_columns, error_cell, name_cell, profile_table, squeezed, time_unit
from vmonarch_cli.cli.tables import ABSENT, maybe, times
from vmonarch_cli.profile.results import BreakEven, ModelProfile
from vmonarch_cli.text import binary_size, seconds

WORTH_IT = 1.05
"""A step must become faster by this factor before a preset is called worth it."""


def model_table(profile: ModelProfile, caption: str, width: int) -> RenderableType:
    """Steps of one model, then the verdicts."""
    w, h, frames = profile.size
    forwards = f"{profile.forwards} forwards" if profile.forwards > 1 else "1 forward"
    how = ", ".join(
        [*(["random weights"] if profile.random_weights else []), "compiled" if profile.compiled else "eager"]
    )
    title = f"{profile.model}, {w}x{h}, {frames} frames = {profile.tokens:,} tokens, one step of {forwards}, {how}"
    made = profile_table(title, caption)
    unit, shown = time_unit([row.step for row in profile.rows])
    flash, fastest = profile.row("flash"), profile.fastest_dense
    against = [flash] if flash is not None and flash.step is not None else []
    if fastest is not None and fastest not in against:
        against.append(fastest)
    errors = any(row.error is not None for row in profile.rows)
    memory = any(row.peak_bytes for row in profile.rows)
    add_columns(made, f"step\n{unit}", "spread\n%", "attention\nshare %", *(f"times\n{row.name}" for row in against))
    add_columns(
        made,
        *(["error\n"] if errors else []),
        *(["memory\n"] if memory else []),
        f"clip of\n{profile.clip_steps} steps",
    )
    if width >= WIDE:
        add_columns(made, "first step\n", f"quartiles\n{unit}")
    for row in profile.rows:
        cells: list[RenderableType] = [
            name_cell(row.name, row.kind, row.note),
            maybe(row.step, lambda s: shown(s.median)),
            maybe(row.step, lambda s: f"{100 * s.width:.0f}" if s.count > 1 else ABSENT),
            maybe(row.share(profile.floor(row)), lambda share: f"{100 * share:.0f}"),
            *(times(profile.speedup(row, other)) for other in against),
        ]
        cells += [maybe(row.error, error_cell)] if errors else []
        cells += [maybe(row.peak_bytes, binary_size)] if memory else []
        cells.append(maybe(profile.end_to_end(row), seconds))
        if width >= WIDE:
            cells.append(maybe(row.first_call_s, seconds))
            cells.append(maybe(row.step, lambda s: f"{shown(s.low)}-{shown(s.high)}"))
        made.add_row(*cells, style="dim" if row.kind == "skipped" else "")
    made = squeezed(made, width, "quartiles", "first step", "memory", "spread", "attention", "error", "clip of")
    parts: list[RenderableType] = [made]
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
        stock = None if row.stock is None else profile.row(row.stock, row.note)
        fused_gain = None if stock is None else profile.speedup(row, stock)
        if stock is not None and fused_gain is not None:
            words += f"; with stock blocks it takes {fused_gain:.2f} times as long"
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
