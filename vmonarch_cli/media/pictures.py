"""Pictures of users as 8-bit RGB: named formats alone, 16 bits and floats scaled, transparent parts white. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vmonarch_cli.errors import InputError
from vmonarch_cli.untrusted.files import require_regular

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""What Pillow may open. Without names it takes what the content asks for, and starts Ghostscript for PostScript."""
_VALID = "give a PNG, JPEG or WebP file"


def load_picture(
    path: Path, name: str, missing: str | None = None, formats: tuple[str, ...] = FORMATS, valid: str = _VALID
) -> Image:
    """The picture in a file, upright, in mode RGB; of an animation the first frame.

    16-bit greys and floats from 0 to 1 are scaled to 8 bits, and what is transparent is shown on white, as a viewer
    shows it.

    Args:
        path: a regular file.
        name: opens the sentence of an error ("image x.png").
        missing: the whole sentence for a file that does not exist.
        formats: Pillow's names of the formats that it may open.
        valid: ends the sentence about a file that cannot be read.

    Raises:
        InputError: no regular file, another format, damaged, too large, or values out of range.

    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    require_regular(path, name, missing=missing)
    try:
        with Image.open(path, formats=formats) as image:
            image.load()
            return to_rgb(ImageOps.exif_transpose(image), name)
    except Image.DecompressionBombError:
        raise InputError(f"{name} is too large: valid are up to {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError, KeyError, TypeError):
        # A damaged file makes Pillow's readers raise any of these.
        raise InputError(f"{name} cannot be read: {valid}") from None


def to_rgb(image: Image, name: str) -> Image:
    """A picture of any mode in mode RGB (see `load_picture`); InputError for floats outside 0 to 1."""
    import numpy as np
    import PIL.Image

    hidden = _hidden(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = PIL.Image.fromarray(_eight_bits(np.asarray(image), name))
    if hidden is None:
        return image.convert("RGB")
    return PIL.Image.composite(PIL.Image.new("RGB", image.size, "white"), image.convert("RGB"), hidden)


def _hidden(image: Image) -> Image | None:
    """How transparent each pixel is (mode L: 255 shows nothing of it), None for a picture without transparency."""
    import numpy as np
    import PIL.Image
    from PIL import ImageChops

    key = image.info.get("transparency")
    if image.mode.startswith("I") and isinstance(key, int):
        return PIL.Image.fromarray(np.where(np.asarray(image) == key, 255, 0).astype(np.uint8))
    if not image.has_transparency_data:
        return None
    return ImageChops.invert(image.convert("RGBA").getchannel("A"))


def _eight_bits(values: np.ndarray, name: str) -> np.ndarray:
    """Greys (H, W) of 16 bits, or floats from 0 to 1, as uint8."""
    import numpy as np

    top = 1.0 if values.dtype.kind == "f" else 65535
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= top):
        raise InputError(f"{name} holds values from {low:g} to {high:g}: valid are 8 or 16 bits, or floats from 0 to 1")
    return np.rint(values.astype(np.float64) * (255 / top)).astype(np.uint8)
