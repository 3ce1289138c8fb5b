"""`vmonarch profile kernel | model | quality`: parse, measure, print. Beside app.py the only place that prints."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.status import Status

from vmonarch_cli.cli import profile_request as request
from vmonarch_cli.cli import profile_tables as tables
from vmonarch_cli.cli.options import ATTENTION, MODEL, OUTPUT, SAMPLING, SHAPE, number_option, option, whole_option
from vmonarch_cli.errors import EXIT_CLIP_FAILED, InputError
from vmonarch_cli.plan import checks
from vmonarch_cli.presets import load_preset
from vmonarch_cli.profile.plot import check_plot, plot_kernel, plot_model, plot_quality
from vmonarch_cli.profile.record import Machine, Recorder, check_target, this_machine
from vmonarch_cli.profile.remember import remember_profile
from vmonarch_cli.profile.results import Check, KernelShape, ModelProfile, QualityProfile, StepRow
from vmonarch_cli.profile.variants import SWEEPS, Variant, variants
from vmonarch_cli.text import near, shown

FAIL_BELOW_PRESET = "paper"

Presets = Annotated[
    list[str] | None,
    option("--preset", panel=ATTENTION, help="Name or .toml file of a preset to measure (repeatable)."),
]
Model = Annotated[
    str | None,
    option("--model", "-m", panel=MODEL, help="Alias, hub id or local diffusers folder. Default: the demo model."),
]
Size = Annotated[str | None, option("--size", panel=SHAPE, help="WIDTHxHEIGHT in pixels, as in 832x480.")]
Height = Annotated[int | None, whole_option("--height", panel=SHAPE, help="Height in pixels.")]
Width = Annotated[int | None, whole_option("--width", panel=SHAPE, help="Width in pixels.")]
NumFrames = Annotated[int | None, whole_option("--num-frames", panel=SHAPE, help="Frames of the clip.")]
Guidance = Annotated[
    float | None, number_option("--guidance-scale", panel=SAMPLING, help="1 is off: one forward per step.")
]
FlowShift = Annotated[float | None, number_option("--flow-shift", panel=SAMPLING, help="Timestep shift.")]
Seed = Annotated[int | None, whole_option("--seed", panel=SAMPLING, help="Seed of all random numbers. Default: 0.")]
DeviceName = Annotated[str | None, option("--device", panel=OUTPUT, help="auto, cpu, cuda or cuda:N.")]
DtypeName = Annotated[str | None, option("--dtype", panel=OUTPUT, help="auto, float32, bfloat16 or float16.")]
Seconds = Annotated[
    float | None,
    number_option(
        "--seconds", panel=OUTPUT, help="Wall-clock budget; what does not fit is left out and named in the record."
    ),
]
Json = Annotated[
    str | None, option("--json", panel=OUTPUT, metavar="FILE|-", help="Write a record; - prints it and nothing else.")
]
Plot = Annotated[str | None, option("--plot", panel=OUTPUT, metavar="FILE", help="Draw a plot, .png or .svg.")]
Debug = Annotated[bool, option("--debug", panel=OUTPUT, help="Show tracebacks.")]

profile_app = typer.Typer(
    help="Measure attention alone, whole model steps, or accuracy against cost.",
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


@profile_app.callback()
def profile(context: typer.Context) -> None:
    """Measure attention alone, whole model steps, or accuracy against cost, on this machine."""
    if context.invoked_subcommand is None:
        Console(highlight=False, soft_wrap=True).print(context.get_help(), markup=False)


@profile_app.command("kernel")
def profile_kernel(
    shape: Annotated[
        list[str] | None,
        option("--shape", panel=SHAPE, metavar="TxP", help="Latent frames x positions per frame (repeatable)."),
    ] = None,
    heads: Annotated[int | None, whole_option("--heads", panel=SHAPE, help="Attention heads.")] = None,
    head_dim: Annotated[int | None, whole_option("--head-dim", panel=SHAPE, help="Dimension of a head.")] = None,
    batch: Annotated[int | None, whole_option("--batch", panel=SHAPE, help="Clips in one call. Default: 1.")] = None,
    inputs: Annotated[
        str, option("--inputs", panel=SHAPE, help="video (correlated as a video's tokens are; default) or random.")
    ] = "video",
    presets: Presets = None,
    impl: Annotated[
        str | None, option("--impl", panel=ATTENTION, help="auto, reference, torch or triton; never falls back.")
    ] = None,
    fail_below: Annotated[
        float | None,
        number_option(
            "--fail-below",
            panel=ATTENTION,
            help="Exit 1 when the speedup of paper (or of each --preset) over the fastest dense backend is less.",
        ),
    ] = None,
    repeats: Annotated[int | None, whole_option("--repeats", panel=SAMPLING, help="Timed rounds per shape.")] = None,
    seed: Seed = None,
    device: DeviceName = None,
    dtype: DtypeName = None,
    seconds: Seconds = None,
    as_json: Json = None,
    plot: Plot = None,
    debug: Debug = False,
) -> None:
    """Time attention alone: every preset against every dense backend of this machine, checked in the same run."""
    asked_shapes = request.shapes(shape or ())
    chosen = request.presets(presets, request.all_structured(), impl)
    if inputs not in ("video", "random"):
        raise InputError(f"--inputs takes video or random, got {shown(inputs)}")
    checks.whole("--heads", heads, 1, 256)
    checks.whole("--head-dim", head_dim, 16, 256)
    checks.whole("--batch", batch, 1, 64)
    checks.whole("--repeats", repeats, 1, 1000)
    run = _Run("kernel", device, dtype, seed, seconds, as_json, plot, fail_below)

    from vmonarch_cli.profile import kernel
    from vmonarch_cli.profile.inputs import IN_WORDS

    on_gpu = run.device.type == "cuda"
    default_heads, default_dim = kernel.HEADS_GPU if on_gpu else kernel.HEADS_CPU
    settings = kernel.KernelSettings(
        device=run.device,
        dtype=run.dtype,
        heads=heads or default_heads,
        head_dim=head_dim or default_dim,
        batch=batch or 1,
        presets=chosen,
        repeats=repeats or (kernel.REPEATS_GPU if on_gpu else kernel.REPEATS_CPU),
        inputs=inputs,  # type: ignore[arg-type]
        seed=run.seed,
    )
    size = f"batch {settings.batch}, {settings.heads} heads x {settings.head_dim}"
    run.start(
        {
            "heads": settings.heads,
            "head_dim": settings.head_dim,
            "batch": settings.batch,
            "inputs": inputs,
            "repeats": settings.repeats,
            "presets": [preset.model_dump() for preset in chosen],
        },
        size,
    )
    with run.working():
        chip = run.measure_chip()
        done: list[KernelShape] = []

        def on_shape(measured: KernelShape) -> None:
            done.append(measured)
            run.save(shapes=[one.to_json() for one in done])
            run.show(lambda width: tables.kernel_table(measured, run.caption, width))
            if run.plot is not None:
                plot_kernel(done, run.caption, run.plot)

        wanted = asked_shapes or (kernel.SHAPES_GPU if on_gpu else kernel.SHAPES_CPU)
        _, skipped = kernel.run_kernel(settings, chip, wanted, run.budget, on_shape, run.work)
    run.show(lambda width: tables.kernel_legend(chip, IN_WORDS[settings.inputs]))
    failures = [f"{row.name} at {s.frames}x{s.positions}" for s in done for row in s.rows if not row.passed]
    guarded = [preset.name for preset in chosen] if presets else [FAIL_BELOW_PRESET]
    slow = _too_slow_kernels(done, guarded, fail_below)
    run.finish(skipped, failures, slow, measured=bool(done))


@profile_app.command("model")
def profile_model(
    model: Model = None,
    random_weights: Annotated[
        bool,
        option("--random-weights", panel=MODEL, help="Build the true transformer with random weights; load nothing."),
    ] = False,
    prompt: Annotated[str | None, option("--prompt", "-p", panel=MODEL, help="What the clip should show.")] = None,
    size: Size = None,
    height: Height = None,
    width: Width = None,
    num_frames: NumFrames = None,
    steps: Annotated[
        int | None, whole_option("--steps", panel=SAMPLING, help="Denoising steps to measure, of the model's own.")
    ] = None,
    guidance_scale: Guidance = None,
    flow_shift: FlowShift = None,
    presets: Presets = None,
    backend: Annotated[
        list[str] | None,
        option(
            "--backend",
            panel=ATTENTION,
            help="Dense backend to compare with: cudnn, flash, efficient or math (repeatable). Default: all fast ones.",
        ),
    ] = None,
    compile_: Annotated[
        bool, option("--compile", panel=ATTENTION, help="Compile the transformer's blocks, for every row alike.")
    ] = False,
    fail_below: Annotated[
        float | None,
        number_option(
            "--fail-below", panel=ATTENTION, help="Exit 1 when a preset's speedup on a step over dense is less."
        ),
    ] = None,
    seed: Seed = None,
    device: DeviceName = None,
    dtype: DtypeName = None,
    seconds: Seconds = None,
    as_json: Json = None,
    plot: Plot = None,
    debug: Debug = False,
) -> None:
    """Time whole denoising steps, dense and structured in turn on the same inputs, and say whether it is worth it."""
    shape = request.model_shape(model, size, height, width, num_frames, random_weights)
    chosen = request.presets(presets, (shape.entry.defaults.preset,))
    backends = request.backends(backend)
    checks.whole("--steps", steps, 1, 1000)
    checks.number("--guidance-scale", guidance_scale, 0, 100)
    checks.number("--flow-shift", flow_shift, 0.01, 100)
    run = _Run("model", device, dtype, seed, seconds, as_json, plot, fail_below)

    from vmonarch_cli.profile.model import ModelSettings, run_model

    defaults = shape.entry.defaults
    settings = ModelSettings(
        entry=shape.entry,
        source=shape.source,
        random_weights=random_weights,
        device=run.device,
        dtype=run.dtype,
        height=shape.height,
        width=shape.width,
        num_frames=shape.num_frames,
        guidance_scale=defaults.guidance_scale if guidance_scale is None else guidance_scale,
        flow_shift=flow_shift or defaults.flow_shift or 1.0,
        clip_steps=defaults.steps,
        steps=steps or min(defaults.steps, 5),
        presets=chosen,
        compile=compile_,
        prompt=checks.prompt(prompt or checks.EXAMPLE_PROMPT),
        seed=run.seed,
        backends=backends,
    )
    if backends and run.device.type != "cuda":
        raise InputError(f"--backend chooses among a GPU's backends, and the device is {run.device}: leave it out")
    run.start(
        {
            "model": shape.entry.alias,
            "random_weights": random_weights,
            "guidance_scale": settings.guidance_scale,
            "flow_shift": settings.flow_shift,
            "steps": settings.steps,
            "compile": compile_,
            "presets": [preset.model_dump() for preset in chosen],
        },
        "",
    )

    def on_result(found: ModelProfile, verified: list[Check], lengths: list[KernelShape]) -> None:
        run.save(
            model=found.to_json(),
            lengths=[length.to_json() for length in lengths],
            checks=[check.to_json() for check in verified],
            verdicts=tables.verdicts(found),
        )

    with run.working():
        chip = run.measure_chip()
        found, verified, _ = run_model(settings, chip, run.budget, on_result, run.work)
    run.show(lambda columns: tables.model_table(found, run.caption, columns))
    if run.plot is not None:
        plot_model(found, run.caption, run.plot)
    failures = [f"{check.against}: error {check.error:.2g}" for check in verified if not check.passed]
    failures += [row.name for row in found.rows if row.failure and row.kind == "structured"]
    slow = _too_slow_steps(found, fail_below)
    if not failures:
        from vmonarch_cli.pipeline.device import dtype_name

        dtype = dtype_name(run.dtype)
        remember_profile(found, shape.entry, shape.source, chosen, str(run.device), dtype)
    run.finish([], failures, slow, measured=any(row.step for row in found.rows))


@profile_app.command("quality")
def profile_quality(
    model: Model = None,
    prompt: Annotated[
        list[str] | None, option("--prompt", "-p", panel=MODEL, help="What a clip should show (repeatable).")
    ] = None,
    prompts: Annotated[
        int | None, whole_option("--prompts", panel=MODEL, help="How many of the held-out prompts. Default: 4.")
    ] = None,
    size: Size = None,
    height: Height = None,
    width: Width = None,
    num_frames: NumFrames = None,
    steps: Annotated[int | None, whole_option("--steps", panel=SAMPLING, help="Denoising steps of a clip.")] = None,
    guidance_scale: Guidance = None,
    flow_shift: FlowShift = None,
    batch: Annotated[
        int | None, whole_option("--batch", panel=SAMPLING, help="Clips made together. Default: 16 on a GPU, else 1.")
    ] = None,
    sweep: Annotated[
        str,
        option("--sweep", panel=ATTENTION, help="quick (the presets), full (every field) or paper (its ablation)."),
    ] = "quick",
    presets: Annotated[
        list[str] | None,
        option("--preset", panel=ATTENTION, help="A further preset or .toml file to compare (repeatable)."),
    ] = None,
    seed: Seed = None,
    device: DeviceName = None,
    dtype: DtypeName = None,
    seconds: Seconds = None,
    as_json: Json = None,
    plot: Plot = None,
    debug: Debug = False,
) -> None:
    """Set accuracy against cost: the same prompts and seeds with every variant, against dense attention."""
    if sweep not in SWEEPS:
        raise InputError(f"--sweep takes {', '.join(SWEEPS)}, got {shown(sweep)}{near(sweep, SWEEPS)}")
    shape = request.model_shape(model, size, height, width, num_frames, False)
    checks.whole("--prompts", prompts, 1, 1000)
    checks.whole("--steps", steps, 1, 1000)
    checks.whole("--batch", batch, 1, 64)
    checks.number("--guidance-scale", guidance_scale, 0, 100)
    checks.number("--flow-shift", flow_shift, 0.01, 100)
    texts = request.prompts(shape.entry, prompt, prompts or 4)
    extra = [Variant(p.name, "preset", p, is_preset=True) for p in map(load_preset, presets or ())]
    run = _Run("quality", device, dtype, seed, seconds, as_json, plot, None)

    from vmonarch_cli.profile.quality import QualitySettings, run_quality

    defaults = shape.entry.defaults
    settings = QualitySettings(
        entry=shape.entry,
        source=shape.source,
        device=run.device,
        dtype=run.dtype,
        height=shape.height,
        width=shape.width,
        num_frames=shape.num_frames,
        steps=steps or defaults.steps,
        guidance_scale=defaults.guidance_scale if guidance_scale is None else guidance_scale,
        flow_shift=flow_shift or defaults.flow_shift,
        prompts=texts,
        batch=batch or (16 if run.device.type == "cuda" else 1),
        variants=[*extra, *(v for v in variants(sweep) if v.name not in {e.name for e in extra})],
        sweep=sweep,
        seed=run.seed,
    )
    run.start(
        {
            "model": shape.entry.alias,
            "sweep": sweep,
            "steps": settings.steps,
            "guidance_scale": settings.guidance_scale,
            "flow_shift": settings.flow_shift,
            "batch": settings.batch,
            "seed": run.seed,
            "variants": {v.name: v.preset.model_dump() for v in settings.variants},
        },
        "",
    )

    def on_result(found: QualityProfile, verified: list[Check]) -> None:
        run.save(quality=found.to_json(), checks=[check.to_json() for check in verified])

    with run.working():
        found, verified, skipped = run_quality(settings, run.budget, on_result, run.work)
    run.show(lambda columns: tables.quality_table(found, run.caption, columns))
    if run.plot is not None and found.rows:
        plot_quality(found, run.caption, run.plot)
    failures = [f"{check.against}: error {check.error:.2g}" for check in verified if not check.passed]
    failures += [row.name for row in found.rows if row.failure]
    run.finish(skipped, failures, [], measured=bool(found.rows))


class _Run:
    """What the three commands share: machine, budget, record, and how results and errors are told."""

    def __init__(
        self,
        kind: str,
        device: str | None,
        dtype: str | None,
        seed: int | None,
        seconds: float | None,
        json_target: str | None,
        plot: str | None,
        fail_below: float | None,
    ) -> None:
        """Checks the flags that all share; from here on torch is imported."""
        checks.device(device)
        dtype = checks.dtype(dtype)
        checks.number("--seconds", seconds, 1, 1e6)
        checks.number("--fail-below", fail_below, 0, 1e6)
        self.seed = checks.whole("--seed", seed, 0, 2**63 - 1) or 0
        check_target(json_target)
        self.plot: Path | None = check_plot(plot)

        from vmonarch_cli.pipeline.device import pick_device, pick_dtype
        from vmonarch_cli.profile.repeat import Budget

        self.budget = Budget(seconds)
        self.device = pick_device(device or "auto")
        self.dtype = pick_dtype(dtype or "auto", self.device)
        self.caption = ""
        self._kind = kind
        self._target = json_target
        self._silent = json_target == "-"
        self._out = Console(highlight=False, soft_wrap=False)
        self._errors = Console(stderr=True, highlight=False, soft_wrap=True)
        self._status: Status | None = None
        self._record: Recorder | None = None
        self._began = time.monotonic()

    def start(self, settings: dict[str, Any], size: str) -> None:
        """Open the record; `size` goes into every caption."""
        machine: Machine = this_machine(self.device)
        from vmonarch_cli.pipeline.device import dtype_name

        dtype = dtype_name(self.dtype)
        self.caption = ", ".join(part for part in (machine.caption(), dtype, size) if part)
        settings = {"dtype": dtype, "seed": self.seed, "seconds": self.budget.seconds, **settings}
        self._record = Recorder(self._kind, self._target, machine, settings)
        self._record.save()

    def working(self) -> Status:
        """A spinner on a terminal; elsewhere `work` writes plain lines."""
        self._status = self._errors.status("starting")
        return self._status

    def work(self, words: str) -> None:
        """Say what is going on, on stderr."""
        line = f"[{time.monotonic() - self._began:.0f} s] {words}"
        if self._status is not None and self._errors.is_terminal:
            self._status.update(line.replace("[", r"\["))
        else:
            self._errors.print(line, markup=False)

    def measure_chip(self) -> Any:
        from vmonarch_cli.profile.chip import measure_chip

        self.work("what the chip can do")
        chip = measure_chip(self.device, self.dtype)
        self.save(chip={"flops_per_s": chip.flops_per_s, "bytes_per_s": chip.bytes_per_s})
        return chip

    def save(self, **fields: Any) -> None:
        if self._record is not None:
            self._record.save(**fields)

    def show(self, table: Callable[[int], RenderableType]) -> None:
        """Print to stdout, unless that is kept for the record; `table` gets the width of the terminal."""
        if not self._silent:
            self._out.print(table(self._out.width))

    def finish(
        self, skipped: Sequence[dict[str, str]], failures: Sequence[str], slow: Sequence[str], *, measured: bool
    ) -> None:
        """Close the record, tell what went wrong, and exit 1 when something did."""
        problems = [f"check failed: {words}" for words in failures] + list(slow)
        if not measured:
            problems.append("nothing was measured")
        if self._record is not None:
            self.save(skipped=list(skipped), problems=problems)
            self._record.finish(checks_passed=measured and not failures)
            if self._silent:
                typer.echo(self._record.text(), nl=False)
        for left_out in skipped:
            self._errors.print(
                f"warning: {left_out['what']} was left out: {left_out['why']}", style="yellow", markup=False
            )
        for sentence in problems:
            self._errors.print(f"error: {sentence}", style="red", markup=False)
        if problems:
            raise typer.Exit(EXIT_CLIP_FAILED)


def _too_slow_kernels(done: Sequence[KernelShape], names: Sequence[str], least: float | None) -> list[str]:
    found = []
    for shape in done if least is not None else ():
        for name in names:
            row, fastest = shape.row(name), shape.fastest_dense
            gain = shape.speedup(row, fastest) if row is not None else None
            at = f"at {shape.frames}x{shape.positions}"
            if gain is None or fastest is None:
                found.append(f"--fail-below {least:g}: {name} has no speedup {at}")
            elif least is not None and gain < least:
                found.append(f"--fail-below {least:g}: {name} is {gain:.2f}x {fastest.name} {at}")
    return found


def _too_slow_steps(found: ModelProfile, least: float | None) -> list[str]:
    def sentence(row: StepRow) -> str | None:
        gain = found.speedup(row)
        if gain is None:
            return f"--fail-below {least:g}: {row.name} has no speedup"
        return (
            f"--fail-below {least:g}: {row.name} is {gain:.2f}x dense" if least is not None and gain < least else None
        )

    rows = [row for row in found.rows if row.kind == "structured" and row.note != "cold"]
    return [words for row in rows if (words := sentence(row))] if least is not None else []
