"""`--preview`: strips of frames while a clip is denoised, in terminals that show pictures, and in a file elsewhere."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from vmonarch_cli.cli.options import OUTPUT, option
from vmonarch_cli.cli.output import Output
from vmonarch_cli.errors import OutputError
from vmonarch_cli.media.publish import atomic

WantsPreview = Annotated[
    bool,
    option(
        "--preview",
        panel=OUTPUT,
        help="Show frames after each step: in terminals that draw pictures, in NAME.preview.png elsewhere. A first "
        "Ctrl-C then ends the clip with the step at hand.",
    ),
]
_CHUNK = 4096
"""Characters of a picture in one command of kitty's protocol."""
_SIXEL_COLOURS = 64
_OURS = ("Software", "vmonarch --preview")
"""What the file of a strip says of itself: any other file of its name is a user's, and stays."""


def preview_path(clip: Path) -> Path:
    """The strip beside a clip: NAME.preview.png."""
    return clip.with_name(f"{clip.stem}.preview.png")


def check_places(clips: Iterable[Path], out: Output, environ: Mapping[str, str] = os.environ) -> None:
    """OutputError where a strip's file would take the place of anything but an earlier strip, which a run that was
    killed leaves.
    """
    for path in map(preview_path, clips if _protocol(out, environ) is None else ()):
        if os.path.lexists(path) and not _is_strip(path):
            raise OutputError(
                f"{path} exists already, and --preview would show its steps there: move it, or choose another --output"
            )


class ShownPreviews:
    """Shows the strips of a run's clips, each in the place of the one before."""

    def __init__(
        self,
        out: Output,
        paths: Mapping[int, Path],
        around: Callable[[Callable[[], None]], None],
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        """`paths`: the file of each clip of the run; `around` runs what writes on the terminal, with the bar away."""
        self._out = out
        self._paths = paths
        self._around = around
        self._protocol = _protocol(out, environ)

    def __call__(self, index: int, picture: Any) -> None:
        """Show a strip (height, width, 3), uint8, of a clip."""
        from PIL import Image

        image = Image.fromarray(picture)
        if self._protocol is not None:
            sequence = PROTOCOLS[self._protocol](image)
            self._around(lambda: self._out.picture(sequence))
            return
        path = preview_path(self._paths[index])
        with atomic(path, overwrite=True) as temporary:
            image.save(temporary, "PNG", pnginfo=_about())

    def remove(self, index: int) -> None:
        """The clip is written: its strip says nothing any more."""
        path = preview_path(self._paths[index])
        if self._protocol is None and _is_strip(path):
            with suppress(OSError):
                path.unlink()


def _protocol(out: Output, environ: Mapping[str, str]) -> str | None:
    """How the user's terminal takes pictures; None where strips go to a file."""
    return protocol_of(environ) if out.stderr.is_terminal and not out.silent else None


def _about() -> Any:
    from PIL.PngImagePlugin import PngInfo

    about = PngInfo()
    about.add_text(*_OURS)
    return about


def _is_strip(path: Path) -> bool:
    """Whether a file was written by `ShownPreviews`."""
    from PIL import Image

    if not path.is_file() or path.is_symlink():
        return False
    with suppress(Exception), Image.open(path, formats=("PNG",)) as image:  # of a stranger's file anything may be wrong
        return bool(image.info.get(_OURS[0]) == _OURS[1])
    return False


def protocol_of(environ: Mapping[str, str]) -> str | None:
    """How a terminal takes pictures, as far as the environment tells: "kitty", "iterm", "sixel" or None.

    A multiplexer lets none of them through by default.
    """
    term, program = environ.get("TERM", ""), environ.get("TERM_PROGRAM", "")
    if "TMUX" in environ or term.startswith(("screen", "tmux")):
        return None
    if "KITTY_WINDOW_ID" in environ or term in ("xterm-kitty", "xterm-ghostty"):
        return "kitty"
    if program in ("iTerm.app", "WezTerm") or environ.get("LC_TERMINAL") == "iTerm2":
        return "iterm"
    return "sixel" if term.startswith(("foot", "mlterm", "contour")) or "sixel" in term else None


def kitty(image: Any) -> str:
    """The picture in kitty's graphics protocol: PNG in base64, in chunks."""
    text = _png(image)
    chunks = [text[start : start + _CHUNK] for start in range(0, len(text), _CHUNK)]
    last = len(chunks) - 1
    heads = [f"{'a=T,f=100,q=2,' if number == 0 else ''}m={int(number < last)}" for number in range(len(chunks))]
    return "".join(f"\x1b_G{head};{chunk}\x1b\\" for head, chunk in zip(heads, chunks, strict=True)) + "\n"


def iterm(image: Any) -> str:
    """The picture in iTerm2's protocol for inline images."""
    return f"\x1b]1337;File=inline=1;width={image.width}px;height={image.height}px:{_png(image)}\x07\n"


def sixel(image: Any) -> str:
    """The picture as sixels: bands of six rows, each colour of a palette drawn over the band in turn."""
    import numpy as np

    small = image.quantize(_SIXEL_COLOURS)
    pixels, palette = np.asarray(small), small.getpalette() or []
    parts = [f'\x1bPq"1;1;{image.width};{image.height}']
    for number in range(len(palette) // 3):
        shares = ";".join(str(round(value * 100 / 255)) for value in palette[3 * number : 3 * number + 3])
        parts.append(f"#{number};2;{shares}")
    for top in range(0, image.height, 6):
        band = pixels[top : top + 6]
        weights = 1 << np.arange(len(band))[:, None]
        for number in np.unique(band):
            signs = ((band == number) * weights).sum(axis=0) + 63
            parts.append(f"#{number}{''.join(map(chr, signs))}$")
        parts.append("-")
    return "".join(parts) + "\x1b\\\n"


PROTOCOLS: dict[str, Callable[[Any], str]] = {"kitty": kitty, "iterm": iterm, "sixel": sixel}


def _png(image: Any) -> str:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode("ascii")
