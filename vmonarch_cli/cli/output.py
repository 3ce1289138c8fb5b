"""The one place that prints: results to stdout, everything else to stderr, and neither ever costs a clip.

Text that is not ours (prompts, paths, names in files, errors of other libraries) never reaches a terminal as markup or
as an escape sequence: see `printable`.
"""

from __future__ import annotations

import codecs
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.status import Status
from rich.text import Text

from vmonarch_cli.errors import EXIT_CLIP_FAILED, OutputError
from vmonarch_cli.text import printable

MAX_ALIKE = 100
"""Errors printed one a line before the rest is counted."""


class Output:
    """Where the words of one command go.

    as_json: stdout carries one JSON object and nothing else. quiet: paths and failures alone. main: False in the
    processes of a torchrun that leave the talking to the first. A console may be given instead of stdout or stderr.
    """

    def __init__(
        self,
        *,
        as_json: bool = False,
        quiet: bool = False,
        main: bool = True,
        stdout: Console | None = None,
        stderr: Console | None = None,
    ) -> None:
        self.as_json = as_json
        self.main = main
        self.silent = as_json or quiet or not main
        """Whether tables, notes and progress are left out."""
        self.stdout = stdout or _console(stderr=False)
        self.stderr = stderr or _console(stderr=True)

    # On stderr

    def note(self, *sentences: str) -> None:
        """'note: ...', each once; what is good to know, so not when silent."""
        for sentence in dict.fromkeys(sentences) if not self.silent else ():
            self._tell(f"note: {sentence}", "dim")

    def warn(self, *sentences: str) -> None:
        """'warning: ...'; even when silent."""
        for sentence in sentences if self.main else ():
            self._tell(f"warning: {sentence}", "yellow")

    def retry(self, sentence: str) -> None:
        """What went wrong and is tried in another way; even when silent."""
        self._tell(sentence, "yellow")

    def fail(self, *sentences: str) -> None:
        """'failed: ...' of one clip among others; always."""
        for sentence in sentences:
            self._tell(f"failed: {sentence}", "red")

    def error(self, *sentences: str) -> None:
        """'error: ...', each on one line; always. Thousands that are alike are cut to the first hundred."""
        for sentence in sentences[:MAX_ALIKE]:
            self._tell(f"error: {' '.join(sentence.split())}", "red")
        if len(sentences) > MAX_ALIKE:
            self._tell(f"error: and {len(sentences) - MAX_ALIKE} more like these", "red")

    def tell(self, line: str) -> None:
        """A line about the work: a phase, a finished clip, where a batch stands; not when silent."""
        if not self.silent:
            self._tell(line)

    def insist(self, text: str) -> None:
        """The same even when silent: a traceback that was asked for, what to do about saved work."""
        self._tell(text)

    def picture(self, sequence: str) -> None:
        """A picture as a terminal's control sequence, on stderr; not when silent."""
        if not self.silent:
            sys.stderr.write(sequence)
            sys.stderr.flush()

    def tabulate_failures(self, table: RenderableType) -> None:
        """A table of what failed, on stderr; not when silent, where `fail` says the same in sentences."""
        if not self.silent:
            self.stderr.print(_Printable(table))

    def spinner(self, words: str) -> Status:
        """A context that shows a spinner on a terminal; `Status.update` takes a Text."""
        return self.stderr.status(Text(words), spinner="line" if self.stderr.options.ascii_only else "dots")

    # On stdout

    def show(self, what: RenderableType | Callable[[int], RenderableType]) -> None:
        """A table or another renderable, or a function of the width that makes one; not when silent."""
        if not self.silent:
            self.stdout.print(_Printable(what(self.stdout.width) if callable(what) else what))

    def say(self, line: str, style: str = "") -> None:
        """A line of the result, which is never wrapped; not when silent."""
        if not self.silent:
            self.stdout.print(_Printable(Text(line, style)), soft_wrap=True)

    def paths(self, *paths: object) -> None:
        """Paths, one a line and as they are: the last thing that a command prints. Not where stdout carries JSON."""
        for path in paths if self.main and not self.as_json else ():
            _write_path(str(path))

    def json(self, value: Mapping[str, Any], indent: int | None = 2) -> None:
        """The one JSON object of `--json`."""
        if self.main:
            self.text(json.dumps(value, ensure_ascii=not _is_utf8(sys.stdout), indent=indent) + "\n")

    def text(self, text: str) -> None:
        """Text that is a result as it stands: help, a record, a version."""
        sys.stdout.write(text)

    def _tell(self, line: str, style: str = "") -> None:
        self.stderr.print(_Printable(Text(line, style)), soft_wrap=True)


