"""What has happened to each clip of a folder: `manifest.jsonl`, one event per line, only ever appended, and synced.

The state of a clip is what its events say, read in order. Processes append under a lock of the file, so that lines
never mix. A process that dies within a line leaves a torn one, which the next writer ends and every reader skips:
the event did not happen. What a process says of a clip that is done counts no more: it was stopped for long, and
another one has made the clip meanwhile.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vmonarch_cli.batch.names import plain_name
from vmonarch_cli.errors import InputError, OutputError
from vmonarch_cli.plan.seeds import MAX_SEED
from vmonarch_cli.text import shown
from vmonarch_cli.untrusted.files import regular_bytes
from vmonarch_cli.untrusted.values import Malformed

FILE = "manifest.jsonl"
SCHEMA = 1
WAIT_S = 5.0
"""Seconds of waiting for the lock of a manifest after which it is said."""
_MAX_BYTES = 1 << 30
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)

_AFTER_DONE = ("lost", "again", "forgotten")
_PLANNED_FIELDS: tuple[tuple[str, type, str], ...] = (
    ("name", str, "a text"),
    ("line", int, "a whole number"),
    ("prompt", str, "a text"),
    ("seed", int, "a whole number"),
)

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
    is_asked_again: bool = False
    """Whether it is to be made again, even where its clip and record are there."""


class Manifest:
    """The manifest of one folder; any number of processes may hold one.

    Once `must_exist` is set, a manifest that is gone is an error and not begun again. `on_wait` gets a sentence when
    another process keeps the lock for long.
    """

    def __init__(self, folder: Path, on_wait: Callable[[str], None] = lambda sentence: None) -> None:
        self.path = folder / FILE
        self.must_exist = False
        self._on_wait = on_wait

    def size(self) -> int:
        """Bytes so far; 0 without a manifest."""
        try:
            return self.path.stat().st_size
        except OSError:
            return 0

    def read(self) -> dict[str, ManifestEntry]:
        """Key -> entry of every clip, in the order in which they were planned; empty without a manifest."""
        try:
            content = regular_bytes(self.path, _MAX_BYTES)
        except FileNotFoundError:
            if self.must_exist:
                raise self._gone() from None
            return {}
        except OSError as error:
            raise OutputError(f"manifest {self.path} cannot be read: {error.strerror}") from None
        except Malformed as wrong:
            raise OutputError(f"manifest {self.path} cannot be read: it {wrong.reason}") from None
        entries: dict[str, ManifestEntry] = {}
        for number, row in enumerate(content.split(b"\n"), start=1):
            event = _parse(row)
            if event.get("schema", SCHEMA) != SCHEMA:
                raise OutputError(f"manifest {self.path} was written by another version of vmonarch: use a new folder")
            try:
                _apply(event, entries)
            except ValueError as error:
                raise OutputError(f"manifest {self.path} line {number}: {error}") from None
        return entries

    def _gone(self) -> OutputError:
        return OutputError(f"manifest {self.path} is gone: it or its folder was removed while the batch ran")

    def append(self, *events: dict[str, Any]) -> None:
        """Append events and sync them; all of them or, when the disk is full or refuses, none and an OutputError."""
        with self.locked():
            self.append_locked(*events)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else appends inside the block; the file is made if need be. Not reentrant."""
        try:
            if not self.must_exist:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            create = 0 if self.must_exist else os.O_CREAT
            self._file = os.open(self.path, os.O_RDWR | create | os.O_APPEND | os.O_NONBLOCK, 0o644)
        except FileNotFoundError:
            raise self._gone() from None
        except OSError as error:
            raise OutputError(f"manifest {self.path} cannot be written: {error.strerror}") from None
        try:
            self._lock()
            yield
        except OSError as error:
            if error.errno in _NO_LOCKS:
                raise OutputError(
                    f"{self.path.parent} is on a file system without file locks, which a batch needs"
                ) from None
            raise
        finally:
            os.close(self._file)  # and with it the lock

    def _lock(self) -> None:
        with suppress(BlockingIOError):
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        said = threading.Timer(WAIT_S, self._say_who_holds_it)
        said.daemon = True
        said.start()
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX)
        finally:
            said.cancel()

    def _say_who_holds_it(self) -> None:
        owner = _lock_owner(self._file)
        who = f"process {owner}" if owner else "another process"
        self._on_wait(f"waiting for {who}, which holds the lock of {self.path}: it is slow, or it was stopped")

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
    except (ValueError, RecursionError):
        return {}
    return event if isinstance(event, dict) else {}


def _apply(event: dict[str, Any], entries: dict[str, ManifestEntry]) -> None:
    """Bring the entries to where they are after an event; ValueError, half a sentence, for one that cannot be."""
    kind, key = event.get("event"), str(event.get("key"))
    if kind == "planned":
        entries[key] = _planned_entry(key, event)
        return
    entry = entries.get(key)
    if entry is None or (entry.status == DONE and kind not in _AFTER_DONE):
        return
    match kind:
        case "started":
            entry.status = DENOISING
        case "denoised":
            entry.status, entry.owns_name = DENOISED, True
            entry.retries = _retries(event)
        case "decoding":
            entry.owns_name = True
        case "done":
            entry.status, entry.owns_name, entry.error = DONE, True, None
            entry.retries = _retries(event)
        case "failed":
            entry.status, entry.error = FAILED, str(event.get("error"))
        case "dropped" | "lost" | "again":
            entry.status, entry.error = PLANNED, None
            entry.owns_name |= bool(event.get("owns_name"))
            entry.is_asked_again |= kind == "again"
        case "forgotten":
            del entries[key]


def _planned_entry(key: str, event: dict[str, Any]) -> ManifestEntry:
    for field_name, kind, words in _PLANNED_FIELDS:
        value = event.get(field_name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{field_name} takes {words}, got {'nothing' if value is None else shown(value)}")
    if not 0 <= event["seed"] <= MAX_SEED:
        raise ValueError(f"seed takes a whole number from 0 to {MAX_SEED}, got {shown(event['seed'])}")
    try:
        is_plain = plain_name(event["name"]) == event["name"]
    except InputError:
        is_plain = False
    if not is_plain:
        raise ValueError(f"a clip's name is a plain file name, and {shown(event['name'])} is none")
    entry = ManifestEntry(key, event["name"], event["line"], event["prompt"], event["seed"])
    entry.owns_name = entry.is_asked_again = bool(event.get("owns_name"))
    return entry


def _retries(event: dict[str, Any]) -> list[dict[str, str]]:
    given = event.get("retries")
    return [retry for retry in given if isinstance(retry, dict)] if isinstance(given, list) else []


def _lock_owner(file: int) -> int | None:
    """The process that has the lock of an open file, where the kernel says so."""
    try:
        wanted = os.fstat(file)
        place = f"{os.major(wanted.st_dev):02x}:{os.minor(wanted.st_dev):02x}:{wanted.st_ino}"
        rows = [row.split() for row in Path("/proc/locks").read_text().splitlines()]
        return next((int(row[4]) for row in rows if row[1:2] == ["FLOCK"] and row[5] == place), None)
    except (OSError, ValueError, IndexError):
        return None
