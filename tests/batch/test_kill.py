"""A batch that is killed at random moments, again and again, ends as one that was not; and memory does not grow.

On small clips of the demo model; where every call that touches a file is a case, on the tiny model of random weights.
A batch here is the whole of it: its clips, records, manifest, claims, and its page.
"""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batches import SIX, batch, frames, machine_of, whole

from vmonarch_cli.batch.events import BatchEvent
from vmonarch_cli.batch.manifest import Manifest
from vmonarch_cli.batch.runner import Limits, run_batch
from vmonarch_cli.clip.events import ClipDone, ClipStarted, Decoding, StepDone
from vmonarch_cli.clip.interrupts import Interrupts
from vmonarch_cli.review.gallery import write_gallery

pytestmark = pytest.mark.slow
KILLS = 100
PAGE = "index.html"


def work(
    model: Path | None,
    folder: Path,
    text: str = SIX,
    on_event: Callable[[BatchEvent], None] | None = None,
    overlap: bool = False,
) -> None:
    """A batch and its page, as `generate --prompts-file` makes them."""
    torch.set_num_threads(1)
    opened = batch(model, folder, text, steps=4 if model is None else 1)
    limits = Limits(overlap=overlap)
    run_batch(opened, machine_of(opened), limits, Interrupts(), on_event=on_event or (lambda event: None))
    write_gallery(folder)


