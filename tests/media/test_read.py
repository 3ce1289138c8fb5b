"""Clips read back: as many frames as were written, and nothing but what the ending says."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from vmonarch_cli.errors import InputError
from vmonarch_cli.media.read import last_frames, one_frame, read_clip
from vmonarch_cli.media.write import write_clip

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"


def still(count: int) -> NDArray[np.uint8]:
    """Equal frames but for a second scene: what a GIF's writer merges."""
    frames = np.zeros((count, 24, 32, 3), np.uint8)
    frames[count // 2 :, 4:12, 4:12] = 255
    return frames


@pytest.mark.parametrize("fps", [1, 8, 15, 16, 24, 30, 50])
@pytest.mark.parametrize("count", [1, 2, 49])
def test_a_gif_has_as_many_frames_as_were_written(tmp_path: Path, fps: int, count: int) -> None:
    path = write_clip(still(count), tmp_path / "x.gif", fps)
    with Image.open(path) as image:
        assert getattr(image, "n_frames", 1) == min(count, 2), "Pillow merges equal frames"
    assert np.array_equal(read_clip(path, fps), still(count))


def test_a_gif_without_a_record_is_read_at_the_rate_that_fits_its_times(tmp_path: Path) -> None:
    frames = still(25)
    frames[24] = 90
    assert np.array_equal(read_clip(write_clip(frames, tmp_path / "x.gif", 16)), frames)
    moving = np.random.default_rng(0).integers(0, 2, (9, 16, 16, 1), np.uint8).repeat(3, -1) * 255
    assert len(read_clip(write_clip(moving, tmp_path / "y.gif", 12))) == 9


def test_a_gif_of_hours_does_not_fill_the_memory(tmp_path: Path) -> None:
    first, second = Image.new("L", (8, 8), 0), Image.new("L", (8, 8), 255)
    first.save(tmp_path / "x.gif", save_all=True, append_images=[second], duration=[655_340, 20])
    with pytest.raises(InputError, match=r"lasts for [\d,]+ frames: valid are up to 4,096"):
        read_clip(tmp_path / "x.gif", 50)


@pytest.mark.parametrize("ending", ["mp4", "webm", "gif", "webp", "png"])
def test_the_frame_in_the_middle(tmp_path: Path, ending: str) -> None:
    frames = still(9)
    path = write_clip(frames, tmp_path / f"x.{ending}", 8)
    assert np.abs(one_frame(path, 5 / 8).astype(int) - frames[5]).max() < 40
    assert np.abs(read_clip(path).astype(int) - frames).max() < 40


def test_a_name_with_a_colon_is_no_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_clip(still(3), tmp_path / "x.mp4", 8).rename(tmp_path / "http:x.mp4")
    monkeypatch.chdir(tmp_path)
    assert len(read_clip(Path("http:x.mp4"))) == 3


def playlist(path: Path) -> None:
    """An HLS playlist of another file."""
    other = write_clip(still(3), path.with_name("other.mp4"), 8)
    path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{other}\n#EXT-X-ENDLIST\n")


def postscript(path: Path) -> None:
    path.write_bytes(EPS)


def postscript_frame(path: Path) -> None:
    path.mkdir()
    (path / "frame-0000.png").write_bytes(EPS)


def pipe_frame(path: Path) -> None:
    path.mkdir()
    os.mkfifo(path / "frame-0000.png")


def png(path: Path) -> None:
    Image.new("RGB", (8, 8)).save(path, "PNG")


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("x.mp4", playlist),
        ("x.mp4", postscript),
        ("x.mp4", png),
        ("x.gif", postscript),
        ("x.gif", png),
        ("x.png", postscript),
        ("x.png", postscript_frame),
        ("x.png", pipe_frame),
        ("x.png", Path.mkdir),
        ("x.mp4", os.mkfifo),
        ("x.gif", os.mkfifo),
        ("x.mp4", Path.touch),
    ],
)
def test_what_is_not_what_its_name_says(
    tmp_path: Path, name: str, made: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("PIL.EpsImagePlugin.has_ghostscript", lambda: pytest.fail("Ghostscript was asked for"))
    made(tmp_path / name)  # type: ignore[operator]
    for read in (lambda: read_clip(tmp_path / name), lambda: one_frame(tmp_path / name, 0.5)):
        with pytest.raises(InputError, match=r"x\.(mp4|gif|png)"):
            read()


def test_frames_of_two_sizes_are_no_clip(tmp_path: Path) -> None:
    (tmp_path / "x.png").mkdir()
    for number, side in enumerate((8, 9)):
        Image.new("RGB", (side, side)).save(tmp_path / "x.png" / f"frame-{number:04d}.png")
    with pytest.raises(InputError, match="cannot be read"):
        read_clip(tmp_path / "x.png")


def test_the_last_frames_of_a_users_video(tmp_path: Path) -> None:
    frames = np.stack([np.full((32, 48, 3), 20 * number, np.uint8) for number in range(8)])
    for name in ("x.mp4", "x.gif"):
        write_clip(frames, tmp_path / name, 8)
        last = last_frames(tmp_path / name, 3)
        assert last.shape == (3, 32, 48, 3)
        assert np.abs(last.astype(int) - frames[5:]).max() < 6
        with pytest.raises(InputError, match=r"has 8 frames, and a clip goes on from the last 9: give a longer video"):
            last_frames(tmp_path / name, 9)
    with pytest.raises(InputError, match="valid are files that end in"):
        last_frames(tmp_path / "x.png", 1)
