"""`vmonarch demo`: one long clip of the built-in model, dense and structured, and what the structure gained."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated

from vmonarch_cli import __version__
from vmonarch_cli.cli.compare import make_comparison, show_figures
from vmonarch_cli.cli.completion import preset_names
from vmonarch_cli.cli.opening import Open, open_file
from vmonarch_cli.cli.options import (
    ATTENTION,
    MODEL,
    OUTPUT,
    SAMPLING,
    SHAPE,
    Debug,
    Shown,
    configured,
    option,
    takes_request,
    whole_option,
)
from vmonarch_cli.models.registry import DEMO_ALIAS
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.seeds import read_seed

if TYPE_CHECKING:
    from vmonarch_cli.review.compare.results import Comparison

PROMPT = "a large red star moving from left to right on a light blue background"
FRAMES = 193
STEPS = 8
"""With fewer the star loses its outline; with these, two free cores need about two minutes for both clips."""
PRESET = "fast"


@dataclass(frozen=True)
class DemoFlags:
    """What may be other than the demo's own."""

    prompt: Annotated[str, option("--prompt", "-p", panel=MODEL, help=f"Default: {PROMPT}.")] = PROMPT
    num_frames: Annotated[
        int, whole_option("--num-frames", "--frames", panel=SHAPE, help=f"Frames of the clip. Default: {FRAMES}.")
    ] = FRAMES
    steps: Annotated[int, whole_option("--steps", panel=SAMPLING, help=f"Denoising steps. Default: {STEPS}.")] = STEPS
    seed: Annotated[
        int,
        option(
            "--seed", panel=SAMPLING, parser=read_seed, metavar="<int>", help="Random (or -1) draws one. Default: 0."
        ),
    ] = 0
    output: Annotated[str | None, option("--output", "-o", panel=OUTPUT, help="Folder. Default: one in outputs/.")] = (
        None
    )
    overwrite: Annotated[bool, option("--overwrite", panel=OUTPUT, help="Replace files that exist.")] = False


@takes_request()
def demo(
    flags: DemoFlags,
    shown: Shown,
    preset: Annotated[
        list[str] | None,
        option(
            "--preset",
            panel=ATTENTION,
            autocompletion=preset_names,
            help=f"What to hold against dense (repeatable). Default: {PRESET}.",
        ),
    ] = None,
    open_page: Open = False,
    debug: Debug = False,
) -> None:
    """See what structured attention gains on this machine: one long clip of the built-in model, dense and structured.

    Takes about two minutes on two free cores. Shows both timings as they come, and writes the clips and a page
    with them side by side. `vmonarch compare` does the same for any model.
    """
    from vmonarch_cli.review.compare.files import write_comparison
    from vmonarch_cli.review.compare.verdict import verdict

    out = shown.output()
    request = replace(configured(GenerateRequest(**asdict(flags))), model=DEMO_ALIAS)
    folder, comparison = make_comparison(request, preset or [PRESET], out)
    files = write_comparison(comparison, folder, overwrite=True)
    sentences, seen = verdict(comparison), read_clips(comparison)
    if out.as_json:
        about = {"verdict": sentences, "shows": seen, "files": [str(path) for path in files]}
        out.json({"version": __version__, **comparison.to_json(), **about})
    show_figures(comparison, out)
    out.say("; ".join(f"{name} shows {what}" for name, what in seen.items()) + ", as the pixels read")
    for sentence in sentences:
        out.say(sentence, "bold")
    out.warn(*busy(os.getloadavg()[0], len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ())
    out.paths(*files)
    if open_page:
        open_file(files[-1], out)


def busy(load: float, cores: int) -> list[str]:
    """What times are worth on a machine with this load (processes that want to run) on so many cores: a sentence, or
    none where it is about this program's own.
    """
    if load <= cores + 1.5:
        return []
    return [f"other programs kept this machine busy (load {load:.1f} on {cores} cores): the times say little"]


def read_clips(comparison: Comparison) -> dict[str, str]:
    """What each clip shows, read from its pixels: 'a red star (right) on light blue'."""
    import torch

    from vmonarch_cli.demo.reader import read_clip

    found = {}
    for clip in comparison.clips:
        reading = read_clip(torch.from_numpy(clip.frames).movedim(-1, 0).float() / 127.5 - 1)
        objects = " and ".join(f"a {one.colour} {one.shape} ({', then '.join(one.motions)})" for one in reading.objects)
        found[clip.name] = f"{objects or 'nothing that stands out'} on {reading.background}"
    return found
