"""Put the measured tables and the plot of README.md in place, from the records in results/*.json.

    python kernels/bench/readme.py            # writes the tables between README.md's markers, and overview*.png
    python kernels/bench/readme.py --check    # exit 1 when a table is not what the records give; draws nothing

A table stands between `<!-- measured: NAME -->` and `<!-- end -->`. Records are read as `report.py` reads them: one
whose checks failed is refused. The plot needs matplotlib (`pip install "vmonarch[plot]"`), the tables vmonarch alone.
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))

from report import Record, RefusedRecord, load, table  # noqa: E402  (the scripts of this folder are no package)

from vmonarch_cli.demo.model import WEIGHTS_DIR  # noqa: E402
from vmonarch_cli.models.tuned import read_adapter, shipped_adapters  # noqa: E402

KERNEL, QUALITY = "h200-kernel.json", "h200-quality-demo.json"
FA4 = "h200-kernel-fa4.json"
"""As KERNEL, with FlashAttention 4 beside the others."""
LONG = "h200-quality-demo-193.json"
"""As QUALITY for longer clips; its columns are left out where there is no such record."""
STEPS = ("h200-wan2.1-1.3b-480p-fused.json", "h200-wan2.1-1.3b-720p-fused.json")
SMALL_CARDS = ("h200-card-wan2.1-1.3b.json", "h200-card-wan2.2-5b.json")
LARGEST = "h200-wan2.1-14b-largest.json"
FUSED = ", fused"
"""Ends the name of a row whose blocks ran fused, as they do by default on a GPU."""
TUNED = ", tuned"
"""Ends the name of a row that ran with an adapter."""
PRESETS, DEFAULT = ("paper", "fast", "balanced", "quality"), "balanced"
_BLOCK = re.compile(r"(?P<begin><!-- measured: (?P<name>[a-z-]+) -->\n)(?P<body>.*?)(?P<end><!-- end -->)", re.DOTALL)
_THEMES = {"overview.png": ("#ffffff", "#1f2328"), "overview-dark.png": ("#0d1117", "#e6edf3")}
"""File -> colours of paper and ink; GitHub's own for its light and its dark pages."""
_COLOURS = {"paper": "#D55E00", "fast": "#3B8BD0", "balanced": "#009E73", "quality": "#CC79A7"}


def calls(records: dict[str, Record]) -> list[str]:
    """One attention call over its length."""
    rows = []
    newest = {
        (shape["frames"], shape["positions"]): row["over_fastest_dense"]
        for shape in records[FA4]["shapes"]
        for row in shape["rows"]
        if row["name"] == "paper" and shape["fastest_dense"] == "fa4"
    }
    for shape in records[KERNEL]["shapes"]:
        over_fa4 = newest.get((shape["frames"], shape["positions"]))
        by_name = {row["name"]: row for row in shape["rows"]}
        flash, dense, paper = by_name["flash"], by_name[shape["fastest_dense"]], by_name["paper"]
        rows.append(
            [
                f"{shape['frames']} x {shape['positions']:,} = {shape['tokens']:,}",
                _ms(flash["time"]["median"]),
                _ms(dense["time"]["median"]),
                _ms(paper["time"]["median"]),
                f"**{_times(paper['over_flash'])}**",
                *(_times(by_name[name]["over_fastest_dense"]) for name in ("paper", "fast", "balanced")),
                "-" if over_fa4 is None else _times(over_fa4),
            ]
        )
    titles = ["tokens (latent frames x positions)", "FlashAttention-2", "cuDNN", "`paper`", "`paper` against FA2"]
    titles += [f"`{name}` against cuDNN" for name in ("paper", "fast", "balanced")] + ["`paper` against FA4"]
    return [*table(titles, rows), "", _origin(records[KERNEL])]


