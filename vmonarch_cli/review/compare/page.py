"""The report of a comparison: one HTML file with the clips, the sheet and the curves inside."""

from __future__ import annotations

import math

from vmonarch_cli.machine.versions import caption_versions
from vmonarch_cli.review import webpage
from vmonarch_cli.review.charts import Chart, draw_chart
from vmonarch_cli.review.compare.results import ComparedClip, Comparison
from vmonarch_cli.review.compare.verdict import verdict
from vmonarch_cli.review.words import error_words, lost_subject
from vmonarch_cli.text import flops, seconds

ABSENT = "·"
EXPLAINED = {
    "PSNR": "PSNR: higher is closer to the reference.",
    "SSIM": "SSIM: 1 is equal.",
    "LPIPS": "LPIPS: 0 is equal.",
    "flicker": "Flicker: the mean change of a pixel that the next frame takes back, in 8-bit levels, to hold "
    "against the reference's own.",
    "error": "Error: of a step's attention against dense attention of the same inputs, median and largest.",
    "attention": "Attention and end to end: as measured for each clip, and how many times as fast as the reference.",
}


def report_page(comparison: Comparison, film: bytes | None, sheet: bytes | None) -> str:
    """The page; `film` is the side-by-side mp4 and `sheet` the contact sheet's PNG, None where there are no frames."""
    figures = figure_rows(comparison)
    colours = {clip.name: webpage.colour(number) for number, clip in enumerate(comparison.clips)}
    return webpage.render(
        "report.html",
        title=comparison.title,
        prompt=comparison.prompt,
        facts=_facts_line(comparison),
        verdict=verdict(comparison),
        names=list(colours),
        figures=figures,
        explained=" ".join(EXPLAINED[title] for title, _ in figures if title in EXPLAINED),
        notes=[*figure_notes(comparison), *comparison.notes],
        film=None if film is None else webpage.data_uri(film, "video/mp4"),
        sheet=None if sheet is None else webpage.data_uri(sheet, "image/png"),
        charts=_charts(comparison, colours),
        colours=colours,
        differing=comparison.differing,
        caption=_caption(comparison),
    )


def figure_rows(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """(figure, value of each clip) as text, for those that some clip has; the page and the terminal show the same."""
    rows: list[tuple[str, list[str]]] = []
    everyone = comparison.clips

    def add(title: str, values: list[str | None]) -> None:
        if any(value is not None for value in values):
            rows.append((title, [ABSENT if value is None else value for value in values]))

    add("PSNR", [_psnr(c) for c in everyone])
    add("SSIM", [f"{c.distance.ssim:.4f}" if c.distance and c.distance.ssim is not None else None for c in everyone])
    add("LPIPS", [f"{c.distance.lpips:.4f}" if c.distance and c.distance.lpips is not None else None for c in everyone])
    add("flicker", [f"{c.flicker:.3f}" if c.flicker is not None else None for c in everyone])
    add("error", [error_words(c.record) for c in everyone])
    add("attention work", [flops(c.flops) if c.flops else None for c in everyone])
    for title, name in (("attention", "attention_s"), ("end to end", "end_to_end_s")):
        add(title, [_time(comparison, c, name) for c in everyone])
    return rows


def _charts(comparison: Comparison, colours: dict[str, str]) -> list[Chart]:
    measured = {c.name: c.distance for c in comparison.others if c.distance is not None}
    charts = [
        draw_chart("PSNR", "dB, higher is closer", {n: d.psnr_frames for n, d in measured.items()}, colours),
        draw_chart("SSIM", "1 is equal", {n: d.ssim_frames for n, d in measured.items()}, colours),
        draw_chart("LPIPS", "0 is equal", {n: d.lpips_frames for n, d in measured.items()}, colours),
        draw_chart("Change per frame", "8-bit levels", {c.name: c.change_frames for c in comparison.clips}, colours),
    ]
    return [chart for chart in charts if chart is not None]


def _facts_line(comparison: Comparison) -> str:
    """'demo · seed 0 · 96x96 · ...': numbers carry their label, names need none."""
    return " · ".join(
        value if label in ("model", "device", "dtype", "size") else f"{label} {value}"
        for label, value in comparison.facts
    )


def _caption(comparison: Comparison) -> str:
    record = comparison.reference.record
    return "" if record is None else caption_versions(record.versions)


def _psnr(clip: ComparedClip) -> str | None:
    if clip.distance is None:
        return None
    return "identical" if math.isinf(clip.distance.psnr) else f"{clip.distance.psnr:.2f} dB"


def _time(comparison: Comparison, clip: ComparedClip, name: str) -> str | None:
    """'4.21 s, 1.94x', or why there is no ratio."""
    value, ratio = getattr(clip, name), comparison.speedup(clip, name)
    if value is None:
        return None
    if ratio is None or comparison.same_work(clip):
        return seconds(value)
    return f"{seconds(value)}, {ratio:.2f}x" if comparison.differs(clip) else f"{seconds(value)}, no difference"


def figure_notes(comparison: Comparison) -> list[str]:
    """What the figures of a comparison do and do not say, in sentences."""
    found = []
    compared = [clip for clip in comparison.others if comparison.speedup(clip, "attention_s") is not None]
    same = [clip.name for clip in compared if comparison.same_work(clip)]
    alike = [clip.name for clip in compared if clip.name not in same and not comparison.differs(clip)]
    apart = [clip for clip in compared if clip.name not in (*same, *alike)]
    variation = comparison.variation
    if apart:
        found.append(
            "end-to-end ratios give all clips the same other work, their median: what differs is the attention"
        )
    if same:
        found.append(f"{', '.join(same)}: as many operations as {comparison.reference.name}, so no ratio of times")
    if alike and variation is not None:
        found.append(
            f"no difference measurable for {', '.join(alike)}: times of equal work vary by {variation:.0%} between "
            "these clips"
        )
    elif alike:
        found.append(f"no difference measurable for {', '.join(alike)}: the records do not say how far times vary")
    found += [
        f"{clip.name}: {advice}" for clip in comparison.clips if (advice := lost_subject(clip.record)) is not None
    ]
    return found
