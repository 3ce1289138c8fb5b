"""What has happened to each clip of a folder: `manifest.jsonl`, one event per line, only ever appended, and synced.

The state of a clip is what its events say, read in order. Processes append under a lock of the file, so that lines
never mix. A process that dies within a line leaves a torn one, which the next writer ends and every reader skips:
the event did not happen.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vmonarch_cli.errors import OutputError

FILE = "manifest.jsonl"
SCHEMA = 1
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)

PLANNED, DENOISING, DENOISED, DONE, FAILED = "planned", "denoising", "denoised", "done", "failed"


@dataclass
class ManifestEntry:
    """A clip of the folder, as the manifest tells it."""

    key: str
    name: str
    """File name of the clip within the folder."""
    line: int
    prompt: str
    seed: int
    status: str = PLANNED
    error: str | None = None
    retries: list[dict[str, str]] = field(default_factory=list)
    owns_name: bool = False
    """Whether a process got as far as to write: a file of that name is then this clip's own."""


class Manifest:
    """The manifest of one folder; any number of processes may hold one."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE

    def read(self) -> dict[str, ManifestEntry]:
        """Key -> entry of every clip, in the order in which they were planned; empty without a manifest."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise OutputError(f"manifest {self.path} cannot be read: {error.strerror}") from None
        entries: dict[str, ManifestEntry] = {}
        for row in content.split(b"\n"):
            event = _parse(row)
            if event.get("schema", SCHEMA) != SCHEMA:
                raise OutputError(f"manifest {self.path} was written by another version of vmonarch: use a new folder")
            _apply(event, entries)
        return entries

    def append(self, *events: dict[str, Any]) -> None:
        """Append events and sync them; all of them or, when the disk is full or refuses, none and an OutputError."""
        with self.locked():
            self.append_locked(*events)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else appends inside the block; the file is made if need be. Not reentrant."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise OutputError(f"manifest {self.path} cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            yield
        except OSError as error:
            if error.errno in _NO_LOCKS:
                raise OutputError(
                    f"{self.path.parent} is on a file system without file locks, which a batch needs"
                ) from None
            raise
        finally:
            os.close(self._file)  # and with it the lock

    def append_locked(self, *events: dict[str, Any]) -> None:
        """`append` inside `locked`."""
        stamp = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "pid": os.getpid()}
        lines = "".join(json.dumps({**event, **stamp}, ensure_ascii=True) + "\n" for event in events).encode()
        try:
            size = os.fstat(self._file).st_size
            if size and os.pread(self._file, 1, size - 1) != b"\n":
                lines = b"\n" + lines
            try:
                written = 0
                while written < len(lines):
                    written += os.write(self._file, lines[written:])
                os.fsync(self._file)
            except OSError:
                os.ftruncate(self._file, size)
                raise
        except OSError as error:
            raise OutputError(f"manifest {self.path} cannot be written: {error.strerror}") from None


def planned(entry: ManifestEntry, **facts: Any) -> dict[str, Any]:
    """The event that gives a clip its name."""
    return {
        "event": "planned",
        "key": entry.key,
        "name": entry.name,
        "line": entry.line,
        "prompt": entry.prompt,
        "seed": entry.seed,
        **facts,
    }


def happened(event: str, key: str, **facts: Any) -> dict[str, Any]:
    """Any other event of a clip: started, denoised, decoding, done, failed, dropped, lost, again, forgotten."""
    return {"event": event, "key": key, **facts}


def _parse(row: bytes) -> dict[str, Any]:
    """An event, or nothing for a torn line."""
    try:
        event = json.loads(row)
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}


def _apply(event: dict[str, Any], entries: dict[str, ManifestEntry]) -> None:
    kind, key = event.get("event"), str(event.get("key"))
    if kind == "planned":
        entries[key] = ManifestEntry(key, event["name"], event["line"], event["prompt"], event["seed"])
        entries[key].owns_name = bool(event.get("owns_name"))
        return
    entry = entries.get(key)
    if entry is None:
        return
    match kind:
        case "started":
            entry.status = DENOISING
        case "denoised":
            entry.status, entry.owns_name = DENOISED, True
            entry.retries = list(event.get("retries", []))
        case "decoding":
            entry.owns_name = True
        case "done":
            entry.status, entry.owns_name, entry.error = DONE, True, None
            entry.retries = list(event.get("retries", []))
        case "failed":
            entry.status, entry.error = FAILED, str(event.get("error"))
        case "dropped" | "lost" | "again":
            entry.status, entry.error = PLANNED, None
            entry.owns_name |= bool(event.get("owns_name"))
        case "forgotten":
            del entries[key]
