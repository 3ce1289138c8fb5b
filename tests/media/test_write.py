"""Clips written and read back: size, rate, content, atomicity."""

from __future__ import annotations

import json
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
from numpy.typing import NDArray

from vmonarch_cli.errors import OutputError
from vmonarch_cli.media.write import write_clip, write_record


def frames(count: int = 7, height: int = 48, width: int = 64) -> NDArray[np.uint8]:
    """A red square that moves over a smooth ground."""
    y, x = np.mgrid[:height, :width]
    ground = np.stack([x * 120 // width, y * 120 // height, np.full_like(x, 90)], -1)
    clip = np.repeat(ground[None], count, 0).astype(np.uint8)
    for i in range(count):
        clip[i, 10:30, 5 + 4 * i : 25 + 4 * i] = (220, 30, 40)
    return clip


@pytest.mark.parametrize(("height", "width"), [(48, 64), (50, 66), (47, 63), (47, 64)])
def test_mp4_has_the_exact_size_rate_and_content(tmp_path: Path, height: int, width: int) -> None:
    clip = frames(9, height, width)
    path = write_clip(clip, tmp_path / "sub" / "x.mp4", fps=13)
    read, meta = imageio.imread(path), imageio.immeta(path)
    assert read.shape == clip.shape
    assert meta["fps"] == pytest.approx(13)
    assert meta["codec"] == "h264"
    assert meta["pix_fmt"].startswith("yuv420p" if height % 2 == width % 2 == 0 else "yuv444p")
    assert "bt709" in meta["pix_fmt"]
    assert np.abs(read.astype(int) - clip).mean() < 3
    assert np.abs(read[4, 20, 30].astype(int) - clip[4, 20, 30]).max() < 12


def test_one_frame(tmp_path: Path) -> None:
    assert imageio.imread(write_clip(frames(1), tmp_path / "x.mp4", fps=16)).shape[0] == 1


def test_gif_keeps_the_rate_in_the_mean(tmp_path: Path) -> None:
    path = write_clip(frames(13), tmp_path / "x.gif", fps=16)
    assert imageio.imread(path).shape == (13, 48, 64, 3)
    durations = [imageio.immeta(path, index=i)["duration"] for i in range(13)]
    assert set(durations) <= {60, 70}
    assert sum(durations) == pytest.approx(13 / 16 * 1000, abs=10)


def test_png_folder_is_lossless_and_replaced_whole(tmp_path: Path) -> None:
    clip = frames(5)
    path = write_clip(clip, tmp_path / "x.png", fps=16)
    assert sorted(p.name for p in path.iterdir()) == [f"frame-{i:04d}.png" for i in range(5)]
    assert np.array_equal(np.stack([imageio.imread(p) for p in sorted(path.iterdir())]), clip)
    write_clip(clip[:2], path, fps=16, overwrite=True)
    assert len(list(path.iterdir())) == 2


@pytest.mark.parametrize("name", ["x.mp4", "x.gif", "x.png"])
def test_an_existing_clip_is_kept(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(OutputError, match=r"exists already: pass --overwrite"):
        write_clip(frames(2), tmp_path / name, fps=16)
    assert (tmp_path / name).read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["x.mp4", "x.gif", "x.png"])
def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OutputError, match="cannot be written: No space left on device"):
        write_clip(frames(2), tmp_path / name, fps=16)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_clip(frames(2), tmp_path / "x.mp4", fps=16)
    assert list(tmp_path.iterdir()) == []


def test_an_encoder_that_stops_early_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imageio_ffmpeg.count_frames_and_secs", lambda path: (3, 0.2))
    with pytest.raises(OutputError, match="ffmpeg wrote 3 of 7 frames; is the disk full"):
        write_clip(frames(7), tmp_path / "x.mp4", fps=16)
    assert list(tmp_path.iterdir()) == []


def test_endings_and_shapes(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"ends in '\.avi': valid endings are \.mp4, \.gif, \.png"):
        write_clip(frames(2), tmp_path / "x.avi", fps=16)
    with pytest.raises(ValueError, match="frames must be uint8"):
        write_clip(frames(2).astype(np.float32), tmp_path / "x.mp4", fps=16)  # type: ignore[arg-type]


def test_records_are_valid_json(tmp_path: Path) -> None:
    record = {"prompt": "größe\n<b>", "nan": float("nan"), "path": tmp_path, "list": (1, 2.5, None)}
    path = write_record(tmp_path / "x.json", record)
    text = path.read_text(encoding="utf-8")
    assert "größe" in text
    assert json.loads(text) == {"prompt": "größe\n<b>", "nan": None, "path": str(tmp_path), "list": [1, 2.5, None]}
