"""Files and folders that appear whole or not at all: written under a hidden name, synced, then renamed once.

What a killed process leaves behind carries its owner in its name, and the next writer in that folder removes it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vmonarch_cli.errors import OutputError
from vmonarch_cli.machine.process import is_dead, this_process

_REPLACED = "replaced"
_OURS = re.compile(r"\.(?P<stem>.*)\.(?P<owner>[0-9a-f]{12}-\d+-\d*)\.\w+\.tmp", re.DOTALL)
_AT_CWD, _NO_REPLACE, _EXCHANGE = -100, 1, 2  # of renameat2(2)
_NOT_THERE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


class NameTaken(OutputError):
    """Something has the name already, and nobody asked to replace it."""


class Draft:
    """What is being written for `path`: `temporary` is where it goes, in a hidden folder in `work` (by default beside
    `path`), until `publish` or `discard`.

    Without `overwrite` nothing that is there is replaced, whoever made it since the run began: NameTaken. OutputError
    when the hidden folder cannot be made.
    """

    def __init__(self, path: Path, overwrite: bool, work: Path | None = None) -> None:
        self.path = path
        self._overwrite = overwrite
        with named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if work is None:
                sweep(path.parent)
            prefix = f".{path.stem[:40]}.{this_process().tag}."
            self._scratch = Path(tempfile.mkdtemp(prefix=prefix, suffix=".tmp", dir=work or path.parent))
        self.temporary = self._scratch / path.name

    def publish(self) -> None:
        """Sync what was written and let it take the target's place; OutputError when that cannot be done."""
        with named(self.path):
            _publish(self.temporary, self.path, self._scratch, self._overwrite)

    def discard(self) -> None:
        """Remove what is left of the hidden folder."""
        shutil.rmtree(self._scratch, ignore_errors=True)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Every OSError within the block is an OutputError that names `path`."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error


@contextmanager
def atomic(path: Path, overwrite: bool, work: Path | None = None) -> Iterator[Path]:
    """A temporary path to write to, which takes the target's place on success; OutputError when that cannot be done,
    and then nothing is left. The arguments are those of `Draft`.
    """
    draft = Draft(path, overwrite, work)
    try:
        with named(path):
            yield draft.temporary
        draft.publish()
    finally:
        draft.discard()


def sweep(folder: Path) -> None:
    """Remove what killed processes of this machine left in a folder, and end what they had begun to replace."""
    with suppress(OSError):
        for entry in os.scandir(folder):
            match = _OURS.fullmatch(entry.name)
            if match is not None and is_dead(match["owner"]) and entry.is_dir(follow_symlinks=False):
                _end(Path(entry.path))


def _end(scratch: Path) -> None:
    names = [entry.name for entry in scratch.iterdir()]
    if _REPLACED in names and len(names) == 2:
        # Killed between two renames: the new folder is whole, and the old one is not in its place any more.
        name = next(name for name in names if name != _REPLACED)
        with suppress(OSError):
            move_exclusive(scratch / name, scratch.parent / name)
    shutil.rmtree(scratch, ignore_errors=True)


def _publish(temporary: Path, path: Path, scratch: Path, overwrite: bool) -> None:
    for file in temporary.iterdir() if temporary.is_dir() else [temporary]:
        _sync(file)
    if not overwrite:
        try:
            move_exclusive(temporary, path)
        except FileExistsError:
            raise NameTaken(f"{path} exists already: pass --overwrite to replace it, or another --output") from None
    elif temporary.is_dir() and path.is_dir():
        # A folder that is not empty cannot be replaced by rename.
        if not _rename(temporary, path, _EXCHANGE):
            path.rename(scratch / _REPLACED)
            temporary.rename(path)
    else:
        temporary.replace(path)
    with suppress(OSError):  # some file systems cannot sync a folder; the rename is atomic all the same
        _sync(path.parent)


def move_exclusive(source: Path, target: Path) -> None:
    """Rename a file or folder to a name that nothing has; FileExistsError, and nothing is changed, when it is taken."""
    if _rename(source, target, _NO_REPLACE):
        return
    if source.is_dir():
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        source.rename(target)  # onto a folder with files in it, this fails
        return
    try:
        target.hardlink_to(source)
    except FileExistsError:
        raise
    except OSError:  # a file system without links: the empty file holds the name until the other one replaces it
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        source.replace(target)
        return
    source.unlink()


def _rename(source: Path, target: Path, flags: int) -> bool:
    """renameat2(2), which decides in one step; False where the system or the file system does not have it."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_AT_CWD, os.fsencode(source), _AT_CWD, os.fsencode(target), flags) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NOT_THERE:
        return False
    raise OSError(number, os.strerror(number), str(source), None, str(target))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
