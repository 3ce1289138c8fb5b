"""Pages that open from a file: one HTML file, styles and charts inside it, nothing fetched and no script.

Whatever comes from a prompt, a record or a file name goes through `text`, and pages carry a policy that forbids
scripts and requests even if something slipped through.
"""

from __future__ import annotations

import base64
import html
import math
import re
from collections.abc import Mapping, Sequence

COLOURS = 6
"""How many lines of a chart have colours of their own."""

_UNWANTED = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u202a-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src 'self' file: data:; media-src 'self' file: data:"

_STYLE = """
:root { color-scheme: light dark; --ground: #fbfbfa; --card: #fff; --ink: #1d1f23; --dim: #666c76; --line: #e2e3e6;
  --accent: #2f5fd0; --good: #1d7a46; --poor: #a8560a;
  --c0: #2f5fd0; --c1: #d2591a; --c2: #1d8a5b; --c3: #8a3fb8; --c4: #b02a56; --c5: #6f6a12; }
@media (prefers-color-scheme: dark) { :root { --ground: #131417; --card: #1c1e22; --ink: #e8e9ec; --dim: #9aa0ab;
  --line: #31343a; --accent: #86a8ff; --good: #6fcf97; --poor: #f0a35e;
  --c0: #86a8ff; --c1: #ff9d66; --c2: #63d3a0; --c3: #cf9bf0; --c4: #ff8fae; --c5: #d6cf6a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 20px 56px; }
h1 { font-size: 24px; line-height: 1.25; margin: 0 0 4px; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 16px; margin: 36px 0 10px; }
p { margin: 6px 0; max-width: 100ch; overflow-wrap: anywhere; }
.dim { color: var(--dim); } .small { font-size: 13px; } .good { color: var(--good); } .poor { color: var(--poor); }
.prompt { font-size: 16px; white-space: pre-wrap; max-height: 12em; overflow: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 7px 12px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; font-size: 13px; color: var(--dim); }
th:first-child, td:first-child { text-align: left; padding-left: 0; } th:last-child, td:last-child { padding-right: 0; }
table.words th, table.words td { text-align: left; white-space: normal; overflow-wrap: anywhere; vertical-align: top;
  min-width: 5em; }
table.words th:first-child, table.words td:first-child { white-space: nowrap; }
video, img { display: block; max-width: 100%; height: auto; border-radius: 6px; }
video.wide, img.wide { width: 100%; max-width: none; min-width: 640px; background: #0c0d0f; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); gap: 24px 32px; }
figure { margin: 0; } figcaption { margin-bottom: 6px; }
.plot { display: grid; grid-template-columns: auto 1fr; column-gap: 8px; font-size: 12px; color: var(--dim);
  font-variant-numeric: tabular-nums; }
.plot .y { display: flex; flex-direction: column; justify-content: space-between; text-align: right; height: 150px;
  margin: -9px 0; height: 168px; }
.plot svg { width: 100%; height: 150px; display: block; overflow: visible; }
.plot .x { grid-column: 2; display: flex; justify-content: space-between; margin-top: 12px; }
svg .grid { stroke: var(--line); stroke-width: 1; vector-effect: non-scaling-stroke; }
svg polyline { fill: none; stroke-width: 2; stroke-linejoin: round; vector-effect: non-scaling-stroke; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 0 0 12px; padding: 0; list-style: none; }
.legend i { display: inline-block; width: 14px; height: 3px; border-radius: 2px; margin-right: 6px;
  vertical-align: middle; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 20px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; overflow: hidden; }
.card video, .card > a > img, .card > img { width: 100%; border-radius: 0; background: #0c0d0f; }
.card .body { padding: 12px 14px 14px; } .card .body p { margin: 0 0 8px; }
.card .prompt { font-size: 15px; max-height: 7.5em; }
dl { display: grid; grid-template-columns: auto 1fr; gap: 2px 12px; margin: 0; font-size: 13px; }
dt { color: var(--dim); } dd { margin: 0; text-align: right; overflow-wrap: anywhere;
  font-variant-numeric: tabular-nums; }
details { margin-top: 10px; } summary { cursor: pointer; color: var(--dim); }
a { color: var(--accent); }
""" + "".join(f".k{i} {{ stroke: var(--c{i}); background: var(--c{i}); }}\n" for i in range(COLOURS))


