"""Clips written and read back: size, rate, content, atomicity."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
from numpy.typing import NDArray

from vmonarch_cli.clip.whole import file_facts
from vmonarch_cli.errors import ModelError, OutputError
from vmonarch_cli.media.encoders import ENCODERS
from vmonarch_cli.media.ffmpeg import frames_in
from vmonarch_cli.media.read import one_frame, read_clip
from vmonarch_cli.media.write import clip_writer, pixels_of, write_clip, write_record


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


@pytest.mark.parametrize(("height", "width"), [(48, 64), (47, 63)])
@pytest.mark.parametrize(("ending", "fps"), [(".webm", 13), (".webp", 13), (".webp", 60)])
def test_the_other_formats_have_the_exact_size_rate_and_content(
    tmp_path: Path, ending: str, fps: int, height: int, width: int
) -> None:
    clip = frames(9, height, width)
    clip[5] = clip[4]  # Pillow merges frames that are equal
    path = write_clip(clip, tmp_path / f"x{ending}", fps)
    read = read_clip(path, fps)
    assert read.shape == clip.shape
    assert np.abs(read.astype(int) - clip).mean() < 4
    assert np.array_equal(read_clip(path), read)
    assert np.abs(one_frame(path, 4.5 / fps).astype(int) - clip[4]).mean() < 5
    if ending == ".webm":
        assert imageio.immeta(path)["codec"] == "vp9"
        assert imageio.immeta(path)["fps"] == pytest.approx(fps)


@pytest.mark.parametrize("ending", [".mp4", ".webm", ".gif", ".webp"])
def test_more_quality_is_more_bytes_and_less_error(tmp_path: Path, ending: str) -> None:
    clip = frames(5) + np.random.default_rng(0).integers(0, 24, (5, 48, 64, 3), np.uint8)
    sizes, errors = [], []
    for quality in (1, 8, 10):
        path = write_clip(clip, tmp_path / f"{quality}{ending}", fps=8, quality=quality)
        sizes.append(path.stat().st_size)
        errors.append(float(np.abs(read_clip(path, 8).astype(int) - clip).mean()))
    assert sizes[0] < sizes[1] <= sizes[2]
    assert errors[0] > errors[1] >= errors[2]
    plain = write_clip(clip, tmp_path / f"plain{ending}", fps=8)
    assert plain.read_bytes() == (tmp_path / f"8{ending}").read_bytes()


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


@pytest.mark.parametrize("name", ["x.mp4", "x.webm", "x.gif", "x.webp", "x.png"])
def test_an_existing_clip_is_kept(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(OutputError, match=r"exists already: pass --overwrite"):
        write_clip(frames(2), tmp_path / name, fps=16)
    assert (tmp_path / name).read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["x.mp4", "x.webm", "x.gif", "x.webp", "x.png"])
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
    monkeypatch.setattr("vmonarch_cli.media.encoders.frames_in", lambda path: (3, None))
    with pytest.raises(OutputError, match="ffmpeg wrote 3 of 7 frames; is the disk full"):
        write_clip(frames(7), tmp_path / "x.mp4", fps=16)
    assert list(tmp_path.iterdir()) == []


def test_an_encoder_that_ends_before_the_clip_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ffmpeg = tmp_path / "ffmpeg"
    ffmpeg.write_text("#!/bin/sh\nhead -c 1000 > /dev/null\n")
    ffmpeg.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(ffmpeg))
    target = tmp_path / "out" / "clip.mp4"
    with pytest.raises(OutputError) as raised:
        write_clip(np.zeros((60, 96, 96, 3), np.uint8), target, 8)
    expected = (
        f"{target} cannot be written: ffmpeg ended before the clip did ([Errno 32] Broken pipe); is the disk full?"
    )
    assert raised.value.message == expected
    assert list(target.parent.iterdir()) == []


@pytest.mark.parametrize("name", ["x.mp4", "x.webm"])
def test_frames_of_a_file_are_counted(tmp_path: Path, name: str) -> None:
    whole = write_clip(frames(7), tmp_path / name, fps=16)
    assert frames_in(whole) == (7, None)
    content = whole.read_bytes()
    cut = tmp_path / f"cut{whole.suffix}"
    cut.write_bytes(content[: len(content) * 3 // 4])
    assert frames_in(cut)[0] < 7
    cut.write_bytes(b"no clip")
    count, fault = frames_in(cut)
    assert count == 0
    assert fault is not None
    assert "Invalid data" in fault


def test_frames_are_counted_where_ffmpegs_progress_does_not_tell_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import imageio_ffmpeg

    silent = tmp_path / "ffmpeg"  # as version 7.0 is of packets that it copies
    silent.write_text(
        f'#!/bin/bash\n{imageio_ffmpeg.get_ffmpeg_exe()} "$@" | grep -av "^frame="\nexit ${{PIPESTATUS[0]}}\n'
    )
    silent.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(silent))
    assert frames_in(write_clip(frames(7), tmp_path / "clip.mp4", fps=16)) == (7, None)


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or (os.cpu_count() or 1) < 2, reason="needs two cores of Linux"
)
def test_an_mp4_does_not_depend_on_the_number_of_cores(tmp_path: Path) -> None:
    clip = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    files, cores = [], os.sched_getaffinity(0)
    try:
        for used in (cores, {min(cores)}):
            os.sched_setaffinity(0, used)
            files.append(write_clip(clip, tmp_path / f"{len(used)}.mp4", fps=16).read_bytes())
    finally:
        os.sched_setaffinity(0, cores)
    assert files[0] == files[1]


def test_endings_and_shapes(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"ends in '\.avi': valid endings are \.mp4, \.webm, \.gif, \.webp, \.png"):
        write_clip(frames(2), tmp_path / "x.avi", fps=16)
    with pytest.raises(ValueError, match="frames must be uint8"):
        write_clip(frames(2).astype(np.float32), tmp_path / "x.mp4", fps=16)  # type: ignore[arg-type]


def test_records_are_valid_json(tmp_path: Path) -> None:
    record = {"prompt": "größe\n<b>", "nan": float("nan"), "path": tmp_path, "list": (1, 2.5, None)}
    path = write_record(tmp_path / "x.json", record)
    text = path.read_text(encoding="utf-8")
    assert "größe" in text
    assert json.loads(text) == {"prompt": "größe\n<b>", "nan": None, "path": str(tmp_path), "list": [1, 2.5, None]}


# Frames that come in parts


@pytest.mark.parametrize("name", ["x.mp4", "x.webm", "x.gif", "x.webp", "x.png"])
def test_parts_make_the_same_file_as_a_whole_clip(tmp_path: Path, name: str) -> None:
    clip = frames(11)
    whole, parted = write_clip(clip, tmp_path / "whole" / name, fps=8), tmp_path / "parts" / name
    with clip_writer(parted, clip.shape[:3], fps=8) as writer:
        for part in (clip[:1], clip[1:5], clip[5:9], clip[9:]):
            writer.add(part)
    assert file_facts(parted) == file_facts(whole)
    assert writer.pixels == pixels_of(clip)
    # The hash of earlier versions: records that they wrote can still be checked.
    assert writer.pixels.sha256 == hashlib.sha256(b"11x48x64x3\n" + clip.tobytes()).hexdigest()


def test_parts_are_encoded_while_later_ones_are_made_and_few_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An encoder that stands still holds up whoever makes frames, after the handful that may wait."""
    encoded: list[int] = []
    go_on = threading.Event()

    class Slow:
        def __init__(self, path: Path, fps: int, count: int, quality: int) -> None:
            path.touch()

        def add(self, part: NDArray[np.uint8]) -> None:
            go_on.wait(30)
            encoded.append(int(part[0, 0, 0, 0]))

        def end(self) -> None: ...

        def drop(self) -> None: ...

    monkeypatch.setitem(ENCODERS, ".mp4", Slow)
    added: list[int] = []

    def make() -> None:
        with clip_writer(tmp_path / "x.mp4", (100, 2, 2), fps=8) as writer:
            for number in range(100):
                writer.add(np.full((1, 2, 2, 3), number, np.uint8))
                added.append(number)

    maker = threading.Thread(target=make)
    maker.start()
    deadline = time.monotonic() + 10
    while len(added) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert 4 <= len(added) < 10, "parts that wait are bounded"
    assert encoded == []
    go_on.set()
    maker.join(30)
    assert encoded == added == list(range(100))


