"""Pictures of users: what a viewer shows is what a model gets, and nothing but pictures is opened."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vmonarch_cli.errors import InputError
from vmonarch_cli.media.pictures import load_picture

RAMP = np.arange(256)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n1 0 0 setrgbcolor 0 0 9 9 rectfill\nshowpage\n"


def loaded(path: Path) -> np.ndarray:
    image = load_picture(path, f"image {path.name}")
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_a_ramp_of_16_bit_greys_keeps_its_levels(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"ramp.{ending}"
    Image.fromarray((RAMP * 257).astype(np.uint16)[None]).save(path)
    assert (loaded(path) == RAMP[None, :, None]).all()


def test_floats_from_0_to_1_keep_their_levels(tmp_path: Path) -> None:
    Image.fromarray((RAMP / 255).astype(np.float32)[None]).save(tmp_path / "ramp.tiff")
    assert (loaded(tmp_path / "ramp.tiff") == RAMP[None, :, None]).all()


@pytest.mark.parametrize("worst", [1.5, -0.5, float("nan"), float("inf")])
def test_other_floats_are_refused(tmp_path: Path, worst: float) -> None:
    Image.fromarray(np.array([[0.5, worst]], np.float32)).save(tmp_path / "x.tiff")
    with pytest.raises(InputError, match=r"^image x\.tiff holds values from .*: valid are 8 or 16 bits"):
        loaded(tmp_path / "x.tiff")


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "RGB", "L", "I;16"])
def test_what_is_transparent_is_white_and_not_what_hides_there(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.png"
    match kind:
        case "RGBA":
            Image.fromarray(np.array([[[255, 0, 255, 0], [10, 20, 30, 255]]], np.uint8)).save(path)
            shown = [10, 20, 30]
        case "LA":
            Image.fromarray(np.array([[[90, 0], [20, 255]]], np.uint8)).save(path)
            shown = [20] * 3
        case "P":
            image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
            image.putpalette([255, 0, 255, 10, 20, 30])
            image.save(path, transparency=0)
            shown = [10, 20, 30]
        case "RGB":
            Image.fromarray(np.array([[[255, 0, 255], [10, 20, 30]]], np.uint8)).save(path, transparency=(255, 0, 255))
            shown = [10, 20, 30]
        case "L":
            Image.fromarray(np.array([[90, 20]], np.uint8)).save(path, transparency=90)
            shown = [20] * 3
        case _:
            Image.fromarray(np.array([[90 * 257, 20 * 257]], np.uint16)).save(path, transparency=90 * 257)
            shown = [20] * 3
    assert loaded(path).tolist() == [[[255] * 3, shown]]


def test_half_transparent_is_mixed_with_white(tmp_path: Path) -> None:
    Image.fromarray(np.array([[[0, 0, 0, 128]]], np.uint8)).save(tmp_path / "x.png")
    assert loaded(tmp_path / "x.png").tolist() == [[[127] * 3]]


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "bmp", "gif", "tiff"])
def test_formats_that_are_taken(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"x.{ending}"
    Image.new("RGB", (8, 8), (200, 30, 40)).save(path)
    assert np.abs(loaded(path).astype(int) - (200, 30, 40)).max() < 12


def test_a_photo_taken_sideways_is_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (16, 8)).save(tmp_path / "x.jpg", exif=exif)
    assert loaded(tmp_path / "x.jpg").shape == (16, 8, 3)


def test_postscript_in_disguise_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a program was started"))
    monkeypatch.setattr("PIL.EpsImagePlugin.has_ghostscript", lambda: True)
    (tmp_path / "x.png").write_bytes(EPS)
    with pytest.raises(InputError, match=r"^image x\.png cannot be read: give a PNG, JPEG or WebP file$"):
        loaded(tmp_path / "x.png")


def test_what_is_no_picture(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "text.png").write_text("no picture")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "whole.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "whole.png").read_bytes()[:6000])
    for path, reason in (
        (tmp_path / "pipe.png", "is a pipe, not a file"),
        (tmp_path, "is a folder, not a file"),
        (Path("/dev/zero"), "is a device, not a file"),
        (tmp_path / "text.png", "cannot be read"),
        (tmp_path / "torn.png", "cannot be read"),
        (tmp_path / "none.png", "does not exist"),
        (tmp_path / ("x" * 256), "File name too long"),
    ):
        with pytest.raises(InputError, match=reason):
            loaded(path)


def test_a_picture_of_billions_of_pixels(tmp_path: Path) -> None:
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    (tmp_path / "x.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    )
    with pytest.raises(InputError, match=r"^image x\.png is too large: valid are up to [\d,]+ pixels$"):
        loaded(tmp_path / "x.png")
