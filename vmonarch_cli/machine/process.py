"""Which process this is, so that another one can tell later whether it is still alive."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """A process and where its number means something."""

    place: str
    """This host, this boot of it and the container's numbering of processes, in words."""
    host: str
    pid: int
    start: str
    """When it began, in the kernel's ticks, empty where that is unknown: a number may be given again."""

    @property
    def tag(self) -> str:
        """The process as a part of a file's name, without dots."""
        return f"{digest(self.place)}-{self.pid}-{self.start}"


def this_process() -> Process:
    """The process that asks."""
    host = socket.gethostname()
    place = [host]
    with contextlib.suppress(OSError):  # Linux: this boot, and the container's numbering of processes
        place.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        place.append(str(Path("/proc/self/ns/pid").readlink()))
    return Process("/".join(place), host, os.getpid(), start_of(os.getpid()) or "")


def is_dead(tag: str) -> bool:
    """Whether the process of a tag ran on this machine and is gone; False for one that ran elsewhere."""
    place, _, rest = tag.partition("-")
    pid, _, start = rest.partition("-")
    return place == digest(this_process().place) and pid.isdecimal() and start_of(int(pid)) != start


def digest(place: str) -> str:
    """A place as twelve hexadecimal digits."""
    return hashlib.sha256(place.encode()).hexdigest()[:12]


def start_of(pid: int) -> str | None:
    """When a process of this machine began, in the kernel's ticks ("" where that is unknown); None for a dead one."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
    except (OSError, IndexError):
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""
