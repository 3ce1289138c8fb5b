"""The JSON record of a profile: which machine, versions, commit and command made which figures.

It is written again after every result, so that an interrupted run leaves what it measured.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vmonarch_cli.errors import OutputError
from vmonarch_cli.untrusted.files import user_path

SCHEMA = 1
"""Version of the layout; raised when a reader of an older one would misread it."""
COMMIT_VARIABLE = "VMONARCH_COMMIT"
"""Names the commit where the tree is a copy without .git."""


@dataclass(frozen=True)
class MachineFacts:
    """Where the figures come from, ready for captions."""

    device: str
    """For people: "NVIDIA H100 80GB HBM3", "CPU (x86_64, 2 threads)"."""
    versions: dict[str, str | None]
    details: dict[str, Any]

    def caption(self) -> str:
        """'NVIDIA H100 80GB HBM3, torch 2.11.0, triton 3.6.0, vmonarch 0.1.0'."""
        shown = [name for name in ("torch", "triton", "diffusers", "vmonarch") if self.versions.get(name)]
        return ", ".join([self.device, *(f"{name} {self.versions[name]}" for name in shown)])


def this_machine(device: Any) -> MachineFacts:
    """Device (a torch.device) and versions; imports torch."""
    import torch

    from vmonarch_cli.machine.versions import installed_versions
    from vmonarch_cli.pipeline.device import device_name

    details: dict[str, Any] = {"type": str(device), "name": device_name(device), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        properties: Any = torch.cuda.get_device_properties(device)
        details["capability"] = list(torch.cuda.get_device_capability(device))
        details["memory_bytes"] = properties.total_memory
        details["multiprocessors"] = properties.multi_processor_count
    return MachineFacts(device_name(device), installed_versions(), details)


def commit() -> dict[str, Any] | None:
    """{"id", "dirty"} of the git checkout that this package runs from; None when it is installed without one."""
    if named := os.environ.get(COMMIT_VARIABLE):
        return {"id": named, "dirty": None}
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    found = [_git(root, "rev-parse", "HEAD"), _git(root, "status", "--porcelain")]
    if found[0] is None:
        return None
    return {"id": found[0], "dirty": None if found[1] is None else bool(found[1])}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(  # noqa: S603 - fixed arguments
            ["git", "-C", str(root), *arguments],  # noqa: S607 - whichever git the user has
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


class Recorder:
    """Keeps the record of one run and, given a path, its file up to date."""

    def __init__(
        self, kind: str, target: str | None, machine: MachineFacts, settings: dict[str, Any], program: str = "vmonarch"
    ) -> None:
        """target: a file, "-" (the caller prints `data` at the end) or None; program: what the arguments were for."""
        self._path = None if target in (None, "-") else Path(str(target)).expanduser()
        self.data: dict[str, Any] = {
            "schema": SCHEMA,
            "kind": kind,
            "command": f"{program} {shlex.join(sys.argv[1:])}",
            "started": _now(),
            "finished": None,
            "commit": commit(),
            "device": machine.details,
            "versions": machine.versions,
            "settings": settings,
            "checks_passed": None,
            "skipped": [],
        }

    def save(self, **fields: Any) -> None:
        """Update fields of the record and its file."""
        self.data.update(fields)
        if self._path is not None:
            write_text(self._path, self.text())

    def finish(self, checks_passed: bool) -> None:
        """The run is over; `checks_passed` says whether its figures may be cited."""
        self.save(finished=_now(), checks_passed=checks_passed)

    def text(self) -> str:
        return json.dumps(_finite(self.data), ensure_ascii=False, indent=1, allow_nan=False, default=_plain) + "\n"


def check_target(target: str | None, overwrite: bool = False) -> None:
    """OutputError before anything is measured when the file could not be written, or would be lost."""
    if target in (None, "-"):
        return
    check_file(user_path(str(target), "--json", OutputError), "--json", overwrite)


def check_file(path: Path, flag: str, overwrite: bool) -> None:
    """OutputError unless a file can be made at `path` without losing one that is there; makes its folder."""
    if path.is_dir():
        raise OutputError(f"{flag} takes a file, and {path} is a folder")
    if path.exists() and not overwrite:
        raise OutputError(f"{flag}: {path} exists already: pass --overwrite to replace it, or another file")
    check_parent(path, flag)


def write_text(path: Path, text: str) -> None:
    """Replace a file as a whole, so that a reader or an interrupt never meets half of it."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise OutputError(f"{path} cannot be written: {error.strerror}", exit_code=1) from None


def check_parent(path: Path, flag: str) -> None:
    """OutputError unless a file can be made beside `path`; makes the folder."""
    parent = path.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{flag}: folder {parent} cannot be made ({error.strerror})") from None
    if not os.access(parent, os.W_OK):
        raise OutputError(f"{flag}: folder {parent} cannot be written to")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _finite(value: Any) -> Any:
    """The same data with null for numbers that are not finite, which JSON cannot say."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: object) -> Any:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} does not belong in a record")
