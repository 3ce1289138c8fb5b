"""`vmonarch profile kernel`: attention alone, every preset against every dense backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from vmonarch_cli.cli.options import (
    ATTENTION,
    SAMPLING,
    SHAPE,
    Debug,
    number_option,
    option,
    takes_request,
    whole_option,
)
from vmonarch_cli.cli.profile import request
from vmonarch_cli.cli.profile.flags import Presets, RunFlags
from vmonarch_cli.cli.profile.kernel_table import kernel_legend, kernel_table
from vmonarch_cli.cli.profile.run import ProfileRun
from vmonarch_cli.errors import InputError
from vmonarch_cli.plan import checks
from vmonarch_cli.presets import Preset
from vmonarch_cli.profile.plot import plot_kernel
from vmonarch_cli.profile.results import KernelShape
from vmonarch_cli.text import counted, shown

if TYPE_CHECKING:
    from vmonarch_cli.profile.kernel import KernelSettings

FAIL_BELOW_PRESET = "paper"


@dataclass(frozen=True)
class KernelFlags:
    """What is measured, and on which tensors."""

    shape: Annotated[
        list[str] | None,
        option("--shape", panel=SHAPE, metavar="TxP", help="Latent frames x positions per frame (repeatable)."),
    ] = None
    heads: Annotated[int | None, whole_option("--heads", panel=SHAPE, help="Attention heads.")] = None
    head_dim: Annotated[int | None, whole_option("--head-dim", panel=SHAPE, help="Dimension of a head.")] = None
    batch: Annotated[int | None, whole_option("--batch", panel=SHAPE, help="Clips in one call. Default: 1.")] = None
    inputs: Annotated[
        str, option("--inputs", panel=SHAPE, help="video (correlated as a video's tokens are; default) or random.")
    ] = "video"
    presets: Presets = None
    impl: Annotated[
        str | None, option("--impl", panel=ATTENTION, help="auto, reference, torch or triton; never falls back.")
    ] = None
    fail_below: Annotated[
        float | None,
        number_option(
            "--fail-below",
            panel=ATTENTION,
            help="Exit 1 when the speedup of paper (or of each --preset) over the fastest dense backend is less.",
        ),
    ] = None
    repeats: Annotated[int | None, whole_option("--repeats", panel=SAMPLING, help="Timed rounds per shape.")] = None


@takes_request()
def kernel(flags: KernelFlags, where: RunFlags, debug: Debug = False) -> None:
    """Time attention alone: every preset against every dense backend of this machine, checked in the same run."""
    asked = request.shapes(flags.shape or ())
    chosen = request.presets(flags.presets, request.all_structured(), flags.impl)
    _check(flags)
    run = ProfileRun("kernel", where, flags.fail_below)

    from vmonarch_cli.profile.inputs import IN_WORDS
    from vmonarch_cli.profile.kernel import SHAPES_CPU, SHAPES_GPU, run_kernel

    settings = _settings(flags, chosen, run)
    run.start(_recorded(settings), f"batch {settings.batch}, {counted(settings.heads, 'head')} x {settings.head_dim}")
    done: list[KernelShape] = []

    def on_shape(measured: KernelShape) -> None:
        done.append(measured)
        run.save(shapes=[one.to_json() for one in done])
        run.show(lambda width: kernel_table(measured, run.caption, width))
        if run.plot is not None:
            plot_kernel(done, run.caption, run.plot)

    with run.working():
        chip = run.measure_chip()
        wanted = asked or (SHAPES_GPU if run.on_gpu else SHAPES_CPU)
        _, skipped = run_kernel(settings, chip, wanted, run.budget, on_shape, run.work)
    run.show(lambda width: kernel_legend(chip, IN_WORDS[settings.inputs]))
    failures = [f"{row.name} at {s.frames}x{s.positions}" for s in done for row in s.rows if not row.passed]
    guarded = [preset.name for preset in chosen] if flags.presets else [FAIL_BELOW_PRESET]
    run.finish(skipped, failures, _too_slow(done, guarded, flags.fail_below), measured=bool(done))


def _check(flags: KernelFlags) -> None:
    if flags.inputs not in ("video", "random"):
        raise InputError(f"--inputs takes video or random, got {shown(flags.inputs)}")
    checks.whole("--heads", flags.heads, 1, 256)
    checks.whole("--head-dim", flags.head_dim, 16, 256)
    checks.whole("--batch", flags.batch, 1, 64)
    checks.whole("--repeats", flags.repeats, 1, 1000)


def _settings(flags: KernelFlags, presets: Sequence[Preset], run: ProfileRun) -> KernelSettings:
    from vmonarch_cli.profile import kernel

    heads, head_dim = kernel.HEADS_GPU if run.on_gpu else kernel.HEADS_CPU
    return kernel.KernelSettings(
        device=run.device,
        dtype=run.dtype,
        heads=flags.heads or heads,
        head_dim=flags.head_dim or head_dim,
        batch=flags.batch or 1,
        presets=presets,
        repeats=flags.repeats or (kernel.REPEATS_GPU if run.on_gpu else kernel.REPEATS_CPU),
        inputs=flags.inputs,  # type: ignore[arg-type]
        seed=run.seed,
    )


def _recorded(settings: KernelSettings) -> dict[str, object]:
    """The settings as the record keeps them."""
    return {
        "heads": settings.heads,
        "head_dim": settings.head_dim,
        "batch": settings.batch,
        "inputs": settings.inputs,
        "repeats": settings.repeats,
        "presets": [preset.model_dump() for preset in settings.presets],
    }


def _too_slow(done: Sequence[KernelShape], names: Sequence[str], least: float | None) -> list[str]:
    if least is None:
        return []
    found = []
    for shape in done:
        for name in names:
            row, fastest = shape.row(name), shape.fastest_dense
            gain = shape.speedup(row, fastest) if row is not None else None
            at = f"at {shape.frames}x{shape.positions}"
            if gain is None or fastest is None:
                found.append(f"--fail-below {least:g}: {name} has no speedup {at}")
            elif gain < least:
                found.append(f"--fail-below {least:g}: {name} is {gain:.2f}x {fastest.name} {at}")
    return found
