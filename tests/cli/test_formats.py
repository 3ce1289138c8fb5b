"""Clips as .webm and .webp, `--quality`, and the record inside a clip's own file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
from command import call

from vmonarch_cli.clip.whole import damage
from vmonarch_cli.media.read import read_clip
from vmonarch_cli.media.tags import read_tag, write_tags

SMALL = (
    "generate",
    "-p",
    'a red circle; 50 % = #1 \\ "two"\nlines',
    "--size",
    "32x32",
    "--num-frames",
    "5",
    "--steps",
    "1",
)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("ending", [".mp4", ".webm"])
def test_a_clip_alone_says_how_it_was_made_and_is_made_again(tmp_path: Path, ending: str) -> None:
    call(*SMALL, "--seed", "7", "-o", f"x{ending}")
    record = json.loads(Path("x.json").read_text())
    inside = json.loads(read_tag(Path(f"x{ending}")) or "")
    gone = {"timing", "file"}
    assert inside["settings"] == {name: entry for name, entry in record["settings"].items() if name != "output"}
    rest = {name: value for name, value in record.items() if name not in gone | {"settings"}}
    assert {name: inside[name] for name in rest} == rest
    assert str(tmp_path) not in json.dumps(inside)
    assert (read_tag(Path(f"x{ending}"), "title") or "").startswith('a red circle; 50 % = #1 \\ "two"')
    assert "seed 7" in (read_tag(Path(f"x{ending}"), "description") or "")

    call(*SMALL, "--seed", "7", "-o", f"elsewhere/x{ending}")  # the same clip is the same file
    assert Path(f"elsewhere/x{ending}").read_bytes() == Path(f"x{ending}").read_bytes()

    Path("sent").mkdir()
    shutil.copy(f"x{ending}", f"sent/renamed{ending}")
    again = call("rerun", f"sent/renamed{ending}")
    assert "identical" in again.stdout
    assert Path(f"sent/renamed-rerun{ending}").is_file()


@pytest.mark.parametrize("name", ["tagged.mp4", "tagged.WEBM", "sound.mp4", "tags.webm"])
def test_a_clip_may_have_any_name(name: str) -> None:
    call(*SMALL, "-o", name)
    assert json.loads(read_tag(Path(name)) or "")["prompt"] == SMALL[2]
    assert len(read_clip(Path(name))) == 5
    assert {path.name for path in Path().iterdir()} == {name, f"{Path(name).stem}.json"}


@pytest.mark.parametrize("found", ["none", "missing"])
def test_clips_that_no_ffmpeg_can_read_are_not_called_damaged(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    call(*SMALL, "-o", "x.mp4")
    Path("x.json").rename("kept.json")
    if found == "none":  # imageio-ffmpeg brings none for every platform
        monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", Mock(side_effect=RuntimeError("No ffmpeg exe")))
        words = "there is no ffmpeg, which .mp4 clips are read with: install imageio-ffmpeg again"
    else:
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "missing")
        words = "so that no .mp4 can be read: install imageio-ffmpeg again"
    for command in (
        ("rerun", "x.mp4"),
        ("compare", "x.mp4", "x.mp4", "-o", "pages"),
        (*SMALL, "--video", "x.mp4", "-o", "y.gif"),
    ):
        assert words in call(*command, code=2).stderr.splitlines()[-1]
    assert sorted(path.name for path in Path().iterdir()) == ["kept.json", "x.mp4"]
    Path("kept.json").rename("x.json")
    assert call("gallery", ".").stdout == "index.html\n"  # the links of its clips are of use all the same


def test_a_clip_that_says_nothing_or_nonsense_cannot_be_repeated(tmp_path: Path) -> None:
    call(*SMALL, "-o", "x.mp4")
    Path("x.json").unlink()
    write_tags(Path("x.mp4"), {"comment": "made with love"})
    stderr = call("rerun", "x.mp4", code=2).stderr
    assert stderr == "error: x.mp4 has no record beside it, and what it says of itself is no record\n"
    write_tags(Path("x.mp4"), {"comment": '{"schema": 1}'})
    assert "error: the record in x.mp4 is not the record of a clip" in call("rerun", "x.mp4", code=2).stderr
    write_tags(Path("x.mp4"), {})
    stderr = call("rerun", "x.mp4", code=2).stderr
    assert stderr == "error: there is no record x.json, and x.mp4 does not say how it was made\n"


@pytest.mark.parametrize("ending", [".webm", ".webp"])
def test_a_clip_that_was_cut_off_is_noticed(ending: str) -> None:
    call(*SMALL, "-o", f"x{ending}")
    clip = Path(f"x{ending}")
    assert damage(clip) is None
    content = clip.read_bytes()
    clip.write_bytes(content[:-40])
    assert damage(clip) == "is cut off"
    clip.write_bytes(b"")
    assert damage(clip) == "is cut off"


def test_a_batch_writes_every_format_and_its_page_shows_them() -> None:
    names = ("a.webm", "b.webp", "c.gif", "d.mp4")
    lines = [{"prompt": "red", "name": name, "quality": 3} for name in names]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = ("--size", "32x32", "--num-frames", "5", "--steps", "1", "-o", "out/")
    call("generate", "--prompts-file", "p.jsonl", *flags)
    assert all(read_clip(Path("out") / name).shape == (5, 32, 32, 3) for name in names)
    page = Path("out/index.html").read_text()
    assert page.count("<video") == 2
    assert all(name in page for name in names)
    record = json.loads(Path("out/a.json").read_text())
    assert record["settings"]["quality"] == {"value": 3, "origin": "prompts file"}
    call("compare", "out/a.webm", "out/b.webp", "out/c.gif")


def test_quality_is_recorded_and_checked() -> None:
    call(*SMALL, "--quality", "1", "-o", "low.mp4")
    call(*SMALL, "-o", "plain.mp4")
    assert json.loads(Path("low.json").read_text())["settings"]["quality"] == {"value": 1, "origin": "flag"}
    assert json.loads(Path("plain.json").read_text())["settings"]["quality"] == {"value": 8, "origin": "default"}
    stderr = call(*SMALL, "--quality", "11", code=2).stderr
    assert stderr == "error: --quality takes a whole number from 1 to 10, got 11\n"
    shown = call("plan", "-p", "x", "--quality", "5", "-o", "x.png")
    assert "warning: --quality 5 changes nothing: PNGs are lossless" in shown.stderr
    assert call("rerun", "low.mp4").exit_code == 0
    assert json.loads(Path("low-rerun.json").read_text())["settings"]["quality"]["value"] == 1
