"""What the program does, command by command, and whether it still does it.

    python tests/behaviour/record.py --check                 # every command, against tests/behaviour/expected/
    python tests/behaviour/record.py --check --exact         # and every pixel and number bit for bit
    python tests/behaviour/record.py --write                 # record everything anew
    python tests/behaviour/record.py --write --only 'errors: size*'   # record some entries, keep all others
    python tests/behaviour/record.py --list                  # names of all entries, as --only matches them

A change of structure should leave `--check --exact` without a difference against what the commit before it recorded.
A change of behaviour that is meant shows up as a diff of one or a few entries; record those with `--write --only` in
the same commit, so that the diff of `expected/` says what changed for users.

The record knows the program by its command line and by three public functions of `vmonarch_kernels`, and imports
nothing else of it. `commands.py` lists the commands, `running.py` runs them, `normalise.py` takes out what may vary
(times, rates, memory, versions, dates, paths, the machine), `kernel_outputs.py` calls the attention. Files of
`inputs/` are in the folder that a command runs in.

Each entry of `expected/GROUP.json` holds the command, its exit code, stdout, stderr and the files that it wrote.
`numbers` (accuracies, means of frames) are compared with a tolerance, as another CPU rounds differently; with
`--exact` they are compared as they are, and so are `exact`, the hashes of pixels and tensors, which hold for the
machine and the versions that recorded them. `environment.json` says which those were.

The test suite runs the quick entries (`--quick`); those marked `slow` in `commands.py` belong to its slow tests.
"""

from __future__ import annotations

import argparse
import difflib
import fnmatch
import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import running
from commands import everything
from normalise import record
from running import HERE, Command

EXPECTED = HERE / "expected"
KERNELS = "kernels"
ENVIRONMENT = "environment"
WIDTH = 140
"""Columns that a value may take on one line of `expected/`."""
RELATIVE, ABSOLUTE, PIXEL, TOP_PSNR = 0.05, 2e-4, 2.0, 60.0
"""Tolerances of `numbers`: relative, absolute, of a frame's mean colour or spread, and the PSNR from which frames are
equal to the eye."""

Records = dict[str, dict[str, dict[str, Any]]]
"""Group -> name -> record."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as the flags say; 0 where nothing differs."""
    flags = _parser().parse_args(arguments)
    chosen = [command for command in everything() if not (flags.quick and command.slow)]
    if flags.list:
        print(*(_title(command.group, command.name) for command in chosen), sep="\n")
        return 0
    print(f"program: {_package()}", file=sys.stderr)
    began = time.monotonic()
    found = _record(chosen, flags)
    print(f"{sum(map(len, found.values()))} entries in {time.monotonic() - began:.0f} s", file=sys.stderr)
    if flags.write:
        _write(found, keep=bool(flags.only) or flags.quick)
        return 0
    differences = compare(found, read_expected(), flags.exact)
    if not (flags.only or flags.quick):
        differences |= _missing(found)
    if flags.report:
        report = {"entries": {group: list(entries) for group, entries in found.items()}, "differences": differences}
        Path(flags.report).write_text(json.dumps(report))
    for lines in differences.values():
        print("\n".join(lines))
    print(f"{len(differences)} entries differ" if differences else "no difference")
    return 1 if differences else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", action="store_true", help="record what the program does now")
    what.add_argument("--check", action="store_true", help="compare with the record; print a unified diff, exit 1")
    what.add_argument("--list", action="store_true", help="print the names of all entries")
    parser.add_argument("--exact", action="store_true", help="compare hashes and numbers too, bit for bit")
    parser.add_argument("--only", action="append", metavar="PATTERN", help="entries by 'group: name', with * and ?")
    parser.add_argument("--quick", action="store_true", help="leave the slow entries out")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="commands at a time")
    parser.add_argument("--spawn", action="store_true", help="start an interpreter for every command")
    parser.add_argument("--report", metavar="FILE", help="write the differences as JSON")
    return parser


def compare(found: Records, expected: Records, exact: bool) -> dict[str, list[str]]:
    """Title of each entry that differs -> its unified diff."""
    differences = {}
    for group, entries in found.items():
        for name, entry in entries.items():
            title = _title(group, name)
            before = expected.get(group, {}).get(name)
            if before is None:
                differences[title] = [f"--- {title}", "+ is not in the record"]
                continue
            lines = list(
                difflib.unified_diff(
                    _lines(before, exact),
                    _lines(entry if exact else _aligned(entry, before), exact),
                    f"{title} (recorded)",
                    f"{title} (now)",
                    lineterm="",
                )
            )
            if lines:
                differences[title] = lines
    return differences


def read_expected() -> Records:
    """Everything that was recorded."""
    files = [path for path in sorted(EXPECTED.glob("*.json")) if path.stem != ENVIRONMENT]
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in files}