UNBOUNDED = 1000
"""Columns of a stdout that is no terminal: there nothing needs to be cut or wrapped for a screen."""


def _console(stderr: bool) -> Console:
    made = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not stderr and not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = UNBOUNDED
    return made


def plain_console(stream: TextIO, width: int) -> Console:
    """A console of so many columns that writes plain text, without colours, to a stream."""
    return Console(file=stream, width=width, color_system=None, highlight=False, markup=False, emoji=False)


class _Printable:
    """A renderable whose text cannot steer the terminal, whoever wrote it."""

    def __init__(self, inner: RenderableType) -> None:
        self._inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self._inner, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement.get(console, options, self._inner)


def _write_path(path: str) -> None:
    """A path that a script can open: where stdout's encoding has no words for it, the bytes of the file's name."""
    stream = sys.stdout
    if stream.isatty():
        stream.write(f"{printable(path)}\n")
        return
    try:
        path.encode(stream.encoding or "utf-8")
    except UnicodeEncodeError:
        stream.flush()
        stream.buffer.write(os.fsencode(path) + b"\n")
        stream.buffer.flush()
    else:
        stream.write(f"{path}\n")


# Streams that may break


class _Steady:
    """A text stream that goes on when nobody reads it any more, so that a closed pipe or a full disk ends no run."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.failure: OSError | None = None
        """Why text was lost, other than by a reader that had enough."""
        self._gone = False

    def write(self, text: str) -> int:
        if not self._gone:
            try:
                return self._stream.write(text)
            except (OSError, ValueError) as error:  # ValueError: the stream is closed
                self._lose(error)
        return len(text)

    def writelines(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if not self._gone:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._lose(error)

    def _lose(self, error: OSError | ValueError) -> None:
        self._gone = True
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            self.failure = error
        try:  # what is still in the buffer goes nowhere, and the interpreter's last flush does not complain
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        except (OSError, ValueError, AttributeError):
            pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class StdoutLost(OutputError):
    """What was printed did not get where it should."""

    exit_code = EXIT_CLIP_FAILED


@contextmanager
def steady_streams() -> Iterator[None]:
    """Inside the block no write to stdout or stderr raises, whatever the encoding and whoever reads.

    Raises StdoutLost at its end when stdout could not take its text for another reason than a reader that left.
    """
    before = sys.stdout, sys.stderr
    kept = [_Steady(stream) for stream in before]
    for stream in before:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_PLAIN)
    sys.stdout, sys.stderr = kept
    try:
        yield
        for stream in kept:
            stream.flush()
    finally:
        sys.stdout, sys.stderr = before
    if (failure := kept[0].failure) is not None:
        what = failure.strerror or failure
        raise StdoutLost(f"standard output could not be written: {what}; files that were made are whole")


_PLAIN = "vmonarch.plain"
_ALIKE = {"·": "-", "µ": "u", "×": "x", "✓": "+", "✗": "x", "…": "~", "•": "*", "–": "-"}


def _as_ascii(error: UnicodeError) -> tuple[str, int]:
    """What stands for text that a stream's encoding does not have: a sign that looks alike, or its escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start : error.end]
    escape = codecs.lookup_error("backslashreplace")
    shown = "".join(
        _ALIKE.get(sign) or str(escape(UnicodeEncodeError(error.encoding, sign, 0, 1, ""))[0]) for sign in lost
    )
    return shown, error.end


codecs.register_error(_PLAIN, _as_ascii)


def _is_utf8(stream: TextIO) -> bool:
    return (stream.encoding or "utf-8").lower().replace("-", "").startswith("utf8")