def text(value: object) -> str:
    """Any text for an HTML body or an attribute in double quotes: nothing in it can become markup.

    Control characters, lone surrogates and marks that reverse the direction of writing are shown as \ufffd.
    """
    return html.escape(_UNWANTED.sub("\N{REPLACEMENT CHARACTER}", str(value)), quote=True)


def page(title: str, body: str) -> str:
    """A whole page; `body` is markup made with the functions of this module."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        "</body>\n</html>\n"
    )


def data_uri(content: bytes, kind: str) -> str:
    """A file inside the page; `kind` is its media type."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def table(titles: Sequence[str], rows: Sequence[Sequence[str]], words: bool = False) -> str:
    """A table of markup cells that scrolls by itself where it is too wide; `words`: text, which wraps instead."""
    head = "".join(f"<th>{text(title)}</th>" for title in titles)
    lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>\n" for row in rows)
    kind = ' class="words"' if words else ""
    return f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead>\n<tbody>\n{lines}</tbody></table></div>'


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """Labels and values, both text."""
    return "<dl>" + "".join(f"<dt>{text(label)}</dt><dd>{text(value)}</dd>" for label, value in rows) + "</dl>"


def legend(names: Mapping[str, int]) -> str:
    """Names with the colours of their lines."""
    items = "".join(f'<li><i class="k{number % COLOURS}"></i>{text(name)}</li>' for name, number in names.items())
    return f'<ul class="legend small">{items}</ul>'


def chart(
    title: str, note: str, lines: Mapping[str, Sequence[float | None]], colours: Mapping[str, int], unit: str = ""
) -> str:
    """Curves over frames as SVG. Axis labels are HTML, so that they stay readable when the curves are squeezed.

    A value that is None or not finite leaves a gap.
    """
    finite = [v for values in lines.values() for v in values if v is not None and math.isfinite(v)]
    count = max((len(values) for values in lines.values()), default=0)
    if not finite or count < 2:
        return ""
    low, high = _round_range(min(finite), max(finite))
    curves = "".join(
        f'<polyline class="k{colours[name] % COLOURS}" points="{part}"/>'
        for name, values in lines.items()
        for part in _pieces(values, count, low, high)
    )
    grid = "".join(f'<line class="grid" x1="0" x2="1000" y1="{y}" y2="{y}"/>' for y in (0, 500, 1000))
    marks = "".join(f"<span>{_short(value)}{text(unit)}</span>" for value in (high, (low + high) / 2, low))
    label = text(f"{title}: {', '.join(lines)}")
    return (
        f"<figure><figcaption><strong>{text(title)}</strong> <span class='dim small'>{text(note)}</span></figcaption>"
        f'<div class="plot"><div class="y">{marks}</div>'
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" aria-label="{label}">{grid}{curves}</svg>'
        f'<div class="x"><span>frame 0</span><span>{count - 1}</span></div></div></figure>'
    )


def _pieces(values: Sequence[float | None], count: int, low: float, high: float) -> list[str]:
    """Points of the stretches without gaps, in a square of 1000."""
    pieces: list[list[str]] = [[]]
    for index, value in enumerate(values):
        if value is None or not math.isfinite(value):
            pieces.append([])
        else:
            pieces[-1].append(f"{1000 * index / (count - 1):.1f},{1000 * (high - value) / (high - low):.1f}")
    return [" ".join(piece if len(piece) > 1 else piece * 2) for piece in pieces if piece]


def _round_range(low: float, high: float) -> tuple[float, float]:
    """Round bounds around the values, so that the middle is a round number as well."""
    span = high - low or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span)) / 2
    bottom, top = math.floor(low / step) * step, math.ceil(high / step) * step
    if bottom == top:
        top += 2 * step
    return bottom, top


def _short(value: float) -> str:
    return f"{round(value, 6):.4g}"
