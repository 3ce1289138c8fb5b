"""Make the records of kernels/bench/results on the machine at hand, one after another, in the time that there is.

    python tests/bench/records.py --seconds 1500          # all that are missing in --out
    python tests/bench/records.py kernel quality-demo     # these
    python tests/bench/records.py --list

records.toml says how each is made. A record that is there and whose checks passed is kept, so that the same command
goes on where it was stopped. What fails, or does not fit into the time, is said and left out; what each command prints
is in a .log beside its record. Records that shall be cited move to kernels/bench/results (see CONTRIBUTING.md).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[2]
LIST = Path(__file__).with_suffix(".toml")
_PROGRAMS = {"vmonarch": "{python} -m vmonarch_cli", "torchrun": "{python} -m torch.distributed.run"}
"""Commands of this environment, whose folder of programs need not be on the PATH."""


@dataclass(frozen=True)
class Entry:
    """How a record is made."""

    name: str
    command: str
    seconds: float
    """The whole command may take."""
    gpus: int = 1
    weights: str | None = None
    """A model that is written first, with random weights."""
    package: str | None = None
    """Without it the record would be another one."""

    def file(self, chip: str) -> str:
        """Of the record: h200-kernel.json, h200x2-scaling.json."""
        return f"{chip}{f'x{self.gpus}' if self.gpus > 1 else ''}-{self.name}.json"

    def arguments(self, target: Path, work: Path, models: Path) -> list[str]:
        """The command as a process takes it."""
        program, _, rest = self.command.partition(" ")
        values = {
            "python": sys.executable,
            "json": str(target),
            "work": str(work),
            "models": str(models),
            "weights": str(models / str(self.weights)),
        }
        whole = f"{_PROGRAMS.get(program, program)} {rest} --json {{json}}"
        return [word.format(**values) for word in shlex.split(whole)]


def entries() -> dict[str, Entry]:
    """By name, in the order of the file."""
    return {name: Entry(name, **fields) for name, fields in tomllib.loads(LIST.read_text(encoding="utf-8")).items()}


def chip_of(device: str) -> str:
    """The first word of a record's file, of a GPU's name: "NVIDIA H100 80GB HBM3" is h100."""
    words = re.findall(r"[a-z]*\d+[a-z]*", device.lower())
    return words[0] if words else "gpu"


def is_good(path: Path) -> bool:
    """Whether a record is there, of a run that ended and whose checks passed."""
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("checks_passed") is True
    except (OSError, ValueError):
        return False


def made(wanted: Mapping[str, Entry], out: Path, seconds: float) -> Iterator[tuple[str, str]]:
    """(name, what became of it) of each record, as it comes."""
    import torch

    cards, began = torch.cuda.device_count(), time.monotonic()
    if not cards:
        sys.exit("these records are of a GPU, and torch sees none here")
    chip = chip_of(torch.cuda.get_device_name())
    for name, entry in wanted.items():
        target, left = out / entry.file(chip), seconds - (time.monotonic() - began)
        if is_good(target):
            yield name, "is there"
        elif entry.gpus > cards:
            yield name, f"left out: {entry.gpus} GPUs are needed, {cards} here"
        elif entry.package is not None and not _is_installed(entry.package):
            yield name, f"left out: {entry.package} is not installed"
        elif left < entry.seconds:
            yield name, f"left out: {left:.0f} s are left, and it may take {entry.seconds:.0f} s"
        else:
            yield name, _make(entry, target, out / "models")


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def _make(entry: Entry, target: Path, models: Path) -> str:
    """Run a record's command; what came of it, in words."""
    work = target.with_suffix(".work")
    shutil.rmtree(work, ignore_errors=True)  # it and the record are of a run that failed
    target.unlink(missing_ok=True)
    models.mkdir(exist_ok=True)
    began, log = time.monotonic(), target.with_suffix(".log")
    commands = [entry.arguments(target, work, models)]
    if entry.weights is not None:
        model = ["--model", entry.weights, "--out", str(models / entry.weights)]
        commands.insert(0, [sys.executable, "tests/bench/random_model.py", *model])
    with log.open("w", encoding="utf-8") as output:
        for command in commands:
            try:
                code = _run(command, output, entry.seconds - (time.monotonic() - began))
            except subprocess.TimeoutExpired:
                return f"stopped after {entry.seconds:.0f} s, see {log}"
            if code:
                return f"exit {code}, see {log}"
    took = f"{time.monotonic() - began:.0f} s"
    return f"made in {took}" if is_good(target) else f"its checks failed after {took}, see {log}"


def _run(command: Sequence[str], output: IO[str], limit: float) -> int:
    """The exit code of a command; after `limit` seconds it is killed with all that it started, which would be on the
    GPU beside the next one, and subprocess.TimeoutExpired is raised.
    """
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    ) as process:
        try:
            return process.wait(limit)
        finally:
            with contextlib.suppress(ProcessLookupError):  # none of them is left
                os.killpg(process.pid, signal.SIGKILL)


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="records to make; all by default")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "records", help="their folder")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no record that may take longer")
    parser.add_argument("--list", action="store_true", help="print the commands and make nothing")
    options = parser.parse_args()
    known = entries()
    if unknown := sorted(set(options.names) - set(known)):
        parser.error(f"no record is called {', '.join(unknown)}; --list prints all names")
    wanted = {name: entry for name, entry in known.items() if not options.names or name in options.names}
    if options.list:
        for entry in wanted.values():
            print(f"{entry.name} ({entry.seconds:.0f} s): {entry.command}")
        return 0
    out, failed = options.out.resolve(), False
    out.mkdir(parents=True, exist_ok=True)
    for name, words in made(wanted, out, options.seconds):
        print(f"{name}: {words}", flush=True)
        failed |= not words.startswith(("is there", "made"))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
