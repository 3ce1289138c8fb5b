"""Names and files of single runs: nothing is overwritten unasked, lost, or left behind."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batches import frames, request, tree
from typer.testing import CliRunner, Result

from vmonarch_cli.cli.app import app
from vmonarch_cli.clip import make
from vmonarch_cli.clip.events import Decoding, Event, Retrying, StepDone
from vmonarch_cli.clip.interrupts import FIRST
from vmonarch_cli.errors import OutputError
from vmonarch_cli.machine.process import Process, this_process
from vmonarch_cli.media.paths import latents_path
from vmonarch_cli.media.publish import atomic, move_exclusive
from vmonarch_cli.media.read import read_clip
from vmonarch_cli.media.write import write_clip
from vmonarch_cli.pipeline.preflight import check_machine
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.plan.resolve import resolve
from vmonarch_cli.timing import ClipResult

pytestmark = pytest.mark.usefixtures("one_thread")


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def flags(model: Path, output: str) -> list[str]:
    shape = ["--size", "48x32", "--num-frames", "17", "--steps", "2", "--guidance-scale", "1", "--dense-every", "0"]
    return ["generate", "-m", str(model), "-p", "red", "--device", "cpu", *shape, "-o", output]


def plan_for(model: Path, output: Path, **more: Any) -> Plan:
    return resolve(request(model, output, prompt="red", **more))


def generate(plan: Plan, **more: Any) -> list[ClipResult]:
    return make.generate(plan, check_machine(plan), **more)


def clip_of(shade: int = 0, count: int = 3) -> np.ndarray[Any, Any]:
    return np.full((count, 16, 16, 3), shade, np.uint8)


# Two runs that planned the same name


@pytest.mark.parametrize("name", ["", "x.mp4", "x.png"])
@pytest.mark.parametrize("when", [StepDone, Decoding])
def test_two_runs_of_one_plan_make_two_clips(tiny_wan_folder: Path, tmp_path: Path, name: str, when: type) -> None:
    plan = plan_for(tiny_wan_folder, tmp_path / "out" / name)
    other: list[ClipResult] = []
    said: list[str] = []

    def in_between(event: Event) -> None:
        if isinstance(event, when) and not other:
            other.extend(generate(plan, on_event=note))
        note(event)

    def note(event: Event) -> None:
        if isinstance(event, Retrying):
            said.append(event.sentence)

    (result,) = generate(plan, on_event=in_between)
    stem = Path(name).stem or "red-s0"
    ending = Path(name).suffix or ".mp4"
    first, second = (result, other[0]) if when is Decoding else (other[0], result)
    assert (first.path.name, second.path.name) == (f"{stem}{ending}", f"{stem}-2{ending}")
    assert [path for path in tree(tmp_path / "out") if "/" not in path] == sorted(
        [f"{stem}{ending}", f"{stem}.json", f"{stem}-2{ending}", f"{stem}-2.json"]
    )
    assert np.array_equal(read_clip(first.path), read_clip(second.path))
    assert said == [f"{stem}{ending} is the name of another run's clip by now: this clip is {stem}-2{ending}"]
    assert second.record["settings"]["output"]["value"] == [str(second.path)]


def test_overwrite_replaces_what_another_run_made(tiny_wan_folder: Path, tmp_path: Path) -> None:
    plan = plan_for(tiny_wan_folder, tmp_path / "x.mp4", overwrite=True)
    generate(plan)
    generate(plan)
    assert tree(tmp_path) == ["x.json", "x.mp4"]


def test_latents_of_an_earlier_run_are_not_overwritten(
    tiny_wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("no")

    with monkeypatch.context() as patch:
        patch.setattr(make, "decode", fail)
        assert call(*flags(tiny_wan_folder, str(tmp_path / "x.mp4"))).exit_code == 1
    before = latents_path(tmp_path / "x.mp4").read_bytes()
    result = call(*flags(tiny_wan_folder, str(tmp_path / "x.mp4")))
    assert result.exit_code == 2
    assert "x.latents.safetensors exists already: a run that did not end saved it, and vmonarch decode" in result.stderr
    result = call(*flags(tiny_wan_folder, f"{tmp_path}/"), "--quiet")
    assert result.exit_code == 0, result.stderr
    assert latents_path(tmp_path / "x.mp4").read_bytes() == before
    assert call("decode", str(latents_path(tmp_path / "x.mp4")), "--device", "cpu", "-q").exit_code == 0
    assert tree(tmp_path) == ["red-s0.json", "red-s0.mp4", "x.json", "x.mp4"]


@pytest.mark.parametrize("name", ["x.mp4", "x.png"])
def test_publishing_replaces_nothing_that_came_meanwhile(tmp_path: Path, name: str) -> None:
    target = tmp_path / name

    def write_late() -> None:
        with atomic(target, overwrite=False) as path:
            write_clip(clip_of(1), path, 8)
            write_clip(clip_of(2), target, 8)

    with pytest.raises(OutputError, match="exists already: pass --overwrite"):
        write_late()
    assert read_clip(target).max() == 2
    assert os.listdir(tmp_path) == [name]  # noqa: PTH208


@pytest.mark.parametrize("missing", [True, False])
def test_without_the_system_call_publishing_is_exclusive_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: bool
) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: object())
    if missing:

        def refuse(*_: Any, **__: Any) -> None:
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr(os, "link", refuse)
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_text("new")
    target.write_text("old")
    with pytest.raises(FileExistsError):
        move_exclusive(source, target)
    assert (source.read_text(), target.read_text()) == ("new", "old")
    target.unlink()
    move_exclusive(source, target)
    assert (source.exists(), target.read_text()) == (False, "new")


# Interrupts and readers that leave


@pytest.mark.parametrize("command", ["generate", "decode"])
def test_the_first_signal_is_answered_and_the_clip_that_it_waited_for_is_named(
    tiny_wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    real = make.decode

    def fail(*_: Any) -> None:
        raise ValueError("no")

    def decode(*args: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return real(*args)

    arguments = flags(tiny_wan_folder, str(tmp_path / "x.mp4"))
    if command == "decode":
        monkeypatch.setattr(make, "decode", fail)
        assert call(*arguments).exit_code == 1
        arguments = ["decode", str(latents_path(tmp_path / "x.mp4")), "--device", "cpu"]
    monkeypatch.setattr(make, "decode", decode)
    result = call(*arguments)
    assert result.exit_code == 130
    assert FIRST in result.stderr
    assert "latents are saved" not in result.stderr
    assert result.stdout.splitlines()[-1] == str(tmp_path / "x.mp4")
    assert tree(tmp_path) == ["x.json", "x.mp4"]


def test_a_reader_that_leaves_costs_no_clip(tiny_wan_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vmonarch_cli", *flags(tiny_wan_folder, str(tmp_path / "x.mp4"))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    for _ in range(3):
        process.stdout.readline()
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait(120) == 0, said
    assert "failed" not in said
    assert "latents are saved" not in said
    assert tree(tmp_path) == ["x.json", "x.mp4"]


# Paths


@pytest.mark.parametrize("ending", [".mp4", ".webm", ".gif", ".png"])
def test_a_colon_in_a_relative_path_is_no_protocol(
    tiny_wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    monkeypatch.chdir(tmp_path)
    output = f"2025-11-28T12:30:00/x{ending}"
    result = call(*flags(tiny_wan_folder, output), "--quiet")
    assert (result.exit_code, result.stdout) == (0, f"{output}\n"), result.stderr
    assert len(read_clip(Path(output))) == 17
    assert call("rerun", output, "-o", f"12:30{ending}", "-q").exit_code == 0
    (tmp_path / "p.txt").write_text("red\n")
    batch = [word for word in flags(tiny_wan_folder, "a:b/") if word not in ("-p", "red")]
    assert call(*batch, "--prompts-file", "p.txt", "-q").exit_code == 0
    assert len(frames(Path("./a:b/red-s0.mp4").absolute())) == 17


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("x" * 240 + ".mp4", "is too long by 5 bytes: .mp4 clips take up to 239 bytes"),
        ("é" * 119 + ".mp4", "is too long by 3 bytes"),
        ("x" * 252 + ".mp4", "is too long: a name has at most 255 bytes"),
        ("a\udcff.mp4", "is not UTF-8: give a path that is"),
        ("a\0b.mp4", "holds a NUL character"),
        ("~nosuchuser/x.mp4", "home folder of a user that this machine lacks"),
        ("/".join(["d" * 200] * 20) + "/x.mp4", "is too long: choose a folder with a shorter path"),
    ],
)
def test_a_path_that_would_fail_later_is_refused_at_once(
    tiny_wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = call(*flags(tiny_wan_folder, name), "--dry-run")
    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_longest_name_that_is_taken_is_written(tiny_wan_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / ("x" * 235 + ".mp4")
    assert call(*flags(tiny_wan_folder, str(output)), "--quiet").exit_code == 0
    assert output.is_file()


@pytest.mark.parametrize("flag", ["--negative-prompt", "--preset", "--image", "--lora", "--set", "--revision"])
def test_half_of_a_surrogate_pair_is_refused_at_once(tiny_wan_folder: Path, tmp_path: Path, flag: str) -> None:
    result = call(*flags(tiny_wan_folder, str(tmp_path / "x.mp4")), flag, "a\udc80=b", "--dry-run")
    assert (result.exit_code, result.stderr) == (2, f"error: {flag} is not valid UTF-8 text\n")


def test_a_missing_encoder_is_said_before_any_work(
    tiny_wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "ffmpeg"
    program.write_text("#!/bin/sh\necho ' V....D mpeg4 MPEG-4'\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    for path, words in ((program, "has no libx264"), (tmp_path / "none", "does not run")):
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(path))
        result = call(*flags(tiny_wan_folder, str(tmp_path / "out" / "x.mp4")))
        assert result.exit_code == 2
        assert f"ffmpeg {path} {words}" in result.stderr
        assert "install imageio-ffmpeg again" in result.stderr
        assert not (tmp_path / "out").exists()
    assert call(*flags(tiny_wan_folder, str(tmp_path / "x.gif")), "--quiet").exit_code == 0


# What killed processes leave


def tag_of_a_dead_process() -> str:
    mine = this_process()
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return Process(mine.place, mine.host, process.pid, "1").tag


def test_what_a_killed_process_left_is_swept_by_the_next_writer(tmp_path: Path) -> None:
    dead = tmp_path / f".index.{tag_of_a_dead_process()}.abcdefgh.tmp"
    alive = tmp_path / f".index.{this_process().tag}.abcdefgh.tmp"
    elsewhere = tmp_path / f".index.{Process('elsewhere', 'elsewhere', 1, '1').tag}.abcdefgh.tmp"
    for folder in (dead, alive, elsewhere, tmp_path / ".mine.tmp"):
        folder.mkdir()
        (folder / "index.html").touch()
    write_clip(clip_of(), tmp_path / "x.gif", 8)
    assert sorted(os.listdir(tmp_path)) == sorted(["x.gif", alive.name, elsewhere.name, ".mine.tmp"])  # noqa: PTH208


def test_a_folder_killed_between_two_renames_comes_back(tmp_path: Path) -> None:
    """Where the two cannot change places in one step."""
    scratch = tmp_path / f".x.{tag_of_a_dead_process()}.abcdefgh.tmp"
    write_clip(clip_of(1), scratch / "replaced.png", 8)
    (scratch / "replaced.png").rename(scratch / "replaced")
    write_clip(clip_of(2), scratch / "x.png", 8)
    write_clip(clip_of(), tmp_path / "y.gif", 8)
    assert read_clip(tmp_path / "x.png").max() == 2
    assert sorted(os.listdir(tmp_path)) == ["x.png", "y.gif"]  # noqa: PTH208


@pytest.mark.parametrize("in_one_step", [True, False])
def test_a_folder_of_pictures_is_replaced_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_one_step: bool
) -> None:
    if not in_one_step:
        monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: object())
    write_clip(clip_of(1, count=5), tmp_path / "x.png", 8)
    write_clip(clip_of(2, count=3), tmp_path / "x.png", 8, overwrite=True)
    assert read_clip(tmp_path / "x.png").shape[0] == 3
    assert read_clip(tmp_path / "x.png").max() == 2
    assert os.listdir(tmp_path) == ["x.png"]  # noqa: PTH208


@pytest.mark.slow
@pytest.mark.parametrize("command", ["generate", "rerun", "compare"])
def test_what_sigterm_leaves_is_swept(tiny_wan_folder: Path, tmp_path: Path, command: str) -> None:
    """A single run, a repetition and a comparison are stopped while ffmpeg writes; the next run cleans up."""
    done = call(*flags(tiny_wan_folder, str(tmp_path / "x.mp4")), "--quiet")
    assert done.exit_code == 0, done.stderr
    arguments = {
        "generate": flags(tiny_wan_folder, str(tmp_path / "y.mp4")),
        "rerun": ["rerun", str(tmp_path / "x.mp4"), "-o", str(tmp_path / "y.mp4")],
        "compare": ["compare", *flags(tiny_wan_folder, f"{tmp_path}/c/")[1:], "--preset", "fast"],
    }[command]
    code = (
        "import imageio.v2, sys, time\n"
        "from vmonarch_cli.cli.app import app\n"
        "real = imageio.v2.get_writer\n"
        "def slow(*args, **more):\n"
        "    print('writing', flush=True); time.sleep(5); return real(*args, **more)\n"
        "imageio.v2.get_writer = slow\n"
        "app(sys.argv[1:])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "writing" in line:
            break
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    folder = tmp_path / "c" if command == "compare" else tmp_path
    write_clip(clip_of(), folder / "z.gif", 8)
    assert not [name for name in os.listdir(folder) if name.endswith(".tmp")]  # noqa: PTH208
