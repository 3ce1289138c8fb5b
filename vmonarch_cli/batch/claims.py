"""Who is making which clip, between processes that share nothing but a folder, on one host or on several.

A claim is a file `KEY.N.claim`, made by linking: of any number of processes exactly one succeeds, also on a network
file system. The claim with the highest N counts. A process that finds the owner dead takes the clip over: it makes
claim N + 1. So no two processes take over the same claim, and no process removes a claim that is alive. An owner on
this machine is dead when its process is gone; the start time tells a process id that was given again. An owner on
another host is dead when it has not touched its claim for LEASE_S seconds, by the file server's clock. A process that
got a claim reads the manifest again, because the owner before may have finished the clip. A process that was stopped
for long may have lost its claim: it asks `is_held` before it says anything about the clip.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vmonarch_cli.errors import OutputError
from vmonarch_cli.machine.process import digest, start_of, this_process

FOLDER = ".vmonarch"
LEASE_S = 120.0
HEARTBEAT_S = 15.0
"""Seconds between two touches of a claim by its owner."""
_TRIES = 100
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class ClaimLost(Exception):
    """The clip is another process's by now: this one was stopped for so long that it counted as dead."""


class Claim:
    """A clip that this process, and nobody else, may make."""

    def __init__(self, path: Path, claims: Claims) -> None:
        self._path = path
        self._claims = claims
        self.work = path.with_suffix(".work")
        """A folder of this claim's own for unfinished files."""

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        self._claims.release(self._path)

    @property
    def is_held(self) -> bool:
        """Whether the clip is still this process's to make."""
        return self._claims.holds(self._path)


class Claims:
    """The claims of one folder; a context manager, which keeps this process's own alive."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / FOLDER
        self._own = asdict(this_process())
        self._draft = self._folder / f"{digest(self._own['place'])}.{self._own['pid']}.{self._own['start']}.draft"
        self._held: set[Path] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, daemon=True)

    def __enter__(self) -> Claims:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self._folder} cannot be made: {error.strerror}") from None
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # read-only by now
            self._remove_drafts()
        with contextlib.suppress(OSError):  # not empty: another process is at work
            self._folder.rmdir()

    def take(self, key: str) -> Claim | None:
        """A claim of the clip, or None while another process that lives has one; OutputError when it cannot be made."""
        try:
            for _ in range(_TRIES):
                # Another process that finished its batch may remove the empty folder at any moment.
                with contextlib.suppress(FileNotFoundError):
                    return self._take(key)
            return None
        except OSError as error:
            raise OutputError(f"{self._folder} cannot be written: {error.strerror}") from None

    def sweep(self, key: str) -> None:
        """Remove what dead processes left of a clip."""
        if not any(self._folder.glob(f"{key}.*")):
            return
        claim = self.take(key)
        if claim is not None:
            with claim:
                pass

    def release(self, path: Path) -> None:
        """Give a claim back, unless another host took it over after a long silence of this one."""
        self._held.discard(path)
        if _read(path) == self._own:
            with contextlib.suppress(OSError):  # read-only by now: the claim dies with this process
                path.unlink(missing_ok=True)

    def holds(self, path: Path) -> bool:
        """Whether a claim of this process is there and counts."""
        latest = self._latest(path.name.split(".")[0])
        return latest is not None and latest[1] == path and _read(path) == self._own

    def owner(self, key: str) -> str:
        """Who is making a clip, in words; empty when nobody is."""
        found = self._latest(key)
        about = _read(found[1]) if found else None
        return f"process {about['pid']} on {about['host']}" if about else ""

    def _take(self, key: str) -> Claim | None:
        self._folder.mkdir(exist_ok=True)
        latest = self._latest(key)
        if latest is not None and not self._is_dead(latest[1]):
            return None
        number = latest[0] + 1 if latest else 1
        path = self._folder / f"{key}.{number}.claim"
        if not self._create(path):
            return None
        if self._has_rival(key, number):
            path.unlink(missing_ok=True)
            return None
        self._remove_older(key, number)
        self._held.add(path)
        claim = Claim(path, self)
        claim.work.mkdir(exist_ok=True)
        return claim

    def _create(self, path: Path) -> bool:
        """Make a claim of this process, complete from its first moment; False when another one was faster."""
        try:
            with self._draft.open("w") as file:
                json.dump(self._own, file)
                file.flush()
                os.fsync(file.fileno())
            os.link(self._draft, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            with contextlib.suppress(FileExistsError), path.open("x") as file:
                json.dump(self._own, file)
                return True
            return False
        finally:
            self._draft.unlink(missing_ok=True)
        return True

    def _has_rival(self, key: str, number: int) -> bool:
        """Whether another live claim is there: between the look and the link, numbers may have been used again."""
        others = [(n, path) for n, path in self._numbered(key, "claim") if n != number]
        return any(n > number or not self._is_dead(path) for n, path in others)

    def _latest(self, key: str) -> tuple[int, Path] | None:
        """The claim that counts, and its number."""
        return max(self._numbered(key, "claim"), default=None)

    def _numbered(self, key: str, ending: str) -> list[tuple[int, Path]]:
        """Files of a key with their numbers; whatever else lies there is not ours."""
        found = [(path.name.split("."), path) for path in self._folder.glob(f"{key}.*.{ending}")]
        return [(int(parts[1]), path) for parts, path in found if len(parts) == 3 and parts[1].isdecimal()]

    def _remove_older(self, key: str, number: int) -> None:
        for older, path in self._numbered(key, "work"):
            if older < number:
                shutil.rmtree(path, ignore_errors=True)
        for older, path in self._numbered(key, "claim"):
            if older < number:
                path.unlink(missing_ok=True)

    def _is_dead(self, path: Path) -> bool:
        about = _read(path)
        if about is not None and about["place"] == self._own["place"]:
            return bool(start_of(about["pid"]) != about["start"])
        return self._age(path) > LEASE_S

    def _age(self, path: Path) -> float:
        """Seconds since a claim was touched, by the clock of the file system that it is on."""
        try:
            self._draft.touch()
            return self._draft.stat().st_mtime - path.stat().st_mtime
        except FileNotFoundError:
            return 0.0  # the claim was released just now: the next look will tell
        finally:
            self._draft.unlink(missing_ok=True)

    def _remove_drafts(self) -> None:
        """Remove drafts of processes of this machine that are dead, and very old ones of others."""
        for path in self._folder.glob("*.draft"):
            place, _, rest = path.name.partition(".")
            pid, _, rest = rest.partition(".")
            here = place == digest(self._own["place"]) and pid.isdecimal()
            if start_of(int(pid)) != rest.removesuffix(".draft") if here else self._age(path) > LEASE_S:
                path.unlink(missing_ok=True)

    def _keep_alive(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            for path in list(self._held):
                try:
                    os.utime(path)
                except FileNotFoundError:
                    self._held.discard(path)
                except OSError:  # a file server that is away for a moment; the lease is longer than that
                    continue


_FACTS = {"place": str, "host": str, "pid": int, "start": str}


def _read(path: Path) -> dict[str, Any] | None:
    try:
        about = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    known = isinstance(about, dict) and all(isinstance(about.get(name), kind) for name, kind in _FACTS.items())
    return about if known and about["pid"] > 0 else None
