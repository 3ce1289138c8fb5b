"""The table of `vmonarch profile quality`; nothing prints here."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from vmonarch_cli.cli.profile.cells import WIDE, add_columns, profile_table, squeezed
from vmonarch_cli.cli.tables import ABSENT, maybe, times
from vmonarch_cli.profile.quality_results import QualityProfile, QualityRow


def quality_table(profile: QualityProfile, caption: str, width: int) -> RenderableType:
    """One row per variant; the ones that nothing beats in both operations and error are marked."""
    w, h, frames = profile.size
    clips = f"{len(profile.prompts)} prompt{'s' if len(profile.prompts) > 1 else ''}"
    how = f"{profile.steps} steps, guidance {profile.guidance_scale:g}, {clips}"
    title = f"{profile.model}, {w}x{h}, {frames} frames, {how}"
    made = profile_table(title, caption)
    paper = any(row.paper_psnr is not None for row in profile.rows)
    add_columns(made, "work\n%", "latent\nerror", "PSNR\ndB", "SSIM\n", "attention\ns/clip")
    if paper:
        add_columns(made, "paper's\nPSNR")
    if width >= WIDE:
        add_columns(made, "worst\nerror", "attention\nspeedup")
    frontier = {row.name for row in profile.frontier()}
    group = None
    for row in profile.rows:
        if group is not None and row.group != group:
            made.add_section()
        group = row.group
        made.add_row(*_quality_cells(row, profile, row.name in frontier, paper, width))
    made = squeezed(made, width, "attention", "worst", "paper's", "SSIM", "PSNR", "attention")
    parts: list[RenderableType] = [made]
    parts += [Text(f"{row.name} has no figures: {row.failure}", style="yellow") for row in profile.rows if row.failure]
    parts.append(Text(_quality_legend(profile, paper), style="dim"))
    parts += [Text(note, style="dim") for note in profile.notes]
    return Group(*parts, Text())


def _quality_cells(
    row: QualityRow, profile: QualityProfile, on_frontier: bool, paper: bool, width: int
) -> list[RenderableType]:
    cells: list[RenderableType] = [
        Text.assemble((row.name, "bold" if row.is_preset else ""), (" *" if on_frontier else "", "green")),
        maybe(row.flops_share, lambda share: f"{100 * share:.0f}"),
        maybe(row.latent_error, lambda value: f"{value:.3f}"),
        maybe(row.psnr, lambda value: "equal" if value >= 100 else f"{value:.1f}"),
        maybe(row.ssim, lambda value: f"{value:.3f}"),
        maybe(row.attention_s, lambda value: f"{value:.3g}"),
    ]
    if paper:
        cells.append(maybe(row.paper_psnr, lambda value: f"{value:.2f}"))
    if width >= WIDE:
        cells.append(f"{max(row.latent_errors):.3f}" if row.latent_errors else ABSENT)
        dense = profile.dense_attention_s
        cells.append(times(dense / row.attention_s if dense and row.attention_s else None))
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