def start(model: Path | None, folder: Path, **more: Any) -> Any:
    """A process of its own; forked, so that it does not import torch again."""
    process = multiprocessing.get_context("fork").Process(target=work, args=(model, folder), kwargs=more)
    process.start()
    return process


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def check(folder: Path, undisturbed: Path, *, once: bool = True) -> None:
    """Six good clips with the frames of the undisturbed run, a page, nothing else; `once`: no denoising done twice."""
    names = [entry.name for entry in Manifest(undisturbed).read().values()]
    assert everything(folder) == sorted([*whole([Path(name).stem for name in names]), PAGE])
    page = (folder / PAGE).read_text()
    for name in names:
        assert np.array_equal(frames(folder / name), frames(undisturbed / name))
        assert json.loads((folder / name).with_suffix(".json").read_text())["clip"] == name
        assert name in page
    denoised: Counter[str] = Counter()
    for line in (folder / "manifest.jsonl").read_text().splitlines():
        if not line.endswith("}"):
            continue  # torn by a kill
        event = json.loads(line)
        if once and event["event"] == "started":
            assert denoised[event["key"]] == 0, "a clip that was denoised was computed from the start"
        denoised[event.get("key", "")] += event["event"] == "denoised"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A batch that nobody kills, and the seconds that it takes."""
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    began = time.monotonic()
    work(None, folder)
    return folder, time.monotonic() - began


@pytest.mark.parametrize(("overlap", "count"), [(False, KILLS), (True, KILLS // 2)])
def test_killed_at_random_moments_and_resumed(
    undisturbed: tuple[Path, float], tmp_path: Path, overlap: bool, count: int
) -> None:
    expected, whole_s = undisturbed
    check(expected, expected)
    moments = random.Random(5)
    kills, number = 0, 0
    while kills < count:
        folder = tmp_path / str(number)
        process = start(None, folder, overlap=overlap)
        process.join(moments.uniform(0, whole_s))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
        else:
            assert process.exitcode == 0
            work(None, folder)  # finds nothing to do, and sweeps
            check(folder, expected)
            number += 1
    work(None, tmp_path / str(number))
    check(tmp_path / str(number), expected)


def test_two_processes_of_which_one_is_killed(undisturbed: tuple[Path, float], tmp_path: Path) -> None:
    """The other one takes the clips over, in the same run; its page shows all of them."""
    expected, whole_s = undisturbed
    moments = random.Random(6)
    for number in range(10):
        folder = tmp_path / str(number)
        first, second = start(None, folder), start(None, folder)
        first.join(moments.uniform(0, whole_s))
        if first.is_alive():
            os.kill(first.pid, signal.SIGKILL)
        first.join()
        second.join(240)
        assert second.exitcode == 0
        work(None, folder)
        check(folder, expected)


AIMS: dict[str, type] = {
    "at the start": ClipStarted,
    "in a step": StepDone,
    "in decoding": Decoding,
    "at the end": ClipDone,
}


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("aim", [*AIMS, "while ffmpeg writes", "while the page is written"])
def test_killed_at_the_worst_moment_and_resumed(
    undisturbed: tuple[Path, float], tmp_path: Path, aim: str, overlap: bool
) -> None:
    def kill_self() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def run() -> None:
        if aim == "while ffmpeg writes":
            real = subprocess.Popen

            def popen(*args: Any, **more: Any) -> Any:
                process = real(*args, **more)
                threading.Timer(0.02, kill_self).start()
                return process

            subprocess.Popen = popen  # type: ignore[misc, assignment]
        elif aim == "while the page is written":
            real_text = Path.write_text

            def write_text(self: Path, content: str, *args: Any, **more: Any) -> int:
                if self.name == PAGE:
                    real_text(self, content[: len(content) // 2])
                    kill_self()
                return real_text(self, content, *args, **more)

            Path.write_text = write_text  # type: ignore[method-assign, assignment]
        seen = [0]

        def on_event(event: BatchEvent) -> None:
            seen[0] += aim in AIMS and isinstance(event, AIMS[aim])
            if seen[0] == 2:
                kill_self()

        work(None, tmp_path / "out", on_event=on_event, overlap=overlap)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    work(None, tmp_path / "out")
    check(tmp_path / "out", undisturbed[0])


AUDITED = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate", "shutil.rmtree")
AUDITED += ("subprocess.Popen", "tempfile.mkdtemp", "os.utime", "os.scandir", "ctypes.call_function")


def killed_at(model: Path, folder: Path, call: int) -> Any:
    """A process that kills itself just before its `call`-th call that touches the folder or starts ffmpeg.

    The interpreter tells of most of them itself (`sys.addaudithook`), whoever makes them; the others are wrapped.
    """

    def run() -> None:
        torch.set_num_threads(1)
        opened = batch(model, folder, "red\n", steps=1)
        machine = machine_of(opened)
        left = [call]

        def count() -> None:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        def hook(event: str, args: tuple[Any, ...]) -> None:
            if event == "subprocess.Popen" or (event in AUDITED and any(_within(arg, folder) for arg in args)):
                count()

        def guarded(real: Any) -> Any:
            def act(*args: Any, **kwargs: Any) -> Any:
                count()
                return real(*args, **kwargs)

            return act

        for name in ("write", "fsync", "ftruncate"):
            setattr(os, name, guarded(getattr(os, name)))
        sys.addaudithook(hook)
        run_batch(opened, machine, Limits(), Interrupts())
        write_gallery(folder)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    return process


def _within(argument: object, folder: Path) -> bool:
    try:
        return isinstance(argument, str | bytes | os.PathLike) and os.fsdecode(argument).startswith(str(folder))
    except (TypeError, ValueError):
        return False


def test_killed_before_every_call_that_touches_a_file_and_resumed(tiny_wan_folder: Path, tmp_path: Path) -> None:
    call, deaths = 0, 0
    while True:
        call += 1
        folder = tmp_path / str(call)
        if killed_at(tiny_wan_folder, folder, call).exitcode == 0:
            break
        deaths += 1
        work(tiny_wan_folder, folder, "red\n")
        assert everything(folder) == sorted([*whole(["red-s0"]), PAGE]), f"killed before call {call}"
        assert np.array_equal(frames(folder / "red-s0.mp4"), frames(tmp_path / "1" / "red-s0.mp4"))
    assert deaths > 60


def test_memory_is_flat_over_fifty_clips(tmp_path: Path) -> None:
    """The process's own memory, Python's objects, tensors, open files and child processes: none of them grows."""

    def resident() -> int:
        # What the allocator keeps of freed memory comes and goes; what is in use is the question.
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def held() -> tuple[int, int, int, int, int]:
        size = resident()
        tensors = sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
        files = len(list(Path("/proc/self/fd").iterdir()))
        children = len(multiprocessing.active_children())
        return size, tracemalloc.get_traced_memory()[0], tensors, files, children

    torch.set_num_threads(1)
    opened = batch(None, tmp_path, "".join(f"red {i}\n" for i in range(50)))
    seen: list[tuple[int, int, int, int, int]] = []
    tracemalloc.start()
    try:
        run_batch(
            opened,
            machine_of(opened),
            Limits(),
            Interrupts(),
            on_event=lambda event: seen.append(held()) if isinstance(event, ClipDone) else None,
        )
    finally:
        tracemalloc.stop()
    assert len(seen) == 50
    early, late = seen[9], seen[-1]
    assert late[0] - early[0] < 20e6, "resident bytes over 40 clips after the first ten"
    assert late[1] - early[1] < 2e6, "bytes of Python's objects"
    assert late[2:] == early[2:], "tensors, open files, child processes"