def cards(records: dict[str, Record]) -> list[str]:
    """What fits which card, and what it gains there."""
    rows = []
    for name in SMALL_CARDS:
        record = records[name]
        for card in sorted(record["cards"], key=lambda card: card["card_gib"]):
            said = card["said"][0].removeprefix("memory").strip()
            how = (
                said.split(": ", 1)[1]
                .split(",")[0]
                .removesuffix(" is on the device")
                .removesuffix(" stay on the device")
            )
            peak = f"fits: {how} on the card, peak {card['process_peak_gib']:.1f} GiB"
            rows.append((card["card_gib"], [f"{card['card_gib']:g} GB", f"`-m {record['settings']['model']}`", peak]))
    for name in STEPS:
        model = records[name]["model"]
        width, height, _ = model["size"]
        rows_of = {row["name"]: row for row in model["rows"]}
        best = {preset: rows_of[preset + FUSED] for preset in PRESETS if preset + FUSED in rows_of}
        step = ", ".join(
            f"`{preset}` {_ms(row['step']['median'])} ({_times(row['over_fastest_dense'])})"
            for preset, row in best.items()
        )
        dense = rows_of[model["fastest_dense"]]["step"]["median"]
        command = f"`-m {model['model']} --size {width}x{height}`"
        rows.append((80, ["80 GB", command, f"a step: dense {_ms(dense)}, {step}"]))
    largest = max(
        (length for length in records[LARGEST]["lengths"] if "error" not in length), key=lambda at: at["frames"]
    )
    settings, gib = records[LARGEST]["settings"], largest["peak_bytes"] / 2**30
    command = f"`-m {settings['model']} --size {settings['size']} --num-frames {largest['frames']}`"
    what = f"fits with `{settings['preset']}`: {largest['step_s']:.0f} s a step, peak {gib:.0f} GiB"
    rows.append((80, ["80 GB", command, what]))
    rows.sort(key=lambda row: row[0])
    titles, _, *lines = table(["card", "you type `vmonarch generate ...`", "you get"], [row for _, row in rows])
    return [titles, "|---|---|---|", *lines]


def closeness(records: dict[str, Record]) -> list[str]:
    """How far the shipped demo model's clips are from dense ones, and with the adapters that come with it."""
    quality = records[QUALITY]["quality"]
    by_name = _evaluated(quality) | {row["name"]: row for row in quality["rows"]}
    long = records[LONG]["quality"] if LONG in records else None
    at_length = _evaluated(long) | {row["name"]: row for row in long["rows"]} if long else {}
    adapters, long_adapters = (any(name + TUNED in rows for name in PRESETS) for rows in (by_name, at_length))
    rows = [
        [
            f"`{name}`{' (default)' * (name == DEFAULT)}",
            tomllib.loads((ROOT / "presets" / f"{name}.toml").read_text(encoding="utf-8"))["description"],
            f"{100 * by_name[name]['flops_share']:.0f} %",
            *_close(by_name[name]),
            *(_close(by_name.get(name + TUNED)) if adapters else ()),
            *(_close(at_length.get(name))[:1] if long else ()),
            *(_close(at_length.get(name + TUNED))[:1] if long_adapters else ()),
        ]
        for name in PRESETS
    ]
    names = ["preset", "what it does", "work", "error", "PSNR", *["error with its adapter", "PSNR"] * adapters]
    if long:
        names += [f"{long['size'][2]} frames: error", *["with its adapter"] * long_adapters]
    titles, _, *rows = table(names, rows)
    sampling = f"{quality['steps']} steps of the model's own sampler, guidance {quality['guidance_scale']:g}"
    what = f"Means of {len(quality['prompts'])} prompts, {sampling}, against dense from the same noise. "
    return [
        titles,
        "|---|---|" + "---:|" * (len(names) - 2),
        *rows,
        "",
        what + _origin(records[QUALITY]),
    ]


def _evaluated(quality: Record) -> dict[str, Record]:
    """Rows of the shipped adapters that are made for a record's clips, as `vmonarch tune` measured them."""
    rows = {}
    for adapter in map(read_adapter, shipped_adapters(WEIGHTS_DIR.parent)):
        made_for = adapter.steps, adapter.guidance_scale, adapter.num_frames
        if made_for == (quality["steps"], quality["guidance_scale"], quality["size"][2]):
            after = adapter.evaluation["after"]
            rows[adapter.preset_name + TUNED] = {"latent_error": after["latent_error_mean"], "psnr": after["psnr"]}
    return rows


def _close(row: Record | None) -> list[str]:
    """Error and PSNR of a row; of one that is not there or failed, dashes."""
    return (
        ["-", "-"]
        if row is None or row["latent_error"] is None
        else [f"{row['latent_error']:.3f}", f"{row['psnr']:.1f}\u00a0dB"]
    )


TABLES: dict[str, Callable[[dict[str, Record]], list[str]]] = {"calls": calls, "cards": cards, "closeness": closeness}


def filled(text: str, records: dict[str, Record]) -> str:
    """`text` with every table as the records give it; KeyError for a marker of no known table."""

    def block(found: re.Match[str]) -> str:
        return found["begin"] + "\n".join(TABLES[found["name"]](records)) + "\n" + found["end"]

    return _BLOCK.sub(block, text)


