"""Make one clip dense and with each preset: one loaded model, one seed, one decoding each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vmonarch_cli.clip.events import ClipStarted, Event
from vmonarch_cli.clip.record_model import read_record
from vmonarch_cli.errors import InputError, OutputError
from vmonarch_cli.media.paths import DEFAULT_FOLDER, output_path, slug
from vmonarch_cli.media.read import read_clip
from vmonarch_cli.models.registry import DEMO_ALIAS, find_model
from vmonarch_cli.pipeline.dense import dense_words, fastest_first
from vmonarch_cli.pipeline.preflight import Machine
from vmonarch_cli.plan.defaults import default_of, without
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve
from vmonarch_cli.plan.seeds import RANDOM, draw_seed
from vmonarch_cli.review.compare.existing import differing, read_sound_of, shared_facts, whose_sound
from vmonarch_cli.review.compare.results import ComparedClip, Comparison, Frames

if TYPE_CHECKING:
    from vmonarch_cli.timing import ClipResult

REFERENCE = "dense"
_OF_OTHERS = {"overrides", "dense_steps", "dense_layers", "impl", "tuned"}
"""Settings that the reference has none of."""


def plan_comparison(request: GenerateRequest, presets: Sequence[str]) -> tuple[Path, dict[str, Plan]]:
    """The folder of a comparison, and the plan of each clip by its name; the first is the dense reference.

    `--set` and its like, and `--tuned`, apply to every preset but dense. Dense attention is not sampled, unless asked
    for: here it runs. OutputError when the folder has something in it already and `--overwrite` was not given.
    """
    if request.num_videos not in (None, 1):
        raise InputError("compare makes one clip per preset: give --seed, not --num-videos")
    names = _names(presets or (_default_preset(request),))
    if default_of(request, "seed") == RANDOM:  # one for all of them
        request = replace(request, seed=draw_seed())
    seed = default_of(request, "seed") or 0
    folder = _folder(request, f"{slug(request.prompt or '')}-s{seed}-compare")
    request = replace(request, num_videos=None, dense_every=default_of(request, "dense_every") or 0)
    plans = {}
    for name, preset in names.items():
        given = replace(request, preset=preset, output=str(folder / f"{slug(name)}.mp4"))
        if preset == REFERENCE:
            given = replace(given, overrides=(), dense_steps=None, dense_layers=None, impl=None, tuned=None)
            given = replace(given, defaults=without(given.defaults, _OF_OTHERS))
        plans[name] = resolve(given, takes_dense=False)
    return folder, plans


def _default_preset(request: GenerateRequest) -> str:
    chosen = default_of(request, "preset")
    if chosen not in (None, REFERENCE):
        return str(chosen)
    model, _ = find_model(default_of(request, "model") or DEMO_ALIAS, default_of(request, "revision"))
    return model.defaults.preset


def run_comparison(
    plans: dict[str, Plan], machine: Machine, on_event: Callable[[Event], None] = lambda event: None
) -> tuple[Comparison, list[ClipResult]]:
    """Make the clips of `plan_comparison` and measure them; raises as `clip.make.generate` does."""
    from vmonarch_cli.clip.make import ClipMaker
    from vmonarch_cli.review.compare.figures import changes, distance, flicker, load_lpips

    first = plans[REFERENCE]
    machine = fastest_first(first, machine)
    clips: list[ComparedClip] = []

    def counted(event: Event) -> None:
        """A plan makes its clip 0; whoever watches sees them as the clips of one run."""
        on_event(replace(event, index=len(clips), count=len(plans)) if isinstance(event, ClipStarted) else event)

    adapters = [adapter for plan in plans.values() for adapter in plan.setup.tuned]
    maker = ClipMaker(first, machine, retry_dense=False, on_event=counted, adapters=adapters)
    lpips, note = load_lpips()
    results: list[ClipResult] = []
    for index, (name, plan) in enumerate(plans.items()):
        kept: list[Frames] = []
        result = maker.finish(plan, 0, maker.denoise(plan, 0), on_frames=kept.append)
        results.append(replace(result, index=index))
        (frames,) = kept
        shown, record = read_clip(result.path), read_record(result.record_path)
        clips.append(
            ComparedClip(
                name=name,
                frames=frames,
                change_frames=changes(shown),
                flicker=flicker(shown),
                distance=distance(frames, clips[0].frames, lpips) if clips else None,
                record=record,
                path=result.path,
                sound=read_sound_of(result.path, record),
            )
        )
    comparison = Comparison(
        title=f"{first.model.title}: {', '.join(list(plans)[1:])} against dense",
        prompt=first.prompt,
        fps=first.fps,
        reference=clips[0],
        others=clips[1:],
        facts=shared_facts(clips),
        differing=differing(clips),
        notes=[
            *([note] if note else []),
            *([f"dense attention by {dense_words(machine)}"] if machine.on_gpu else []),
            *([whose_sound(REFERENCE)] if clips[0].sound is not None else []),
        ],
    )
    return comparison, results


def _names(presets: Sequence[str]) -> dict[str, str]:
    """Names for labels and files -> presets as given, dense first; files of one name get -2, -3 and on."""
    names = {REFERENCE: REFERENCE}
    for preset in dict.fromkeys(presets):
        if preset == REFERENCE:
            continue
        stem = Path(preset).stem if "/" in preset or preset.endswith(".toml") else preset
        name, number = stem, 1
        while slug(name) in {slug(taken) for taken in names}:
            number += 1
            name = f"{stem}-{number}"
        names[name] = preset
    if len(names) == 1:
        raise InputError("compare needs a preset other than dense, which is the reference: --preset fast, for one")
    return names


def _folder(request: GenerateRequest, name: str) -> Path:
    if request.output is None:
        base, number = Path(DEFAULT_FOLDER) / name, 1
        folder = base
        while folder.exists() and not request.overwrite:
            number += 1
            folder = base.with_name(f"{name}-{number}")
        return folder
    folder = output_path(request.output)
    if folder.suffix or (folder.exists() and not folder.is_dir()):
        raise OutputError(f"--output takes a folder for a comparison, got {request.output}")
    if folder.is_dir() and any(folder.iterdir()) and not request.overwrite:
        raise OutputError(f"{folder} is not empty: pass --overwrite to replace what is there, or another --output")
    return folder
