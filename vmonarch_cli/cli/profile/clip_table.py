"""The table, the bars and the verdicts of `vmonarch profile clip`; nothing prints here."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from vmonarch_cli.cli.profile.cells import add_columns, error_cell, name_cell, profile_table, squeezed
from vmonarch_cli.cli.spent import SpentBar
from vmonarch_cli.cli.tables import facts, maybe, times
from vmonarch_cli.profile.clip_results import ClipProfile
from vmonarch_cli.text import binary_size, seconds

_PARTS = ("load", "compile", "text", "attention", "rest", "decode", "write")


def clip_table(profile: ClipProfile, caption: str, width: int) -> RenderableType:
    """Clips of one model part by part, where the warm ones' seconds went, then the verdicts."""
    w, h, frames = profile.size
    made = profile_table(f"{profile.model}, {w}x{h}, {frames} frames, {profile.steps} steps, whole clips", caption)
    add_columns(made, *_PARTS, "whole", "times\ndense", "error", "memory")
    for row in profile.rows:
        for kind, spent, whole in (("first", row.cold, row.cold_s), ("warm", row.warm_parts, row.warm_s)):
            if not spent:
                continue
            warm = kind == "warm"
            against = profile.dense.warm_s if warm else profile.dense.cold_s
            made.add_row(
                name_cell(row.name, "" if row is profile.dense else "structured", kind),
                *(maybe(spent.get(part), seconds) for part in _PARTS),
                maybe(whole, seconds),
                times(None if row is profile.dense or not against or not whole else against / whole),
                maybe(row.error if warm else None, error_cell),
                maybe(row.peak_bytes if warm else None, binary_size),
            )
    made = squeezed(made, width, "memory", "error", "text", "compile", "load", "write", "decode")
    bars: list[tuple[str, RenderableType]] = [
        (row.name, SpentBar(row.warm_parts)) for row in profile.rows if row.warm_parts
    ]
    legend = (
        "first: with loading and the first calls of kernels; whole: all parts; rest: denoising beside the attention; "
        "warm: medians; error: of the final latents"
    )
    parts: list[RenderableType] = [made, Text(legend, style="dim"), Text(), facts(bars), Text()]
    parts += [Text(note, style="dim") for note in profile.notes]
    parts += [Text(sentence, style="bold") for sentence in profile.verdicts]
    return Group(*parts, Text())
