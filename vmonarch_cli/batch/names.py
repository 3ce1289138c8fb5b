"""Names of clips within a batch's folder: which are plain file names, which are taken, which are free."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from vmonarch_cli.errors import InputError
from vmonarch_cli.media.paths import ENDINGS, is_taken
from vmonarch_cli.text import shown

_MAX_NAME_BYTES = 180


def plain_name(name: str) -> str:
    """A plain file name with one of the endings (.mp4 where it has none); InputError for anything else."""
    plain = unicodedata.normalize("NFC", name.strip())
    path = Path(plain or ".")
    if path.suffix.lower() not in ENDINGS:
        plain += ".mp4"
    # Joined emoji carry U+200D; nothing else that has no shape belongs in a name.
    printable = all(unicodedata.category(sign)[0] not in "CZ" or sign in " \u200d" for sign in plain)
    bad = not printable or re.search(r'[/\\:*?"<>|]', plain) or plain.startswith((".", "-", "~"))
    if bad or len(plain.encode()) > _MAX_NAME_BYTES:
        raise InputError(
            f"output takes a file name without a folder, of at most {_MAX_NAME_BYTES} bytes and without control "
            f'characters or any of / \\ : * ? " < > |, got {shown(name)}'
        )
    return plain


def folded(name: str) -> str:
    """What two names must differ in: their stems (records share one), whatever the case."""
    return unicodedata.normalize("NFC", Path(name).stem).casefold()


class Names:
    """The names of a folder: some are taken by clips that the manifest knows, others by files."""

    def __init__(self, folder: Path, names: Iterable[str], *, overwrite: bool) -> None:
        """`names`: of clips that are known; with `overwrite` a file is no obstacle."""
        self._folder = folder
        self._overwrite = overwrite
        self._taken = {folded(name) for name in names}
        self._next: dict[str, int] = {}

    def is_taken(self, name: str) -> bool:
        """Whether another clip has the name."""
        return folded(name) in self._taken

    def take(self, name: str) -> str:
        """Give a name away."""
        self._taken.add(folded(name))
        return name

    def free(self, stem: str) -> str:
        """Give away stem.mp4, or the first of stem-2, stem-3, ... that neither a clip nor a file has."""
        number = self._next.get(stem, 1)
        while True:
            name = f"{stem}.mp4" if number == 1 else f"{stem}-{number}.mp4"
            number += 1
            if not self.is_taken(name) and (self._overwrite or not is_taken(self._folder / name)):
                self._next[stem] = number
                return self.take(name)
