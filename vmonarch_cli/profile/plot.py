"""Plots with matplotlib, which is an optional extra; the file's ending decides between PNG and SVG."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vmonarch_cli.errors import InputError
from vmonarch_cli.plan.tuned import TUNED_ROW
from vmonarch_cli.profile.quality_results import QualityProfile, QualityRow
from vmonarch_cli.profile.record import check_file
from vmonarch_cli.profile.results import EXACT, KernelShape, ModelProfile
from vmonarch_cli.untrusted.files import user_path

ENDINGS = (".png", ".svg")
PAPER_POINTS = ((28_000, 2.3, ""), (62_000, 5.0, ">"), (68_000, 5.6, ""))
"""(tokens, speedup over FlashAttention-2, ">" where only a bound is given) of the kernel in the VMonarch paper."""

# Okabe and Ito's colours, which stay apart for colour-blind eyes, and two more; one per preset or group.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8B6F2B", "#882255")
_GREY = "#777777"
# Colours alone do not tell nine groups apart for every eye: each has a shape of its own, too.
_MARKERS = ("o", "s", "^", "v", "D", "P", "X", "<", "*")
_GROUPS = {
    "preset": "preset (shipped)",
    "iterations": "iterations of the factors in a call",
    "first frame": "first frame not exact (no first)",
    "frame pairs": "two latent frames to a block",
    "band": "band: exact frames on each side",
    "warm start": "warm start: from the step before",
    "frame refresh": "refresh: exact frames in turn",
    "c_floor": "c_floor: lower bound of a weight",
    "dense steps": "first steps dense",
}
"""What is varied in a group of `profile quality`, in words for who does not know the fields."""


def check_plot(target: str | None, overwrite: bool = False) -> Path | None:
    """The plot's path; InputError before anything is measured when it could not be drawn."""
    if target is None:
        return None
    path = user_path(target, "--plot")
    if path.suffix.lower() not in ENDINGS:
        raise InputError(f"--plot takes a file that ends in {' or '.join(ENDINGS)}, got {target}")
    if find_spec("matplotlib") is None:
        raise InputError("--plot needs matplotlib, which is not installed: pip install 'vmonarch[plot]'")
    check_file(path, "--plot", overwrite)
    return path


def plot_kernel(shapes: Sequence[KernelShape], caption: str, path: Path) -> None:
    """Speedup over length, against FlashAttention-2 (with the paper's points) and against the fastest dense backend.

    Lines join lengths of one frame size, or all where every length has a size of its own; the preset `exact`, which is
    dense attention, is left out.
    """
    ordered = sorted(shapes, key=lambda s: (s.tokens, s.frames))
    rows = [row for shape in ordered for row in shape.rows if row.time is not None]
    flash = [shape.row("flash") for shape in ordered]
    has_flash = any(row is not None and row.time is not None for row in flash)
    only_flash = has_flash and all(
        shape.fastest_dense in (None, row) for shape, row in zip(ordered, flash, strict=True)
    )
    on_gpu = any(row.peak_bytes for row in rows)
    panels = (["flash"] if has_flash else []) + ([] if only_flash else ["fastest"])
    names = list(dict.fromkeys(row.name for row in rows if row.kind == "structured" and row.name != EXACT))
    figure, axes = _figure(len(panels), caption)
    for axis, panel in zip(axes, panels, strict=True):
        for colour, name in zip(_cycle(len(names)), names, strict=True):
            _speedup_lines(axis, ordered, name, panel == "flash", colour)
        if panel == "flash" and on_gpu:
            _paper_points(axis)
        axis.axhline(1, color=_GREY, linewidth=0.8, linestyle=":")
        _log_axes(axis, "tokens = latent frames x positions in a frame (grey)")
        axis.margins(x=0.08, y=0.12)
        for shape in ordered:
            axis.annotate(
                f"{shape.frames} x {shape.positions}",
                (shape.tokens, 0.01),
                xycoords=("data", "axes fraction"),
                rotation=90,
                fontsize=6,
                color=_GREY,
                ha="right",
                va="bottom",
            )
        who = "FlashAttention-2 (SDPA flash)" if on_gpu else "SDPA flash"
        title = f"against {who if panel == 'flash' else 'the fastest dense backend'}"
        if 1 < len({shape.positions for shape in ordered}) < len(ordered):
            title += "\nlines join lengths of one frame size; a dot alone has another size"
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_ylabel("speedup of the attention call")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=8)
    _save(figure, path)


def _speedup_lines(axis: Any, ordered: Sequence[KernelShape], name: str, over_flash: bool, colour: str) -> None:
    by_size: dict[int, list[tuple[int, float]]] = {}
    for shape in ordered:
        row, over = shape.row(name), shape.row("flash") if over_flash else shape.fastest_dense
        value = shape.speedup(row, over) if row is not None else None
        if value is not None:
            by_size.setdefault(shape.positions, []).append((shape.tokens, value))
    if all(len(points) == 1 for points in by_size.values()):
        by_size = {0: [point for points in by_size.values() for point in points]}
    for index, points in enumerate(by_size.values()):
        label = name if index == 0 else None
        axis.plot(*zip(*points, strict=True), "o-", color=colour, markersize=4, linewidth=1.4, label=label)