def environment() -> dict[str, str]:
    """What results depend on beside the program."""
    found = {"machine": platform.machine(), "python": platform.python_version()}
    for name in (
        "torch",
        "triton",
        "diffusers",
        "transformers",
        "numpy",
        "typer",
        "rich",
        "pydantic",
        "imageio-ffmpeg",
    ):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _record(commands: list[Command], flags: argparse.Namespace) -> Records:
    """The records of the commands that `--only` names, with what comes before them in their folders run too."""
    wanted = {command for command in range(len(commands)) if _is_wanted(commands[command], flags.only)}
    last = {commands[i].folder: i for i in sorted(wanted) if commands[i].folder}
    chosen = [c for i, c in enumerate(commands) if i in wanted or (c.folder and i <= last.get(c.folder, -1))]
    titles = {_title(commands[i].group, commands[i].name) for i in wanted}
    found: Records = {}
    with_kernels = any(_matches(f"{KERNELS}: x", [p.split(":")[0] + ":*"]) for p in flags.only or ["*:"])
    with tempfile.TemporaryDirectory(prefix="behaviour-") as work:
        os.environ.update(running.environment(Path(work) / "home"))
        kernels = _start_kernels() if with_kernels else None
        if not flags.spawn:
            running.warm_up()
        for command, left in running.run_all(chosen, Path(work), flags.jobs, flags.spawn):
            if _title(command.group, command.name) in titles:
                found.setdefault(command.group, {})[command.name] = record(command, left)
        if kernels is not None:
            text, _ = kernels.communicate()
            if kernels.returncode:
                raise RuntimeError("the kernels did not run: see above")
            entries = {k: v for k, v in json.loads(text).items() if _matches(_title(KERNELS, k), flags.only)}
            if entries:
                found[KERNELS] = entries
    order = [(command.group, command.name) for command in commands]
    for group, entries in found.items():
        if group != KERNELS:
            found[group] = {name: entries[name] for g, name in order if g == group and name in entries}
    return found


def _start_kernels() -> subprocess.Popen[str]:
    env = {**running.environment(Path.home()), "TRITON_INTERPRET": "1"}
    return subprocess.Popen(
        [sys.executable, str(HERE / "kernel_outputs.py")], env=env, stdout=subprocess.PIPE, text=True
    )


def _is_wanted(command: Command, patterns: list[str] | None) -> bool:
    return _matches(_title(command.group, command.name), patterns)


def _matches(title: str, patterns: list[str] | None) -> bool:
    return not patterns or any(fnmatch.fnmatchcase(title, pattern) for pattern in patterns)


def _title(group: str, name: str) -> str:
    return f"{group}: {name}"


def _missing(found: Records) -> dict[str, list[str]]:
    """Entries of the record that no command makes any more."""
    gone = {}
    for group, entries in read_expected().items():
        for name in entries:
            if name not in found.get(group, {}):
                title = _title(group, name)
                gone[title] = [f"--- {title}", "- is in the record, and no command makes it"]
    return gone


def _write(found: Records, keep: bool) -> None:
    EXPECTED.mkdir(exist_ok=True)
    before = read_expected() if keep else {}
    if not keep:
        for path in EXPECTED.glob("*.json"):
            path.unlink()
        _dump(ENVIRONMENT, environment())
    for group, entries in found.items():
        _dump(group, {**before.get(group, {}), **entries})


def _dump(name: str, value: Any) -> None:
    (EXPECTED / f"{name}.json").write_text(_shown(value) + "\n", encoding="utf-8")


def _lines(entry: dict[str, Any], exact: bool) -> list[str]:
    shown = entry if exact else {key: value for key, value in entry.items() if key != "exact"}
    return _shown(shown).splitlines()


def _shown(value: Any, indent: str = "") -> str:
    """JSON with what fits into a line on one line."""
    flat = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict | list) or not value or (len(indent) + len(flat) <= WIDTH and indent):
        return flat
    deeper = indent + " "
    if isinstance(value, dict):
        rows = [f"{json.dumps(key, ensure_ascii=False)}: {_shown(item, deeper)}" for key, item in value.items()]
    else:
        rows = [_shown(item, deeper) for item in value]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return f"{opening}\n" + ",\n".join(deeper + row for row in rows) + f"\n{indent}{closing}"


def _aligned(entry: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """The entry with every number that is close to the recorded one replaced by it."""
    if "numbers" not in entry:
        return entry
    old = before.get("numbers", {})
    numbers = {
        name: old[name] if name in old and _close(name, value, old[name]) else value
        for name, value in entry["numbers"].items()
    }
    return {**entry, "numbers": numbers}


def _close(name: str, value: Any, before: Any) -> bool:
    if isinstance(value, list) and isinstance(before, list):
        return len(value) == len(before) and all(_close(name, *pair) for pair in zip(value, before, strict=True))
    if isinstance(value, list) or isinstance(before, list):
        return False
    if "psnr" in name and min(value, before) >= TOP_PSNR:
        return True
    if " pixels, " in name:
        return math.isclose(value, before, rel_tol=0, abs_tol=PIXEL)
    return math.isclose(value, before, rel_tol=RELATIVE, abs_tol=ABSOLUTE)


def _package() -> str:
    spec = importlib.util.find_spec("vmonarch_cli")
    return "not installed" if spec is None or spec.origin is None else str(Path(spec.origin).parent)


if __name__ == "__main__":
    sys.exit(main())
