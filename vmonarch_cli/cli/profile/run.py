"""What the three profiles share: the machine, the time that is left, the record, and how results and errors appear."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import RenderableType
from rich.status import Status
from rich.text import Text

from vmonarch_cli.cli.output import Output
from vmonarch_cli.cli.profile.flags import RunFlags
from vmonarch_cli.errors import EXIT_CLIP_FAILED
from vmonarch_cli.plan import checks
from vmonarch_cli.profile.plot import check_plot
from vmonarch_cli.profile.record import Recorder, check_target, this_machine
from vmonarch_cli.profile.results import ChipPeak
from vmonarch_cli.text import clock


class ProfileRun:
    """One run of a profile."""

    def __init__(self, kind: str, flags: RunFlags, fail_below: float | None = None) -> None:
        """Checks the flags that all share, then the device; from here on torch is imported.

        A command has checked its own flags before: what no machine can do is said before what this one lacks.
        """
        checks.device(flags.device)
        dtype = checks.dtype(flags.dtype)
        checks.number("--seconds", flags.seconds, 1, 1e6)
        checks.number("--fail-below", fail_below, 0, 1e6)
        self.seed = checks.whole("--seed", flags.seed, 0, 2**63 - 1) or 0
        check_target(flags.as_json, flags.overwrite)
        self.plot: Path | None = check_plot(flags.plot, flags.overwrite)

        from vmonarch_cli.pipeline.device import dtype_name, pick_device, pick_dtype
        from vmonarch_cli.profile.repeat import Budget

        self.budget = Budget(flags.seconds)
        self.device = pick_device(flags.device or "auto")
        self.dtype = pick_dtype(dtype or "auto", self.device)
        self.dtype_name = dtype_name(self.dtype)
        self.caption = ""
        self._kind = kind
        self._target = flags.as_json
        self._out = Output(as_json=flags.as_json == "-")
        self._status: Status | None = None
        self._record: Recorder | None = None
        self._began = time.monotonic()

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    def start(self, settings: Mapping[str, Any], size: str) -> None:
        """Open the record; `size` goes into every caption."""
        machine = this_machine(self.device)
        self.caption = ", ".join(part for part in (machine.caption(), self.dtype_name, size) if part)
        common = {"dtype": self.dtype_name, "seed": self.seed, "seconds": self.budget.seconds}
        self._record = Recorder(self._kind, self._target, machine, {**common, **settings})
        self._record.save()

    def working(self) -> Status:
        """A spinner on a terminal; elsewhere `work` writes plain lines."""
        self._status = self._out.spinner("starting")
        return self._status

    def work(self, words: str, left: float | None = None) -> None:
        """Say what is going on, on stderr; `left`: seconds until this part of the profile is done."""
        line = f"[{time.monotonic() - self._began:.0f} s] {words}"
        if left is not None:
            line += f", about {clock(left)} left"
        if self._status is not None and self._out.stderr.is_terminal:
            self._status.update(Text(line))
        else:
            self._out.insist(line)

    def measure_chip(self) -> ChipPeak:
        """What the chip can do, measured now and kept in the record."""
        from vmonarch_cli.profile.chip import measure_chip

        self.work("what the chip can do")
        chip = measure_chip(self.device, self.dtype)
        self.save(chip={"flops_per_s": chip.flops_per_s, "bytes_per_s": chip.bytes_per_s})
        return chip

    def save(self, **fields: Any) -> None:
        """Update fields of the record and its file."""
        if self._record is not None:
            self._record.save(**fields)

    def warn(self, sentences: Sequence[str]) -> None:
        """Say what will work less well than the user may expect."""
        self._out.warn(*sentences)

    def show(self, table: Callable[[int], RenderableType]) -> None:
        """Print to stdout, unless that is kept for the record; `table` gets the width of the terminal."""
        self._out.show(table)

    def finish(
        self, skipped: Sequence[dict[str, str]], failures: Sequence[str], slow: Sequence[str], *, measured: bool
    ) -> None:
        """Close the record, name what went wrong, and exit 1 when something did."""
        problems = [f"check failed: {words}" for words in failures] + list(slow)
        if not measured:
            problems.append("nothing was measured")
        if self._record is not None:
            self.save(skipped=list(skipped), problems=problems)
            self._record.finish(checks_passed=measured and not failures)
            if self._out.as_json:
                self._out.text(self._record.text())
        self._out.warn(*(f"{left_out['what']} was left out: {left_out['why']}" for left_out in skipped))
        self._out.error(*problems)
        if problems:
            raise typer.Exit(EXIT_CLIP_FAILED)
