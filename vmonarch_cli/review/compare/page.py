"""The report of a comparison: one HTML file with the clips, the sheet and the curves inside."""

from __future__ import annotations

import math

from vmonarch_cli.machine.versions import caption_versions
from vmonarch_cli.review import webpage
from vmonarch_cli.review.charts import Chart, draw_chart
from vmonarch_cli.review.compare.results import ComparedClip, Comparison
from vmonarch_cli.text import flops, seconds

ABSENT = "·"
EXPLAINED = {
    "PSNR": "PSNR: higher is closer to the reference.",
    "SSIM": "SSIM: 1 is equal.",
    "LPIPS": "LPIPS: 0 is equal.",
    "flicker": "Flicker: the mean change of a pixel that the next frame takes back, in 8-bit levels, to hold "
    "against the reference's own.",
    "attention": "Attention and end to end: as measured for each clip, and how many times faster than the reference.",
}


def report_page(comparison: Comparison, film: bytes | None, sheet: bytes | None) -> str:
    """The page; `film` is the side-by-side mp4 and `sheet` the contact sheet's PNG, None where there are no frames."""
    figures = figure_rows(comparison)
    colours = {contender.name: webpage.colour(number) for number, contender in enumerate(comparison.contenders)}
    return webpage.render(
        "report.html",
        title=comparison.title,
        prompt=comparison.prompt,
        facts=_facts_line(comparison),
        names=list(colours),
        figures=figures,
        explained=" ".join(EXPLAINED[title] for title, _ in figures if title in EXPLAINED),
        notes=comparison.notes,
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
    everyone = comparison.contenders

    def add(title: str, values: list[str | None]) -> None:
        if any(value is not None for value in values):
            rows.append((title, [ABSENT if value is None else value for value in values]))

    add("PSNR", [_psnr(c) for c in everyone])
    add("SSIM", [f"{c.distance.ssim:.4f}" if c.distance and c.distance.ssim is not None else None for c in everyone])
    add("LPIPS", [f"{c.distance.lpips:.4f}" if c.distance and c.distance.lpips is not None else None for c in everyone])
    add("flicker", [f"{c.flicker:.3f}" if c.flicker is not None else None for c in everyone])
    add("attention work", [flops(c.flops) if c.flops else None for c in everyone])
    for title, name in (("attention", "attention_s"), ("end to end", "end_to_end_s")):
        add(title, [_time(getattr(c, name), comparison.speedup(c, name)) for c in everyone])
    return rows


def _charts(comparison: Comparison, colours: dict[str, str]) -> list[Chart]:
    measured = {c.name: c.distance for c in comparison.others if c.distance is not None}
    charts = [
        draw_chart("PSNR", "dB, higher is closer", {n: d.psnr_frames for n, d in measured.items()}, colours),
        draw_chart("SSIM", "1 is equal", {n: d.ssim_frames for n, d in measured.items()}, colours),
        draw_chart("LPIPS", "0 is equal", {n: d.lpips_frames for n, d in measured.items()}, colours),
        draw_chart(
            "Change per frame", "8-bit levels", {c.name: c.change_frames for c in comparison.contenders}, colours
        ),
    ]
    return [chart for chart in charts if chart is not None]


def _facts_line(comparison: Comparison) -> str:
    """'demo · seed 0 · 96x96 · ...': numbers carry their label, names need none."""
    return " · ".join(
        value if label in ("model", "device", "dtype", "size") else f"{label} {value}"
        for label, value in comparison.facts
    )


def _caption(comparison: Comparison) -> str:
    record = comparison.reference.record or {}
    return caption_versions(record.get("versions") or {}) if record else ""


def _psnr(contender: ComparedClip) -> str | None:
    if contender.distance is None:
        return None
    return "identical" if math.isinf(contender.distance.psnr) else f"{contender.distance.psnr:.2f} dB"


def _time(value: float | None, speedup: float | None) -> str | None:
    if value is None:
        return None
    return seconds(value) if speedup is None else f"{seconds(value)}, {speedup:.2f}x"
