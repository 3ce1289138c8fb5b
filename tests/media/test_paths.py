"""File names and writability, checked before anything runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vmonarch_cli.errors import OutputError
from vmonarch_cli.media.paths import check_format, record_path, resolve_targets, slug
from vmonarch_cli.media.write import write_clip


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("A red circle, moving!", "a-red-circle-moving"),
        ("../../etc/passwd", "etc-passwd"),
        ("größe Ünïcode", "groe-unicode"),
        ("猫", "clip"),
        ("word " * 40, "word-word-word-word-word-word-word-word-word"),
        ("x" * 300, "x" * 48),
    ],
)
def test_slugs(prompt: str, expected: str) -> None:
    assert slug(prompt) == expected


def test_the_default_folder_and_free_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_targets(None, "a cat", 7, 1, False) == (Path("outputs/a-cat-s7.mp4"),)
    assert not Path("outputs").exists()
    Path("outputs").mkdir()
    Path("outputs/a-cat-s7.mp4").touch()
    Path("outputs/a-cat-s7-2.json").touch()
    assert resolve_targets(None, "a cat", 7, 1, False) == (Path("outputs/a-cat-s7-3.mp4"),)
    assert resolve_targets(None, "a cat", 7, 1, True) == (Path("outputs/a-cat-s7.mp4"),)


def test_several_clips(tmp_path: Path) -> None:
    assert [p.name for p in resolve_targets(f"{tmp_path}/", "a cat", 3, 2, False)] == ["a-cat-s3.mp4", "a-cat-s4.mp4"]
    assert [p.name for p in resolve_targets(f"{tmp_path}/x.gif", "a cat", 3, 2, False)] == ["x-1.gif", "x-2.gif"]


def test_a_link_to_nothing_has_the_name(tmp_path: Path) -> None:
    (tmp_path / "x.mp4").symlink_to(tmp_path / "gone.mp4")
    with pytest.raises(OutputError, match=r"x\.mp4 exists already: pass --overwrite"):
        resolve_targets(str(tmp_path / "x.mp4"), "p", 0, 1, False)
    assert resolve_targets(str(tmp_path / "x.mp4"), "p", 0, 1, True) == (tmp_path / "x.mp4",)


def test_a_file_is_a_clip_and_a_folder_is_not(tmp_path: Path) -> None:
    assert resolve_targets(str(tmp_path / "x.MP4"), "p", 0, 1, False) == (tmp_path / "x.MP4",)
    assert resolve_targets(str(tmp_path / "frames.png"), "p", 0, 1, False) == (tmp_path / "frames.png",)
    assert resolve_targets(str(tmp_path), "p", 0, 1, False) == (tmp_path / "p-s0.mp4",)
    assert record_path(tmp_path / "x.mp4") == tmp_path / "x.json"


@pytest.mark.parametrize("taken", ["x.mp4", "x.json"])
def test_existing_files_are_kept(tmp_path: Path, taken: str) -> None:
    (tmp_path / taken).touch()
    with pytest.raises(OutputError) as caught:
        resolve_targets(str(tmp_path / "x.mp4"), "p", 0, 1, False)
    assert caught.value.message == (
        f"{tmp_path / taken} exists already: pass --overwrite to replace it, or another --output"
    )
    assert resolve_targets(str(tmp_path / "x.mp4"), "p", 0, 1, True)


def test_a_folder_of_frames_is_replaced_and_one_with_anything_else_is_not(tmp_path: Path) -> None:
    clip = tmp_path / "x.png"
    clip.mkdir()
    (clip / "frame-0000.png").touch()
    (clip / ".DS_Store").touch()
    assert resolve_targets(str(clip), "p", 0, 1, True) == (clip,)
    (clip / "mine.txt").write_text("mine")
    with pytest.raises(OutputError) as caught:
        resolve_targets(str(clip), "p", 0, 1, True)
    assert caught.value.message == f"{clip} holds 'mine.txt', which is no frame of a clip and would be lost"
    with pytest.raises(OutputError, match="would be lost"):  # it came while the run went on
        write_clip(np.zeros((2, 16, 16, 3), np.uint8), clip, 8, overwrite=True)
    assert sorted(path.name for path in clip.iterdir()) == [".DS_Store", "frame-0000.png", "mine.txt"]


def test_endings(tmp_path: Path) -> None:
    with pytest.raises(OutputError) as caught:
        resolve_targets(str(tmp_path / "x.avi"), "p", 0, 1, False)
    assert caught.value.message == (
        f"output {tmp_path / 'x.avi'} ends in '.avi': valid endings are .mp4, .webm, .gif, .webp, .png (.png makes "
        "a folder of PNGs), and a folder for the clips ends in '/'"
    )
    with pytest.raises(OutputError, match="--output is empty"):
        resolve_targets(" ", "p", 0, 1, False)
    with pytest.raises(OutputError, match=r"a \.gif cannot show 60 frames per second: valid are 1 to 50"):
        check_format((Path("x.gif"),), 60, 32, 32)


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"output folder .*file/sub cannot be made: .*file is not a folder"):
        resolve_targets(f"{tmp_path}/file/sub/", "p", 0, 1, False)
    # /proc refuses new files even to root.
    with pytest.raises(
        OutputError, match=r"output folder /proc/clips cannot be written \(.+\): choose another --output"
    ):
        resolve_targets("/proc/clips/x.mp4", "p", 0, 1, False)


def test_nothing_is_left_by_the_checks(tmp_path: Path) -> None:
    resolve_targets(f"{tmp_path}/deep/er/x.mp4", "p", 0, 1, False)
    assert list(tmp_path.iterdir()) == []