def _paper_points(axis: Any) -> None:
    tokens, speedups, bounds = zip(*PAPER_POINTS, strict=True)
    label = "VMonarch paper, as it reports of its own kernel"
    axis.plot(tokens, speedups, "D", color="black", fillstyle="none", markersize=5, label=label)
    for count, speedup, bound in zip(tokens, speedups, bounds, strict=True):
        offset, align = ((-6, -3), "right") if bound else ((6, -3), "left")
        axis.annotate(
            f"{bound}{speedup:g}x", (count, speedup), xytext=offset, textcoords="offset points", fontsize=7, ha=align
        )


def plot_model(profile: ModelProfile, caption: str, path: Path) -> None:
    """One bar per row: the step, of which everything but self-attention is grey."""
    rows = [row for row in profile.rows if row.step is not None]
    figure, axes = _figure(1, caption)
    axis = axes[0]
    for place, row in enumerate(rows):
        if row.step is None:
            continue
        total, skipped = row.step.median, profile.floor(row)
        floor = skipped.step.median if skipped and skipped.step else 0.0
        colour = {"dense": "#0072B2", "structured": "#D55E00"}.get(row.kind, _GREY)
        rest = min(floor, total)
        axis.barh(place, rest, color="#bbbbbb", height=0.62)
        axis.barh(place, total - rest, left=rest, color=colour, height=0.62)
        gain = profile.speedup(row)
        words = f"{total:.3g} s" if total >= 2 else f"{1e3 * total:.0f} ms"
        more = f"  {gain:.2f}x" if gain and row.kind == "structured" else ""
        axis.annotate(words + more, (total, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    axis.set_yticks(range(len(rows)), [f"{row.name} {row.note}".strip() for row in rows])
    axis.invert_yaxis()
    axis.margins(x=0.18)
    axis.set_xlabel("seconds per denoising step; grey: everything but self-attention")
    w, h, frames = profile.size
    axis.set_title(f"{profile.model}, {w}x{h}, {frames} frames, {profile.tokens:,} tokens", fontsize=10, loc="left")
    _save(figure, path)


_PRESET_PLACES = ((6, 4, "left"), (-6, 4, "right"), (-6, -10, "right"), (6, -10, "left"))
"""Where a preset's name may be from its point: right and up in points, and which end of it is there."""
_POINT_REACH = 3.5  # points that a marker takes on each side
_NO_ROOM_LEFT = 0.16  # of the work of dense attention: names to the left would run into the axis


def plot_quality(profiles: Sequence[QualityProfile], caption: str, path: Path) -> None:
    """Latent error over work, one panel a profile, presets named, the frontier as a line; a row with an adapter is
    hollow and hangs on the row without it.
    """
    groups = list(dict.fromkeys(row.group for profile in profiles for row in _drawn(profile)))
    has_adapters = any(_bare(row) is not None for profile in profiles for row in profile.rows)
    has_legend = len(groups) > 1 or has_adapters
    figure, axes = _figure(len(profiles), caption, width=8.4 if has_legend else 6.4, share_y=True)
    looks = dict(zip(groups, zip(_cycle(len(groups)), _MARKERS * len(groups), strict=False), strict=False))
    for number, (axis, profile) in enumerate(zip(axes, profiles, strict=True)):
        _quality_panel(axis, profile, looks)
        axis.set_ylabel("" if number else "relative L2 error of the final latents")
    if has_legend:
        # Each group once, whichever panel has it.
        entries = [zip(*axis.get_legend_handles_labels(), strict=True) for axis in axes]
        shown = {label: handle for of_axis in entries for handle, label in of_axis}
        above = {"loc": "outside upper left", "ncols": 4}
        place = above if len(profiles) > 1 else {"loc": "outside right upper"}
        figure.legend([*shown.values()], [*shown], frameon=False, fontsize=8, **place)
    figure.draw_without_rendering()  # places of names depend on the room that the axes are left
    for axis, profile in zip(axes, profiles, strict=True):
        named = [*(row for row in _drawn(profile) if row.is_preset), *profile.frontier()]
        bare = {r.name: r for r in named if r.latent_error and _bare(r) is None}
        _name_points(axis, list(bare.values()), _drawn(profile))
    _save(figure, path)


def _drawn(profile: QualityProfile) -> list[QualityRow]:
    """Rows that a logarithm can show."""
    return [row for row in profile.rows if row.latent_error and row.flops_share]


def _bare(row: QualityRow) -> str | None:
    """The name of the row without the adapter; None for one that has none."""
    name, tuned, _ = row.name.partition(TUNED_ROW)
    return name if tuned else None


def _quality_panel(axis: Any, profile: QualityProfile, looks: dict[str, tuple[str, str]]) -> None:
    """One profile; `looks`: colour and marker of each group."""
    rows = _drawn(profile)
    at = {row.name: (100 * (row.flops_share or 0), row.latent_error or 0) for row in rows}
    for group, (colour, marker) in looks.items():
        style: dict[str, Any] = {"color": colour, "markersize": 7 if group == "preset" else 5}
        for row in (row for row in rows if row.group == group and (_bare(row) or "") in at):
            axis.plot(*zip(at[_bare(row) or ""], at[row.name], strict=True), ":", color=colour, linewidth=1)
        label = _GROUPS.get(group, group)
        for names, more in (
            ([row.name for row in rows if row.group == group and _bare(row) is None], {"label": label}),
            (
                [row.name for row in rows if row.group == group and _bare(row) is not None],
                {"label": f"{label}, with its adapter", "markerfacecolor": "white"},
            ),
        ):
            if names:
                axis.plot(*zip(*map(at.get, names), strict=True), marker, **style, **more)
    frontier = [row for row in profile.frontier() if row.latent_error]
    axis.plot(
        [100 * (row.flops_share or 0) for row in frontier],
        [row.latent_error for row in frontier],
        drawstyle="steps-post",
        color=_GREY,
        linewidth=1,
        zorder=0,
    )
    _log_axes(axis, "self-attention operations, % of dense", log_x=False)
    axis.margins(y=0.12)
    axis.set_xlim(0, max(100, *(1.18 * work for work, _ in at.values())) if at else None)
    clips = f"{len(profile.prompts)} prompt{'s' if len(profile.prompts) > 1 else ''}"
    title = f"{profile.model}, {profile.size[2]} frames: {clips}, {profile.steps} steps"
    title += "\nline: the frontier, nothing has less work and less error"
    equal = [r.name for r in profile.rows if r.latent_error == 0]
    if equal:
        title += f"\nnot drawn, as {'its error is' if len(equal) == 1 else 'their errors are'} 0: {', '.join(equal)}"
    axis.set_title(title, fontsize=9, loc="left")


def _name_points(axis: Any, rows: list[QualityRow], drawn: list[QualityRow]) -> None:
    """The rows' names beside their points, where they cover no name before them and none of the drawn points; one
    without such a place steps down until it covers no name.
    """
    from matplotlib.transforms import Bbox

    centres = axis.transData.transform([(100 * (row.flops_share or 0), row.latent_error or 0) for row in drawn])
    reach = _POINT_REACH * axis.figure.dpi / 72
    points = [Bbox.from_bounds(x - reach, y - reach, 2 * reach, 2 * reach) for x, y in centres]
    names: list[Any] = []
    for row in rows:
        # Below and to the left of the frontier there is nothing, so that is where its names go.
        at_the_axis = (row.flops_share or 0) < _NO_ROOM_LEFT
        places = _PRESET_PLACES if row.is_preset or at_the_axis else ((-5, -8, "right"),)
        size = 8 if row.is_preset else 6
        name = axis.annotate(
            row.name,
            (100 * (row.flops_share or 0), row.latent_error or 0),
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=size,
            weight="bold" if row.is_preset else "normal",
        )
        for right, up, align in places:
            name.set(position=(right, up), horizontalalignment=align)
            if not _covers(name, names + points) and name.get_window_extent().x0 >= axis.bbox.x0:
                break
        else:
            right, up, align = places[0]
            name.set(position=(right, up), horizontalalignment=align)
            while _covers(name, names):
                up -= size
                name.set_position((right, up))
        names.append(name.get_window_extent())


def _covers(name: Any, boxes: list[Any]) -> bool:
    """Whether a text lies on one of the boxes, in pixels."""
    return any(name.get_window_extent().overlaps(box) for box in boxes)


def _figure(panels: int, caption: str, width: float = 6.4, *, share_y: bool = False) -> tuple[Any, list[Any]]:
    """A figure on white paper, which stays white on a dark page; `width` in inches, of one panel."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width if panels == 1 else 10.4, 4.4), layout="constrained", facecolor="white")
    axes = list(figure.subplots(1, panels, squeeze=False, sharey=share_y)[0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25, linewidth=0.6)
    figure.supxlabel(caption, fontsize=7, color=_GREY, x=0.01, ha="left")
    return figure, axes


def _log_axes(axis: Any, title: str, *, log_x: bool = True) -> None:
    """Logarithms with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_yscale("log")
    if log_x:
        axis.set_xscale("log")
    for part in (axis.xaxis, axis.yaxis) if log_x else (axis.yaxis,):
        part.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        part.set_major_formatter(FuncFormatter(_plain_number))
        part.set_minor_formatter(NullFormatter())
    axis.set_xlabel(title)


def _plain_number(value: float, _: object) -> str:
    """'0.05', '20', '50K'."""
    return f"{value / 1000:g}K" if value >= 10_000 else f"{value:,g}"


def _cycle(count: int) -> list[str]:
    return [_COLOURS[index % len(_COLOURS)] for index in range(count)]


def _save(figure: Any, path: Path) -> None:
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text stays text: searchable, and small
        figure.savefig(path, dpi=160)
