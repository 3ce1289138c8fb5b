"""`vmonarch profile clip`: whole clips of one model, dense and structured, the first one and warm ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from vmonarch_cli.cli.options import OUTPUT, Debug, configured, option, takes_request, whole_option
from vmonarch_cli.cli.profile.clip_table import clip_table
from vmonarch_cli.cli.profile.flags import Json, RunFlags, Seconds
from vmonarch_cli.cli.profile.run import ProfileRun
from vmonarch_cli.errors import InputError
from vmonarch_cli.media.paths import ENDINGS
from vmonarch_cli.plan import checks
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve
from vmonarch_cli.profile.clip_results import ClipProfile
from vmonarch_cli.text import shown


@dataclass(frozen=True)
class ClipFlags:
    """How often, for how long, and what becomes of the figures."""

    repeats: Annotated[
        int | None, whole_option("--repeats", panel=OUTPUT, help="Warm clips of each kind. Default: 3, on a CPU 1.")
    ] = None
    ending: Annotated[
        str | None,
        option("--ending", panel=OUTPUT, help="What the clips are written as: .mp4, .webm, .gif, .webp or .png."),
    ] = None
    seconds: Seconds = None
    as_json: Json = None


@takes_request("output", "num_videos", "dense_every")
def clip(request: GenerateRequest, flags: ClipFlags, debug: Debug = False) -> None:
    """Time whole clips, dense and structured, from loading to the file, and say what to change next.

    The clips are made in a folder that is removed. Kernels are compiled anew, as on a machine that never did.
    """
    ending = ".mp4" if flags.ending is None else flags.ending.lower()
    if ending not in ENDINGS:
        raise InputError(f"--ending takes {', '.join(ENDINGS)}, got {shown(flags.ending)}")
    repeats = checks.whole("--repeats", flags.repeats, 1, 1000)
    request = configured(request)
    prompt = checks.EXAMPLE_PROMPT if request.prompt is None else request.prompt
    plan = resolve(replace(request, prompt=prompt, output=f"clip{ending}", overwrite=True), takes_dense=False)
    checks.structured(plan.preset, "which is measured anyway", plan.preset_reason)
    where = RunFlags(plan.seed, plan.device, plan.dtype, flags.seconds, flags.as_json, None, request.overwrite)
    run = ProfileRun("clip", where)

    from vmonarch_cli.profile.clip import ClipSettings, run_clips

    settings = ClipSettings(plan, repeats or (3 if run.on_gpu else 1))
    recorded = {"settings": plan.settings(), "preset": plan.preset.model_dump(), "setup": plan.setup.model_dump()}
    run.start({**recorded, "repeats": settings.repeats}, "")

    def on_result(found: ClipProfile) -> None:
        run.save(clip=found.to_json(), verdicts=found.verdicts)

    with run.working():
        found = run_clips(settings, run.budget, on_result, run.work)
    on_result(found)
    run.show(lambda columns: clip_table(found, run.caption, columns))
    run.finish([], [], [], measured=found.structured.warm_s is not None)
