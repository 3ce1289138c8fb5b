"""Regular files of a sane size, as bytes, text, JSON or TOML: one sentence, in the caller's error class, for all else.

`name` opens each sentence ("preset file x.toml"). The values follow the limits of `untrusted.values`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from vmonarch_cli.errors import InputError, VmonarchError
from vmonarch_cli.text import binary_size, shown
from vmonarch_cli.untrusted.values import Malformed, parse_json, parse_text, parse_toml

MAX_BYTES = 64 << 20
"""Largest file that is read, in bytes."""
MAX_NAME, MAX_PATH = 255, 4095
"""Bytes of a name and of a path, on all file systems that matter here."""
_KINDS = (
    (stat.S_ISDIR, "is a folder, not a file"),
    (stat.S_ISFIFO, "is a pipe, not a file"),
    (stat.S_ISSOCK, "is a socket, not a file"),
    (stat.S_ISCHR, "is a device, not a file"),
    (stat.S_ISBLK, "is a device, not a file"),
)
_Rest = ParamSpec("_Rest")
_Found = TypeVar("_Found")
_SHELL_PIPES = re.compile(r"/(?:dev/fd|proc/(?:self|\d+)/fd)/\d+")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits; OSError where it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def once_a_content(read: Callable[Concatenate[Path, _Rest], _Found]) -> Callable[Concatenate[Path, _Rest], _Found]:
    """A function of a file, that reads it once while its place, size and time stay: each line of a batch asks.

    Its other arguments are hashable. What it raises is not kept.
    """

    @functools.lru_cache(maxsize=256)
    def kept(path: Path, stamp: tuple[int, ...], /, *rest: _Rest.args, **named: _Rest.kwargs) -> _Found:
        return read(path, *rest, **named)

    @functools.wraps(read)
    def known(path: Path, /, *rest: _Rest.args, **named: _Rest.kwargs) -> _Found:
        try:
            facts = path.stat()
        except (OSError, ValueError):
            return read(path, *rest, **named)  # whose sentence it is
        stamp = (facts.st_ino, facts.st_size, facts.st_mtime_ns)
        return kept(path, stamp, *rest, **named)  # type: ignore[arg-type]

    return known


@once_a_content
def known_sha256(path: Path) -> str:
    """As `file_sha256`, see `once_a_content`."""
    return file_sha256(path)


def user_path(text: str, name: str, error: type[VmonarchError] = InputError) -> Path:
    """A path as a user wrote it, with ~ expanded; `error` for one that no file system can hold."""
    if "\0" in text:
        raise error(f"{name} {shown(text)} holds a NUL character, which no path can")
    try:
        os.fsencode(text)
        path = Path(text).expanduser()
    except UnicodeEncodeError:
        raise error(f"{name} {shown(text)} holds half of a surrogate pair, which no path can") from None
    except RuntimeError:
        raise error(f"{name} {shown(text)} begins with the home folder of a user that this machine lacks") from None
    if any(len(os.fsencode(part)) > MAX_NAME for part in path.parts):
        raise error(f"{name} {shown(text)} is too long: a name has at most {MAX_NAME} bytes")
    if len(os.fsencode(path)) > MAX_PATH:
        raise error(f"{name} {shown(text)} is too long: a path has at most {MAX_PATH} bytes")
    return path


def require_regular(path: Path, name: str, error: type[VmonarchError] = InputError, missing: str | None = None) -> None:
    """`error` unless the path is a regular file; `missing` is the sentence for a path that does not exist.

    For files that a library opens itself (weights, pictures): a pipe would hang it, a device would never end.
    """
    with _sentences(name, error, missing):
        _check_kind(path.stat().st_mode)


def regular_bytes(path: Path, limit: int = MAX_BYTES, *, shell_pipes: bool = False) -> bytes:
    """The content of a regular file; OSError as `open` raises it, Malformed for any other kind or above the limit.

    `shell_pipes` also takes /dev/fd/N, which is what a shell makes of `<(command)`.
    """
    piped = shell_pipes and _SHELL_PIPES.fullmatch(os.fspath(path)) is not None
    if not piped:
        _check_kind(path.stat().st_mode)  # opening a device may already do something
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | (0 if piped else os.O_NONBLOCK))
    with os.fdopen(descriptor, "rb") as file:
        mode = os.fstat(descriptor).st_mode
        if not (piped and stat.S_ISFIFO(mode)):
            _check_kind(mode)
        return limited(file.read, limit)


def limited(read: Callable[[int], bytes], limit: int = MAX_BYTES) -> bytes:
    """What `read` returns, e.g. that of stdin; Malformed when it is more than `limit` bytes."""
    content = read(limit + 1)
    if len(content) > limit:
        raise Malformed(f"is larger than {binary_size(limit)}")
    return content


def read_bytes(
    path: Path,
    name: str,
    error: type[VmonarchError] = InputError,
    *,
    missing: str | None = None,
    limit: int = MAX_BYTES,
) -> bytes:
    """The content of a regular file of at most `limit` bytes; `error` with one sentence, that opens with `name`.

    `missing` is the whole sentence for a file that does not exist.
    """
    with _sentences(name, error, missing):
        return regular_bytes(path, limit)


def read_text(
    path: Path,
    name: str,
    error: type[VmonarchError] = InputError,
    *,
    missing: str | None = None,
    limit: int = MAX_BYTES,
) -> str:
    """As `read_bytes`, as text (see `parse_text`)."""
    content = read_bytes(path, name, error, missing=missing, limit=limit)
    with _sentences(name, error):
        return parse_text(content)


def read_json(
    path: Path,
    name: str,
    error: type[VmonarchError] = InputError,
    *,
    missing: str | None = None,
    limit: int = MAX_BYTES,
    constants: bool = False,
) -> Any:
    """As `read_text`, as the value of a JSON text (see `parse_json`)."""
    text = read_text(path, name, error, missing=missing, limit=limit)
    with _sentences(name, error):
        return parse_json(text, constants=constants)


def read_toml(
    path: Path,
    name: str,
    error: type[VmonarchError] = InputError,
    *,
    missing: str | None = None,
    limit: int = MAX_BYTES,
) -> dict[str, Any]:
    """As `read_text`, as the table of a TOML text (see `parse_toml`)."""
    text = read_text(path, name, error, missing=missing, limit=limit)
    with _sentences(name, error):
        return parse_toml(text)


@contextlib.contextmanager
def _sentences(name: str, error: type[VmonarchError], missing: str | None = None) -> Iterator[None]:
    """A block in which OSError, ValueError and Malformed become `error` with one sentence."""
    try:
        yield
    except Malformed as wrong:
        raise error(wrong.about(name)) from None
    except FileNotFoundError:
        raise error(missing or f"{name} does not exist") from None
    except OSError as wrong:
        raise error(f"{name} cannot be read: {wrong.strerror or wrong}") from None
    except ValueError:  # a path with a NUL or half of a surrogate pair
        raise error(f"{name} cannot be read: no file has such a name") from None


def _check_kind(mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise Malformed(next((reason for test, reason in _KINDS if test(mode)), "is not a regular file"))
