"""`vmonarch profile quality`: accuracy against cost, with the same prompts and seeds for every variant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from vmonarch_cli.cli.completion import preset_names
from vmonarch_cli.cli.options import ATTENTION, MODEL, SAMPLING, Debug, option, takes_request, whole_option
from vmonarch_cli.cli.profile import request
from vmonarch_cli.cli.profile.flags import FlowShift, Guidance, RunFlags, ShapeFlags, TunedFiles
from vmonarch_cli.cli.profile.quality_table import quality_table
from vmonarch_cli.cli.profile.run import ProfileRun
from vmonarch_cli.errors import InputError
from vmonarch_cli.plan import checks
from vmonarch_cli.presets import load_preset
from vmonarch_cli.profile.peers import PEER, installed_peers
from vmonarch_cli.profile.plot import plot_quality
from vmonarch_cli.profile.quality_results import QualityProfile
from vmonarch_cli.profile.results import OutputCheck
from vmonarch_cli.profile.variants import SWEEPS, Variant, variants, with_adapters, with_peers
from vmonarch_cli.text import near, shown

if TYPE_CHECKING:
    from vmonarch_cli.profile.quality import QualitySettings


@dataclass(frozen=True)
class QualityFlags:
    """Which clips are made, and with which variants."""

    prompt: Annotated[
        list[str] | None, option("--prompt", "-p", panel=MODEL, help="What a clip should show (repeatable).")
    ] = None
    prompts: Annotated[
        int | None, whole_option("--prompts", panel=MODEL, help="How many of the held-out prompts. Default: 4.")
    ] = None
    steps: Annotated[int | None, whole_option("--steps", panel=SAMPLING, help="Denoising steps of a clip.")] = None
    guidance_scale: Guidance = None
    flow_shift: FlowShift = None
    batch: Annotated[
        int | None, whole_option("--batch", panel=SAMPLING, help="Clips made together. Default: 16 on a GPU, else 1.")
    ] = None
    sweep: Annotated[
        str,
        option("--sweep", panel=ATTENTION, help="quick (the presets), full (every field) or paper (its ablation)."),
    ] = "quick"
    presets: Annotated[
        list[str] | None,
        option(
            "--preset",
            panel=ATTENTION,
            autocompletion=preset_names,
            help="A further preset or .toml file to compare (repeatable).",
        ),
    ] = None
    tuned: TunedFiles = None


@takes_request()
def quality(shape: ShapeFlags, flags: QualityFlags, where: RunFlags, debug: Debug = False) -> None:
    """Set accuracy against cost: the same prompts and seeds with every variant, against dense attention."""
    if flags.sweep not in SWEEPS:
        raise InputError(f"--sweep takes {', '.join(SWEEPS)}, got {shown(flags.sweep)}{near(flags.sweep, SWEEPS)}")
    clip = request.model_shape(shape, random=False)
    checks.whole("--prompts", flags.prompts, 1, 1000)
    request.check_sampling(clip.entry, flags.steps, flags.guidance_scale, flags.flow_shift)
    checks.whole("--batch", flags.batch, 1, 64)
    texts = request.prompts(clip, flags.prompt, flags.prompts or 4)
    compared = _variants(flags)
    request.check_frames(clip, [variant.preset for variant in compared])
    defaults = clip.entry.defaults
    guidance = defaults.guidance_scale if flags.guidance_scale is None else flags.guidance_scale
    presets = [variant.preset for variant in compared if variant.is_preset]
    tuned, warnings = request.adapters(flags.tuned, clip, presets, flags.steps or defaults.steps, guidance)
    compared = with_adapters(compared, tuned)
    run = ProfileRun("quality", where)
    run.warn(warnings)

    from vmonarch_cli.profile.quality import run_quality

    peers = installed_peers(run.device, run.dtype, clip.entry.head_dim)
    compared = with_peers(compared, peers)
    settings = _settings(flags, clip, texts, compared, run)
    run.start(_recorded(settings), "")

    def on_result(found: QualityProfile, verified: list[OutputCheck]) -> None:
        run.save(quality=found.to_json(), checks=[check.to_json() for check in verified])

    with run.working():
        found, verified, skipped = run_quality(settings, run.budget, on_result, run.work)
    if peers:
        found.notes.append(f"sol: Sol-Attn, INT8, by top-k share or threshold tau; {peers[0].note}")
    run.show(lambda columns: quality_table(found, run.caption, columns))
    if run.plot is not None and found.rows:
        plot_quality([found], run.caption, run.plot)
    failures = [f"{check.against}: error {check.error:.2g}" for check in verified if not check.passed]
    failures += [row.name for row in found.rows if row.failure and row.group != PEER]
    run.finish(skipped, failures, [], measured=bool(found.rows))


def _variants(flags: QualityFlags) -> list[Variant]:
    """The variants of the sweep, after the user's own presets."""
    own = [Variant(p.name, "preset", p, is_preset=True) for p in map(load_preset, flags.presets or ())]
    taken = {variant.name for variant in own}
    return [*own, *(variant for variant in variants(flags.sweep) if variant.name not in taken)]


def _settings(
    flags: QualityFlags,
    clip: request.ModelShape,
    texts: tuple[str, ...],
    compared: Sequence[Variant],
    run: ProfileRun,
) -> QualitySettings:
    from vmonarch_cli.profile.quality import QualitySettings

    defaults = clip.entry.defaults
    return QualitySettings(
        entry=clip.entry,
        source=clip.source,
        device=run.device,
        dtype=run.dtype,
        height=clip.height,
        width=clip.width,
        num_frames=clip.num_frames,
        steps=flags.steps or defaults.steps,
        guidance_scale=defaults.guidance_scale if flags.guidance_scale is None else flags.guidance_scale,
        flow_shift=flags.flow_shift or defaults.flow_shift,
        prompts=texts,
        batch=flags.batch or (16 if run.on_gpu else 1),
        variants=compared,
        sweep=flags.sweep,
        seed=run.seed,
    )


def _recorded(settings: QualitySettings) -> dict[str, object]:
    """The settings as the record keeps them."""
    return {
        "model": settings.entry.alias,
        "sweep": settings.sweep,
        "steps": settings.steps,
        "guidance_scale": settings.guidance_scale,
        "flow_shift": settings.flow_shift,
        "batch": settings.batch,
        "seed": settings.seed,
        "variants": {v.name: v.preset.model_dump() for v in settings.variants},
        "tuned": {v.name: v.tuned.facts() for v in settings.variants if v.tuned is not None},
    }