def draw(records: dict[str, Record], folder: Path) -> None:
    """Speed over length, and beside it error over work, once for a light page and once for a dark one."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    for name, (paper, ink) in _THEMES.items():
        style = {"figure.facecolor": paper, "axes.facecolor": paper, "savefig.facecolor": paper}
        style |= dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), ink)
        with mpl.rc_context({**style, "font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
            figure, (speed, error) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
            _draw_speed(speed, records[KERNEL]["shapes"])
            _draw_error(error, records[QUALITY]["quality"], ink)
            figure.supxlabel(_origin(records[KERNEL]), fontsize=8)
            figure.savefig(folder / name, dpi=110)
            plt.close(figure)


def _draw_speed(axis: Any, shapes: list[Record]) -> None:
    """Lines join lengths of one frame size; the one shape of another frame size stands alone."""
    for name in ("fast", "paper", "balanced"):
        points: dict[int, list[tuple[float, float]]] = {shape["positions"]: [] for shape in shapes}
        for shape in shapes:
            row = next(row for row in shape["rows"] if row["name"] == name)
            points[shape["positions"]].append((shape["tokens"] / 1e3, row["over_flash"]))
        for positions, line in points.items():
            label = f"{name}" if positions == shapes[0]["positions"] else None
            axis.plot(*zip(*sorted(line), strict=True), marker="o", color=_COLOURS[name], label=label)
    lone = next(shape for shape in shapes if shape["positions"] == max(shape["positions"] for shape in shapes))
    below = min(row["over_flash"] for row in lone["rows"] if row["name"] in _COLOURS)
    others = sorted(shape["frames"] for shape in shapes if shape is not lone)
    what = f"dots: {lone['frames']} latent frames of 720p\nlines: {others[0]} to {others[-1]} of 480p"
    axis.annotate(
        what, (lone["tokens"] / 1e3, below), xytext=(0, -32), textcoords="offset points", ha="center", fontsize=8
    )
    axis.axhline(1, color="#888888", linestyle=":")
    axis.set(yscale="log", yticks=[1, 2, 5, 10, 20, 30], xlabel="thousand tokens", ylabel="times FlashAttention-2")
    axis.yaxis.set_major_formatter("{x:g}x")
    axis.minorticks_off()
    axis.set_title("one attention call, 12 heads x 128", loc="left", fontsize=11)
    axis.legend(frameon=False)


def _draw_error(axis: Any, quality: Record, ink: str) -> None:
    by_name = {row["name"]: row for row in quality["rows"]}
    for name in PRESETS:
        at = (100 * by_name[name]["flops_share"], by_name[name]["latent_error"])
        axis.plot(*at, marker="o", markersize=9, color=_COLOURS[name])
        tuned = by_name.get(name + TUNED)
        if tuned is not None:  # below its preset: the same work, a smaller error
            below = (at[0], tuned["latent_error"])
            axis.annotate("", below, at, arrowprops={"arrowstyle": "-", "color": _COLOURS[name], "linestyle": ":"})
            axis.plot(*below, marker="o", markersize=9, color=_COLOURS[name], fillstyle="none")
        axis.annotate(name, at, xytext=(9, 3), textcoords="offset points", color=ink)
    axis.plot(100, 0, marker="s", markersize=8, color="#888888", clip_on=False)
    axis.annotate("dense", (100, 0), xytext=(-42, 6), textcoords="offset points", color=ink)
    axis.set(xlim=(0, 100), ylim=(0, None), xlabel="attention work, % of dense", ylabel="error against dense")
    hollow = "; hollow: with its adapter" * any(name + TUNED in by_name for name in PRESETS)
    what = f"demo model, {quality['size'][2]} frames{hollow}"
    axis.set_title(what, loc="left", fontsize=11)


def _origin(record: Record) -> str:
    versions = record["versions"]
    known = f"torch {versions['torch']}, triton {versions['triton']}"
    return f"{record['device']['name']}, {known}, {record['settings']['dtype']}."


def _ms(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:,.0f}\u00a0ms" if value >= 100 else f"{value:#.3g}\u00a0ms"


def _times(value: float) -> str:
    return f"{value:.1f}x"


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args(argv)
    try:
        records = dict(load(HERE / "results"))
    except RefusedRecord as refused:
        print(f"error: {refused}", file=sys.stderr)
        return 1
    before = arguments.readme.read_text(encoding="utf-8")
    after = filled(before, records)
    if arguments.check:
        if after != before:
            print(f"error: {arguments.readme} is not what the records give; run this without --check.", file=sys.stderr)
        return int(after != before)
    arguments.readme.write_text(after, encoding="utf-8")
    draw(records, HERE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
