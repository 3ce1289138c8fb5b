"""The command line: parse, call, print. The only place that prints, and the only mapping from errors to exit codes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from vmonarch_cli import __version__
from vmonarch_cli.errors import EXIT_BAD_INPUT, EXIT_CLIP_FAILED, VmonarchError
from vmonarch_cli.options import ATTENTION, MODEL, OUTPUT, SAMPLING, SHAPE, number_option, option, whole_option
from vmonarch_cli.plan import GenerateRequest, Plan, resolve
from vmonarch_cli.presets import load_preset, read_preset, shipped_names
from vmonarch_cli.timing import ClipResult

EXIT_INTERRUPTED = 130


class OneSentenceGroup(TyperGroup):
    """Turns every error into one sentence on stderr and an exit code; `--debug` lets the traceback through."""

    def main(self, *args: Any, **extra: Any) -> Any:
        given = extra.get("args") or (args[0] if args else None)
        arguments = list(sys.argv[1:] if given is None else given)
        try:
            code = super().main(*args, **{**extra, "standalone_mode": False})
        except Exception as error:
            if "--debug" in arguments:
                raise
            sentence, code = _explain(error)
            _fail(sentence, code, as_json="--json" in arguments)
        if code == EXIT_INTERRUPTED:
            print("interrupted: no clip was left half-written", file=sys.stderr)
        sys.exit(code if isinstance(code, int) else 0)


def _explain(error: Exception) -> tuple[str, int]:
    """The one mapping from an exception to the sentence a user reads and the exit code."""
    if isinstance(error, VmonarchError):
        return error.message, error.exit_code
    if hasattr(error, "format_message"):  # typer's and click's usage errors
        return str(error.format_message()).rstrip("."), EXIT_BAD_INPUT
    if isinstance(error, MemoryError):
        return "out of memory: choose a smaller size, fewer frames or a narrower --dtype", EXIT_CLIP_FAILED
    first = (str(error).strip().splitlines() or ["no message"])[0]
    return f"unexpected {type(error).__name__}: {first} (--debug shows where)", EXIT_CLIP_FAILED


def _fail(sentence: str, code: int, as_json: bool) -> None:
    sentence = " ".join(sentence.split())
    print(f"error: {sentence}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": sentence, "exit_code": code}, ensure_ascii=False))


app = typer.Typer(
    cls=OneSentenceGroup,
    help="Text-to-video diffusion with Monarch-structured attention, and an honest table of what it cost.",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
presets_app = typer.Typer(help="List, show and check presets.", invoke_without_command=True)
app.add_typer(presets_app, name="presets")


def main() -> None:
    """Entry point of the `vmonarch` script."""
    app(prog_name="vmonarch")


def _version(value: bool) -> None:
    if value:
        print(f"vmonarch {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Print the help when no command is given."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def generate(
    prompt: Annotated[str | None, option("--prompt", "-p", panel=MODEL, help="What the clip should show.")] = None,
    negative_prompt: Annotated[
        str | None, option("--negative-prompt", panel=MODEL, help="What it should not show. Default: the model's own.")
    ] = None,
    model: Annotated[
        str | None,
        option("--model", "-m", panel=MODEL, help="Alias, hub id or local diffusers folder. Default: the demo model."),
    ] = None,
    size: Annotated[str | None, option("--size", panel=SHAPE, help="WIDTHxHEIGHT in pixels, as in 832x480.")] = None,
    height: Annotated[int | None, whole_option("--height", panel=SHAPE, help="Height in pixels.")] = None,
    width: Annotated[int | None, whole_option("--width", panel=SHAPE, help="Width in pixels.")] = None,
    num_frames: Annotated[int | None, whole_option("--num-frames", panel=SHAPE, help="Frames of the clip.")] = None,
    fps: Annotated[int | None, whole_option("--fps", panel=SHAPE, help="Frames per second of the file.")] = None,
    steps: Annotated[
        int | None, whole_option("--steps", "--num-inference-steps", panel=SAMPLING, help="Denoising steps.")
    ] = None,
    guidance_scale: Annotated[
        float | None,
        number_option("--guidance-scale", panel=SAMPLING, help="How strongly the prompt steers; 1 is off."),
    ] = None,
    guidance_scale_2: Annotated[
        float | None, number_option("--guidance-scale-2", panel=SAMPLING, help="The same for the second transformer.")
    ] = None,
    flow_shift: Annotated[
        float | None,
        number_option("--flow-shift", panel=SAMPLING, help="Timestep shift; higher spends steps on noise."),
    ] = None,
    seed: Annotated[
        int | None, whole_option("--seed", panel=SAMPLING, help="Seed of the first clip. Default: 0.")
    ] = None,
    num_videos: Annotated[
        int | None, whole_option("--num-videos", panel=SAMPLING, help="Clips to make, of seeds seed, seed + 1, ...")
    ] = None,
    preset: Annotated[
        str | None, option("--preset", panel=ATTENTION, help="Name or .toml file; `vmonarch presets` lists them.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        option("--set", panel=ATTENTION, metavar="FIELD=VALUE", help="Change a preset field (repeatable)."),
    ] = None,
    dense_steps: Annotated[
        int | None, whole_option("--dense-steps", panel=ATTENTION, help="First denoising steps to run dense.")
    ] = None,
    dense_layers: Annotated[
        int | None, whole_option("--dense-layers", panel=ATTENTION, help="First layers to run dense.")
    ] = None,
    impl: Annotated[
        str | None, option("--impl", panel=ATTENTION, help="auto, reference, torch or triton; never falls back.")
    ] = None,
    dense_every: Annotated[
        int | None,
        whole_option("--dense-every", panel=ATTENTION, help="Time dense attention too on every n-th step; 0 is never."),
    ] = None,
    device: Annotated[str | None, option("--device", panel=OUTPUT, help="auto, cpu, cuda or cuda:N.")] = None,
    dtype: Annotated[str | None, option("--dtype", panel=OUTPUT, help="auto, float32, bfloat16 or float16.")] = None,
    output: Annotated[
        str | None,
        option("--output", "-o", panel=OUTPUT, help="File (.mp4, .gif, .png for a folder of frames) or folder."),
    ] = None,
    overwrite: Annotated[bool, option("--overwrite", panel=OUTPUT, help="Replace files that exist.")] = False,
    as_json: Annotated[bool, option("--json", panel=OUTPUT, help="Print one JSON object and nothing else.")] = False,
    quiet: Annotated[bool, option("--quiet", "-q", panel=OUTPUT, help="Print only the paths.")] = False,
    dry_run: Annotated[
        bool, option("--dry-run", panel=OUTPUT, help="Print the resolved settings and their origins; load nothing.")
    ] = False,
    debug: Annotated[bool, option("--debug", panel=OUTPUT, help="Show tracebacks.")] = False,
) -> None:
    """Make clips from a prompt and print what the attention cost, step by step, against dense attention."""
    plan = resolve(
        GenerateRequest(
            model=model,
            prompt=prompt,
            negative_prompt=negative_prompt,
            size=size,
            height=height,
            width=width,
            num_frames=num_frames,
            fps=fps,
            steps=steps,
            guidance_scale=guidance_scale,
            guidance_scale_2=guidance_scale_2,
            flow_shift=flow_shift,
            seed=seed,
            num_videos=num_videos,
            preset=preset,
            overrides=tuple(overrides or ()),
            dense_steps=dense_steps,
            dense_layers=dense_layers,
            impl=impl,
            dense_every=dense_every,
            device=device,
            dtype=dtype,
            output=output,
            overwrite=overwrite,
        )
    )
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    for sentence in plan.notes if not (quiet or as_json) else ():
        errors.print(f"note: {sentence}", style="dim", markup=False)
    for sentence in plan.warnings:
        errors.print(f"warning: {sentence}", style="yellow", markup=False)
    if dry_run:
        _show_dry_run(plan, as_json, quiet)
    else:
        _run(plan, as_json, quiet)


def _show_dry_run(plan: Plan, as_json: bool, quiet: bool) -> None:
    if as_json:
        print(json.dumps({"dry_run": True, **_plan_json(plan)}, ensure_ascii=False, indent=2))
    elif quiet:
        print(*plan.outputs, sep="\n")
    else:
        from vmonarch_cli.listings import dry_run

        Console(highlight=False).print(dry_run(plan))


def _plan_json(plan: Plan) -> dict[str, Any]:
    return {
        "version": __version__,
        "settings": plan.settings(),
        "model_source": plan.model_source,
        "grid": list(plan.grid),
        "tokens": plan.tokens,
        "flops": plan.flops.model_dump(),
        "outputs": [str(path) for path in plan.outputs],
        "warnings": list(plan.warnings),
    }


def _run(plan: Plan, as_json: bool, quiet: bool) -> None:
    """Run a plan: the header first, a report per clip, the paths last."""
    from vmonarch_cli import report
    from vmonarch_cli.preflight import check_machine
    from vmonarch_cli.progress import RunProgress

    silent = as_json or quiet
    out = Console(highlight=False)
    machine = check_machine(plan)
    if not silent:
        out.print(report.header(plan, machine))

    def on_clip(result: ClipResult, load_s: float | None) -> None:
        if not silent:
            title = f"clip {result.index + 1} of {plan.num_videos}" if plan.num_videos > 1 else ""
            out.print(report.clip_report(result, load_s, title))

    from vmonarch_cli.run import generate as run_generate

    with RunProgress(Console(stderr=True, highlight=False), on_clip, quiet=silent) as progress:
        results = run_generate(plan, on_event=progress)
    if as_json:
        clips = [{"path": str(result.path), **result.record} for result in results]
        print(json.dumps({**_plan_json(plan), "clips": clips}, ensure_ascii=False, indent=2))
    else:
        for result in results:  # by print, so that a long path is never wrapped
            print(result.path)


@presets_app.callback()
def presets(context: typer.Context) -> None:
    """List the presets that come with vmonarch; `show NAME` and `check FILE` look at one."""
    if context.invoked_subcommand is None:
        from vmonarch_cli.listings import presets_table

        Console(highlight=False).print(presets_table([load_preset(name) for name in shipped_names()]))


@presets_app.command("show")
def presets_show(name: Annotated[str, typer.Argument(help="Name of a preset, or a .toml file.")]) -> None:
    """Show every field of a preset: value, unit, range and what it means."""
    from vmonarch_cli.listings import preset_table

    Console(highlight=False).print(preset_table(load_preset(name)))


@presets_app.command("check")
def presets_check(file: Annotated[Path, typer.Argument(help="A preset file.")]) -> None:
    """Check a preset file; exit 2 with one sentence when something in it is wrong."""
    preset = read_preset(file)
    print(f"{file} is valid: preset '{preset.name}'")


@app.command()
def models() -> None:
    """List the models that --model knows by name."""
    from vmonarch_cli.listings import models_table
    from vmonarch_cli.models.registry import ENTRIES

    Console(highlight=False).print(models_table(ENTRIES))
