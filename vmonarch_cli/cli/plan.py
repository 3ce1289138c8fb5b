"""`vmonarch plan`: what `generate` would do with the same flags."""

from __future__ import annotations

from typing import Annotated, Any

from vmonarch_cli import __version__
from vmonarch_cli.cli import batch
from vmonarch_cli.cli.options import MEMORY, Debug, Shown, configured, number_option, takes_request
from vmonarch_cli.cli.output import Output
from vmonarch_cli.machine.torchrun import read_rank
from vmonarch_cli.plan.checks import number
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve
from vmonarch_cli.plan.small_calls_here import as_it_will_run


@takes_request()
def plan(
    request: GenerateRequest,
    shown: Shown,
    options: batch.PlannedBatchOptions,
    vram: Annotated[
        float | None,
        number_option("--vram", panel=MEMORY, help="GiB of another card: which offload modes fit it."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Print what `generate` would do with the same flags: settings and their origins, tokens, FLOPs, memory, time.

    No weight is loaded and nothing is written.
    """
    request = configured(request)
    number("--vram", vram, 0.5, 10_000)
    if options.prompts_file is not None:
        batch.run_prompts_file(
            request, batch.BatchOptions(**vars(options)), shown, dry_run=True, debug=debug, vram=vram
        )
        return
    out = shown.output(main=read_rank().is_main)
    resolved = resolve(request, needs_prompt=False)
    tell_notes(resolved, out)
    out.warn(*options.without_file())
    show_plan(resolved, out, vram)


def tell_notes(resolved: Plan, out: Output) -> None:
    """What the user should know before the work begins."""
    out.note(*resolved.notes)
    if resolved.seed_was_drawn:
        seed, count = resolved.seed, resolved.num_videos
        out.note(f"seed {seed} was drawn: --seed {seed} makes the same clip{'s' if count > 1 else ''}")
    out.warn(*resolved.warnings)


def show_plan(resolved: Plan, out: Output, vram: float | None = None) -> None:
    """A plan as a table, as JSON, or (quiet) as the paths that it would write; `vram`: GiB of another card."""
    from vmonarch_cli.cli.plan_tables import dry_run, estimates

    if out.as_json:
        out.json({"dry_run": True, **plan_json(resolved), **estimates(resolved, vram)})
    elif out.silent:
        out.paths(*resolved.outputs)
    else:
        out.show(dry_run(resolved, vram))


def plan_json(resolved: Plan) -> dict[str, Any]:
    """Every setting with its origin, and what follows from them."""
    expected = as_it_will_run(resolved)
    return {
        "version": __version__,
        "settings": resolved.settings(),
        "model_source": resolved.model_source,
        "tuned": None if resolved.tuned is None else resolved.tuned.facts(),
        **({} if resolved.tuned_note is None else {"tuned_note": resolved.tuned_note}),
        **({} if resolved.preset_reason is None else {"preset_reason": resolved.preset_reason}),
        "grid": list(resolved.grid),
        "tokens": resolved.tokens,
        "flops": expected.flops.model_dump(),
        "schedule": [row.model_dump() for row in expected.step_costs],
        "sigmas": None if resolved.noise_levels is None else list(resolved.noise_levels),
        "loras": [facts.model_dump() for facts in resolved.loras],
        "outputs": [str(path) for path in resolved.outputs],
        "warnings": list(resolved.warnings),
    }
