"""A batch that is killed at random moments, again and again, ends as one that was not; and memory does not grow.

On small clips of the demo model; where every system call is a case, on the tiny model of random weights.
"""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batches import SIX, batch, frames, machine_of, tree, whole

from vmonarch_cli.batch.manifest import Manifest
from vmonarch_cli.batch.runner import Limits, run_batch
from vmonarch_cli.clip.interrupts import Interrupts

pytestmark = pytest.mark.slow
KILLS = 30


def work(model: Path | None, folder: Path, text: str = SIX) -> None:
    torch.set_num_threads(1)
    opened = batch(model, folder, text, steps=4)
    run_batch(opened, machine_of(opened), Limits(), Interrupts())


def start(model: Path | None, folder: Path) -> Any:
    """A process of its own; forked, so that it does not import torch again."""
    process = multiprocessing.get_context("fork").Process(target=work, args=(model, folder))
    process.start()
    return process


def check(folder: Path, undisturbed: Path) -> None:
    """Six good clips with the frames of the undisturbed run, nothing else, and no denoising done twice."""
    names = [entry.name for entry in Manifest(undisturbed).read().values()]
    assert tree(folder) == whole([Path(name).stem for name in names])
    for name in names:
        assert np.array_equal(frames(folder / name), frames(undisturbed / name))
        assert json.loads((folder / name).with_suffix(".json").read_text())["clip"] == name
    denoised: Counter[str] = Counter()
    for line in (folder / "manifest.jsonl").read_text().splitlines():
        if not line.endswith("}"):
            continue  # torn by a kill
        event = json.loads(line)
        if event["event"] == "started":
            assert denoised[event["key"]] == 0, "a clip that was denoised was computed from the start"
        denoised[event.get("key", "")] += event["event"] == "denoised"


def test_killed_at_random_moments_and_resumed(tmp_path: Path) -> None:
    began = time.monotonic()
    work(None, tmp_path / "undisturbed")
    whole_s = time.monotonic() - began
    check(tmp_path / "undisturbed", tmp_path / "undisturbed")
    moments = random.Random(5)
    kills, finished, number = 0, 0, 0
    while kills < KILLS:
        folder = tmp_path / str(number)
        process = start(None, folder)
        process.join(moments.uniform(0, whole_s))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
        else:
            assert process.exitcode == 0
            work(None, folder)  # finds nothing to do, and sweeps
            check(folder, tmp_path / "undisturbed")
            finished, number = finished + 1, number + 1
    work(None, tmp_path / str(number))
    check(tmp_path / str(number), tmp_path / "undisturbed")
    assert kills == KILLS


SYSTEM_CALLS = ("replace", "link", "unlink", "write", "fsync", "mkdir", "rename", "rmdir", "open")


def killed_at(model: Path, folder: Path, call: int) -> Any:
    """A process that kills itself just before its `call`-th system call that changes the folder."""

    def run() -> None:
        left = [call]

        def guarded(real: Any) -> Any:
            def act(*args: Any, **kwargs: Any) -> Any:
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            return act

        for name in SYSTEM_CALLS:
            setattr(os, name, guarded(getattr(os, name)))
        torch.set_num_threads(1)
        opened = batch(model, folder, "red\n", steps=1)
        run_batch(opened, machine_of(opened), Limits(), Interrupts())
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    return process


def test_killed_before_every_system_call_and_resumed(tiny_wan_folder: Path, tmp_path: Path) -> None:
    call, deaths = 0, 0
    while True:
        call += 1
        folder = tmp_path / str(call)
        if killed_at(tiny_wan_folder, folder, call).exitcode == 0:
            break
        deaths += 1
        torch.set_num_threads(1)
        opened = batch(tiny_wan_folder, folder, "red\n", steps=1)
        run_batch(opened, machine_of(opened), Limits(), Interrupts())
        assert tree(folder) == whole(["red-s0"]), f"killed before call {call}"
        assert np.array_equal(frames(folder / "red-s0.mp4"), frames(tmp_path / "1" / "red-s0.mp4"))
    assert deaths > 20


def test_memory_is_flat_over_fifty_clips(tmp_path: Path) -> None:
    from vmonarch_cli.events import ClipDone

    def resident() -> int:
        # What the allocator keeps of freed memory comes and goes; what is in use is the question.
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    torch.set_num_threads(1)
    sizes = []
    opened = batch(None, tmp_path, "".join(f"red {i}\n" for i in range(50)))
    run_batch(
        opened,
        machine_of(opened),
        Limits(),
        Interrupts(),
        on_event=lambda event: sizes.append(resident()) if isinstance(event, ClipDone) else None,
    )
    assert len(sizes) == 50
    assert sizes[-1] - sizes[9] < 20e6, "40 clips after the first ten"