@pytest.mark.parametrize("name", ["x.mp4", "x.png"])
def test_an_error_of_the_encoder_reaches_whoever_makes_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("imageio.v2.get_writer", fail)
    monkeypatch.setattr("PIL.Image.Image.save", fail)
    threads = threading.active_count()

    def make() -> None:
        with clip_writer(tmp_path / name, (500, 48, 64), fps=8) as writer:
            for _ in range(500):
                writer.add(frames(1))
                time.sleep(0.001)
            pytest.fail("nobody told the maker of frames")

    with pytest.raises(OutputError, match=f"{name} cannot be written: No space left on device"):
        make()
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() == threads


@pytest.mark.parametrize("name", ["x.mp4", "x.webm", "x.gif", "x.webp", "x.png"])
@pytest.mark.parametrize("error", [OSError(5, "of the decoder"), KeyboardInterrupt(), ValueError("no")])
def test_an_error_between_parts_is_raised_as_it_came_and_leaves_nothing(
    tmp_path: Path, name: str, error: BaseException
) -> None:
    threads = threading.active_count()

    def make() -> None:
        with clip_writer(tmp_path / name, (9, 48, 64), fps=8) as writer:
            writer.add(frames(4))
            raise error

    with pytest.raises(type(error)) as caught:
        make()
    assert caught.value is error
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() == threads


def test_parts_that_are_no_whole_clip_are_refused(tmp_path: Path) -> None:
    def make(part: NDArray[np.uint8]) -> None:
        with clip_writer(tmp_path / "x.mp4", (9, 48, 64), fps=8) as writer:
            writer.add(part)

    with pytest.raises(ModelError, match=r"9 frames of 64x48 were planned, and 4 frames came"):
        make(frames(4))
    with pytest.raises(ModelError, match=r"9 frames of 64x48 were planned, and frames of 32x48 came"):
        make(frames(9, 48, 32))
    assert list(tmp_path.iterdir()) == []


def test_pngs_are_numbered_by_the_length_of_the_clip(tmp_path: Path) -> None:
    encoder = ENCODERS[".png"](tmp_path / "x.png", 8, 10001, 8)
    encoder.add(frames(2))
    encoder.end()
    assert sorted(file.name for file in (tmp_path / "x.png").iterdir()) == ["frame-00000.png", "frame-00001.png"]
