"""Batches that go wrong in every way that was thought of: the rest is made, and the manifest is true."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from batches import batch, frames, machine_of, request, tree, whole
from typer.testing import CliRunner, Result

from vmonarch_cli.batch.claims import Claims
from vmonarch_cli.batch.events import BatchEvent, ClipFailed, WaitingForOthers
from vmonarch_cli.batch.folder import Batch, Terms
from vmonarch_cli.batch.manifest import Manifest, ManifestEntry
from vmonarch_cli.batch.runner import Limits, run_batch
from vmonarch_cli.cli.app import app
from vmonarch_cli.clip import make as run
from vmonarch_cli.clip.events import ClipStarted, Decoding, ModelLoaded, Retrying, StepDone
from vmonarch_cli.clip.interrupts import Interrupted, Interrupts
from vmonarch_cli.clip.record_model import read_record
from vmonarch_cli.errors import NonFiniteError, OutputError
from vmonarch_cli.media.paths import latents_path
from vmonarch_cli.pipeline.preflight import check_machine

THREE = "red\nblue\na circle\n"
NAMES = ["red-s0", "blue-s0", "a-circle-s0"]


pytestmark = pytest.mark.usefixtures("one_thread")


def make(opened: Batch, events: list[Any] | None = None, **limits: Any) -> dict[str, ManifestEntry]:
    seen: list[BatchEvent] = [] if events is None else events
    return run_batch(opened, machine_of(opened), Limits(**limits), Interrupts(), on_event=seen.append)


def status(folder: Path) -> dict[str, str]:
    return {entry.name: entry.status for entry in Manifest(folder).read().values()}


def events_of(folder: Path) -> list[tuple[str, str]]:
    """(event, clip's name) of every line of a manifest but the header."""
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    names = {line["key"]: line["name"] for line in lines if line["event"] == "planned"}
    return [(line["event"], names[line["key"]]) for line in lines if "key" in line]


@pytest.fixture
def fail_decode(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make run.decode raise the given errors, in turn, then work."""

    def inject(*errors: Exception | None) -> None:
        real, left = run.decode, list(errors)

        def decode(*args: Any) -> Any:
            error = left.pop(0) if left else None
            if error is not None:
                raise error
            return real(*args)

        monkeypatch.setattr(run, "decode", decode)

    return inject


# Runs that go well


def test_a_batch_is_what_single_runs_make(tiny_wan_folder: Path, tmp_path: Path) -> None:
    from vmonarch_cli.plan.resolve import resolve

    events: list[Any] = []
    opened = batch(tiny_wan_folder, tmp_path / "out", THREE, num_videos=2)
    entries = make(opened, events)
    assert {entry.status for entry in entries.values()} == {"done"}
    names = [f"{name}{seed}" for name in ("red-s", "blue-s", "a-circle-s") for seed in (0, 1)]
    assert tree(tmp_path / "out") == whole(names)
    assert sum(isinstance(event, ModelLoaded) for event in events) == 1
    assert [event.index for event in events if isinstance(event, ClipStarted)] == list(range(6))
    assert {event.clip for event in events if isinstance(event, StepDone | Decoding)} == set(range(6))

    alone = request(tiny_wan_folder, tmp_path / "alone.mp4", prompt="blue", seed=1)
    plan = resolve(alone)
    (result,) = run.generate(plan, check_machine(plan))
    assert np.array_equal(frames(result.path), frames(tmp_path / "out" / "blue-s1.mp4"))
    record = json.loads((tmp_path / "out" / "blue-s1.json").read_text())
    assert (record["prompt"], record["seed"], record["clip"], record["retries"]) == ("blue", 1, "blue-s1.mp4", [])
    assert record["settings"]["output"]["value"] == [str(tmp_path / "out" / "blue-s1.mp4")]


def test_lines_with_settings_of_their_own(tiny_wan_folder: Path, tmp_path: Path) -> None:
    lines = [
        {"prompt": "red", "output": "one.gif", "preset": "dense", "flow_shift": 5.0, "size": "48x32"},
        {"prompt": "red", "output": "two.png", "preset": "fast", "size": "64x32"},
        {"prompt": "red", "output": "three", "preset": "dense", "size": "48x32"},
    ]
    text = "\n".join(map(json.dumps, lines))
    flags: dict[str, Any] = {"format": "jsonl", "height": None, "width": None}
    make(batch(tiny_wan_folder, tmp_path / "a", text, **flags))
    make(batch(tiny_wan_folder, tmp_path / "b", "\n".join(text.split("\n")[::-1]), **flags))
    for name, impl, width in (("one.gif", "dense", 48), ("two.png", "torch", 64), ("three.mp4", "dense", 48)):
        assert (tmp_path / "a" / name).exists()
        record = json.loads((tmp_path / "a" / name).with_suffix(".json").read_text())
        assert (record["impl"], record["settings"]["width"]["value"]) == (impl, width)
    for name in ("one.gif", "three.mp4"):
        assert np.array_equal(frames(tmp_path / "a" / name), frames(tmp_path / "b" / name)), "whatever ran before"
    assert not np.array_equal(frames(tmp_path / "a" / "one.gif"), frames(tmp_path / "a" / "three.mp4"))


def test_what_is_done_is_not_made_again_and_loads_nothing(tiny_wan_folder: Path, tmp_path: Path) -> None:
    make(batch(tiny_wan_folder, tmp_path, "red\n"))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.suffix != ".jsonl"}
    events: list[Any] = []
    make(batch(tiny_wan_folder, tmp_path, "red\n"), events)
    assert events == []
    make(batch(tiny_wan_folder, tmp_path, "red\nblue\n"), events)
    assert [event.index for event in events if isinstance(event, ClipStarted)] == [1]
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert tree(tmp_path) == whole(["red-s0", "blue-s0"])


def test_overwrite_and_no_resume_make_clips_again(tiny_wan_folder: Path, tmp_path: Path) -> None:
    make(batch(tiny_wan_folder, tmp_path, "red\n"))
    old = (tmp_path / "red-s0.mp4").stat().st_ino
    make(batch(tiny_wan_folder, tmp_path, "red\n", terms=Terms(overwrite=True)))
    assert (tmp_path / "red-s0.mp4").stat().st_ino != old
    assert tree(tmp_path) == whole(["red-s0"])
    make(batch(tiny_wan_folder, tmp_path, "red\n", terms=Terms(resume=False)))
    assert tree(tmp_path) == whole(["red-s0", "red-s0-2"])


# Runs that go wrong


def test_decoding_out_of_memory_is_tiled_and_recorded(tiny_wan_folder: Path, tmp_path: Path, fail_decode: Any) -> None:
    fail_decode(None, torch.OutOfMemoryError("CUDA out of memory"))
    events: list[Any] = []
    entries = make(batch(tiny_wan_folder, tmp_path, THREE), events)
    assert [entry.status for entry in entries.values()] == ["done"] * 3
    retry = {"stage": "decode", "reason": "out of memory", "with": "tiling"}
    assert [entry.retries for entry in entries.values()] == [[], [retry], []]
    assert json.loads((tmp_path / "blue-s0.json").read_text())["retries"] == [retry]
    (tmp_path / "blue-s0.json").unlink()
    assert read_record(tmp_path / "blue-s0.mp4").retries == [retry], "the clip says so, too"
    said = [event for event in events if isinstance(event, Retrying)]
    assert said == [Retrying(1, "decoding ran out of memory: trying again with tiling")]


def test_a_clip_that_never_fits_fails_and_keeps_its_latents(
    tiny_wan_folder: Path, tmp_path: Path, fail_decode: Any
) -> None:
    fail_decode(None, *[RuntimeError("DefaultCPUAllocator: can't allocate memory: not enough memory")] * 2)
    events: list[Any] = []
    make(batch(tiny_wan_folder, tmp_path, THREE), events)
    assert status(tmp_path) == {"red-s0.mp4": "done", "blue-s0.mp4": "failed", "a-circle-s0.mp4": "done"}
    (failed,) = (event for event in events if isinstance(event, ClipFailed))
    assert (failed.clip, failed.line) == (1, 2)
    assert failed.sentence.startswith("decoding ran out of memory, in every way that it was tried")
    assert tree(tmp_path) == sorted([*whole(["red-s0", "a-circle-s0"]), "blue-s0.latents.safetensors"])

    fail_decode()
    make(batch(tiny_wan_folder, tmp_path, THREE), events)
    assert status(tmp_path)["blue-s0.mp4"] == "failed", "only --retry-failed tries again"
    make(batch(tiny_wan_folder, tmp_path, THREE, terms=Terms(retry_failed=True)))
    assert tree(tmp_path) == whole(NAMES)
    assert [event for event, name in events_of(tmp_path) if name == "blue-s0.mp4"] == [
        "planned", "started", "denoised", "failed", "again", "decoding", "done",
    ]  # fmt: skip


def test_latents_that_are_not_finite_are_made_once_more_dense(
    tiny_wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = run.denoise

    def denoise(pipeline: Any, session: Any, *args: Any, **kwargs: Any) -> Any:
        if session.preset.attention != "dense" and kwargs["seed"] == 1:
            raise NonFiniteError("latents stopped being finite in step 1 of 2, and no clip was written: try this")
        return real(pipeline, session, *args, **kwargs)

    monkeypatch.setattr(run, "denoise", denoise)
    events: list[Any] = []
    make(batch(tiny_wan_folder, tmp_path / "a", "red\n", num_videos=3), events)
    (said,) = (event.sentence for event in events if isinstance(event, Retrying))
    assert said.endswith("and no clip was written: trying once more with dense attention")
    record = json.loads((tmp_path / "a" / "red-s1.json").read_text())
    assert (record["impl"], record["retries"][0]["with"]) == ("dense", "dense attention")
    assert record["preset"]["name"] == "balanced"
    other = json.loads((tmp_path / "a" / "red-s2.json").read_text())
    assert (other["impl"], other["retries"]) == ("torch", [])
    make(batch(tiny_wan_folder, tmp_path / "b", "red\n", num_videos=3), retry_dense=False)
    assert list(status(tmp_path / "b").values()) == ["done", "failed", "done"]
    make(batch(tiny_wan_folder, tmp_path / "c", "red\n", num_videos=3, preset="dense"))
    assert list(status(tmp_path / "c").values()) == ["done"] * 3


def test_whatever_one_clip_dies_of_the_others_are_made(tiny_wan_folder: Path, tmp_path: Path, fail_decode: Any) -> None:
    fail_decode(ValueError("shapes\nand a page"), NonFiniteError("decoded frames are not finite"), None)
    make(batch(tiny_wan_folder, tmp_path, THREE))
    assert [entry.error for entry in Manifest(tmp_path).read().values()] == [
        "unexpected ValueError: shapes", "decoded frames are not finite", None,
    ]  # fmt: skip


def test_max_failures(tiny_wan_folder: Path, tmp_path: Path, fail_decode: Any) -> None:
    fail_decode(*[ValueError("no")] * 3)
    make(batch(tiny_wan_folder, tmp_path, THREE), max_failures=2)
    assert list(status(tmp_path).values()) == ["failed", "failed", "planned"]
    make(batch(tiny_wan_folder, tmp_path, THREE), max_failures=1)
    assert list(status(tmp_path).values()) == ["failed", "failed", "failed"], "earlier failures do not count"


def test_a_file_that_is_not_the_batchs_own_is_not_replaced(tiny_wan_folder: Path, tmp_path: Path) -> None:
    opened = batch(tiny_wan_folder, tmp_path, THREE)
    opened.clips[0].path.write_text("mine")
    make(opened)
    assert (tmp_path / "red-s0.mp4").read_text() == "mine"
    assert list(status(tmp_path).values()) == ["failed", "done", "done"]


@pytest.mark.parametrize("moment", ["latents", "clip", "record", "manifest"])
def test_a_full_disk_stops_the_batch_and_leaves_nothing_half_written(
    tiny_wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    opened = batch(tiny_wan_folder, tmp_path, THREE)
    full = OSError(28, "No space left on device")
    calls = {"n": 0}

    def fail_second(real: Any, counts: Callable[[Any], bool] = lambda what: True) -> Any:
        def write(*args: Any, **kwargs: Any) -> Any:
            calls["n"] += counts(args[-1])
            if calls["n"] == 2:
                raise full
            return real(*args, **kwargs)

        return write

    with monkeypatch.context() as patch:
        if moment == "latents":
            patch.setattr(Path, "write_bytes", fail_second(Path.write_bytes))
        elif moment == "clip":
            patch.setattr("imageio.v2.get_writer", fail_second(imageio.get_writer))
        elif moment == "record":
            patch.setattr(Path, "write_text", fail_second(Path.write_text, lambda text: text.startswith("{")))
        else:
            real = os.write

            def write(file: int, data: bytes) -> int:
                if b'"done"' in data and Manifest(tmp_path).read()[opened.clips[0].key].status == "done":
                    raise full
                return real(file, data)

            patch.setattr(os, "write", write)
        with pytest.raises(
            OutputError, match=r"No space left on device; the batch stopped, nothing is half-"
        ) as caught:
            make(opened)
    assert caught.value.exit_code == 1
    saved = [] if moment == "latents" else ["blue-s0.latents.safetensors"]
    written = {"record": ["blue-s0.mp4"], "manifest": ["blue-s0.mp4", "blue-s0.json"]}.get(moment, [])
    assert tree(tmp_path) == sorted([*whole(["red-s0"]), *saved, *written])
    make(batch(tiny_wan_folder, tmp_path, THREE))
    assert tree(tmp_path) == whole(NAMES)
    started = [name for event, name in events_of(tmp_path) if event == "started"]
    assert started.count("blue-s0.mp4") == (2 if moment == "latents" else 1), "what was denoised is not lost"


def test_a_really_full_disk(tiny_wan_folder: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if mount is None or subprocess.run([mount, "-t", "tmpfs", "-o", "size=256k", "none", disk], check=False).returncode:
        pytest.skip("a small tmpfs cannot be mounted here")
    try:
        opened = batch(tiny_wan_folder, disk, "red\n", num_videos=40)
        with pytest.raises(OutputError, match=r"the batch stopped, nothing is half-written"):
            make(opened)
        done = [entry for entry in Manifest(disk).read().values() if entry.status == "done"]
        assert 0 < len(done) < 40
        assert all(len(frames(disk / entry.name)) == 17 for entry in done)
        assert not [path for path in tree(disk) if ".tmp" in path or ".vmonarch" in path]
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_latents_that_do_not_read_back_are_made_again(tiny_wan_folder: Path, tmp_path: Path, fail_decode: Any) -> None:
    fail_decode(ValueError("no"))
    opened = batch(tiny_wan_folder, tmp_path, "red\n")
    make(opened)
    path = latents_path(opened.clips[0].path)
    path.write_bytes(path.read_bytes()[:-7])
    make(batch(tiny_wan_folder, tmp_path, "red\n", terms=Terms(retry_failed=True)))
    assert tree(tmp_path) == whole(["red-s0"])
    assert [event for event, _ in events_of(tmp_path)].count("started") == 2


# Interrupts


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("when", [StepDone, Decoding])
def test_a_signal_drops_the_step_or_finishes_the_clip(
    tiny_wan_folder: Path, tmp_path: Path, number: signal.Signals, code: int, when: type
) -> None:
    from vmonarch_cli.clip.interrupts import stoppable

    def stop(event: Any) -> None:
        if isinstance(event, when) and event.clip == 1:
            signal.raise_signal(number)

    opened = batch(tiny_wan_folder, tmp_path, THREE)
    with stoppable() as interrupts, pytest.raises(Interrupted) as caught:
        run_batch(opened, machine_of(opened), Limits(), interrupts, on_event=stop)
    assert caught.value.exit_code == code
    expected = ["done", "planned", "planned"] if when is StepDone else ["done", "done", "planned"]
    assert list(status(tmp_path).values()) == expected
    assert tree(tmp_path) == whole(NAMES[: expected.count("done")])
    make(batch(tiny_wan_folder, tmp_path, THREE))
    assert tree(tmp_path) == whole(NAMES)


# Several processes


def _work(model: str, folder: str, queue: Any) -> None:
    torch.set_num_threads(1)
    opened = batch(Path(model), Path(folder))
    entries = run_batch(opened, machine_of(opened), Limits(), Interrupts())
    queue.put([entry.status for entry in entries.values()])


@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_make_every_clip_once(tiny_wan_folder: Path, tmp_path: Path, count: int) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    arguments = (str(tiny_wan_folder), str(tmp_path), queue)
    processes = [context.Process(target=_work, args=arguments) for _ in range(count)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=240) for _ in processes]
    for process in processes:
        process.join(60)
    assert results == [["done"] * 6] * count
    made = [name for event, name in events_of(tmp_path) if event == "started"]
    assert (len(made), len(set(made))) == (6, 6)
    assert tree(tmp_path) == whole([Path(name).stem for name in status(tmp_path)])


def test_a_clip_of_another_process_is_waited_for_and_taken_over(tiny_wan_folder: Path, tmp_path: Path) -> None:
    opened = batch(tiny_wan_folder, tmp_path, THREE)
    waited: list[WaitingForOthers] = []
    with Claims(tmp_path) as other:
        claim = other.take(opened.clips[1].key)
        assert claim is not None

        def on_event(event: BatchEvent) -> None:
            if isinstance(event, WaitingForOthers):
                waited.append(event)
                assert list(status(tmp_path).values()) == ["done", "planned", "done"]
                claim.__exit__()

        run_batch(opened, machine_of(opened), Limits(), Interrupts(), on_event=on_event)
    assert tree(tmp_path) == whole(NAMES)
    assert waited == [WaitingForOthers(1, (f"process {os.getpid()} on {os.uname().nodename}",))]


# The command line


def call(*arguments: str, text: str | None = None) -> Result:
    return CliRunner().invoke(app, list(arguments), input=text)


def flags(model: Path, folder: Path) -> list[str]:
    shape = ["--size", "48x32", "--num-frames", "17", "--steps", "2", "--guidance-scale", "1", "--dense-every", "0"]
    return ["generate", "-m", str(model), "--device", "cpu", *shape, "-o", str(folder)]


def test_the_command_says_what_failed_and_exits_1(tiny_wan_folder: Path, tmp_path: Path, fail_decode: Any) -> None:
    fail_decode(None, ValueError("no luck"))
    command = [*flags(tiny_wan_folder, tmp_path / "out"), "--prompts-file", "-"]
    result = call(*command, text=THREE)
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [f"{tmp_path}/out/red-s0.mp4", f"{tmp_path}/out/a-circle-s0.mp4"]
    assert "why it failed" in result.stderr
    assert "failed: line 2: blue-s0.mp4: unexpected ValueError: no luck" in result.stderr
    assert result.stderr.splitlines()[-1] == "3 clips: 2 done, 1 failed"
    again = call(*command, "--json", text=THREE)
    told = json.loads(again.stdout)
    assert (again.exit_code, [clip["status"] for clip in told["clips"]]) == (1, ["done", "failed", "done"])
    last = call(*command, "--retry-failed", "--quiet", text=THREE)
    assert (last.exit_code, len(last.stdout.splitlines())) == (0, 3)
    assert all(line.startswith("warning: ") for line in last.stderr.splitlines()), "of a grid this small"


def test_bad_lines_are_told_before_anything_happens(tiny_wan_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("prompt,seed,preset\na,1,paper\nb,x,\nc,-4,papre\n")
    result = call(*flags(tiny_wan_folder, tmp_path / "out"), "--prompts-file", str(path))
    assert (result.exit_code, result.stdout) == (2, "")
    line_3, *line_4 = result.stderr.splitlines()
    assert line_3 == f"error: {path} line 3: seed takes a whole number, got 'x'"
    assert sorted(line.split(": ")[2][:22] for line in line_4) == ["seed takes a whole num", "there is no preset 'pa"]
    assert all(line.startswith(f"error: {path} line 4: ") for line in line_4)
    path.write_text("prompt,seed,preset\na,1,paper\nc,-4,\nd,3,papre\n")
    result = call(*flags(tiny_wan_folder, tmp_path / "out"), "--prompts-file", str(path), "--json")
    assert [line.split(":")[1] for line in result.stderr.splitlines()] == [f" {path} line 3", f" {path} line 4"]
    assert json.loads(result.stdout)["exit_code"] == 2
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_would_be_done(tiny_wan_folder: Path, tmp_path: Path, fail_decode: Any) -> None:
    fail_decode(None, ValueError("no"))
    make(batch(tiny_wan_folder, tmp_path, "red\nblue\n"))
    before = tree(tmp_path), (tmp_path / "manifest.jsonl").read_bytes()
    path = tmp_path.parent / f"{tmp_path.name}.txt"
    path.write_text(THREE)
    command = [*flags(tiny_wan_folder, tmp_path), "--fps", "8", "--prompts-file", str(path), "--dry-run"]
    shown = call(*command).stdout
    rows = [line.split() for line in shown.splitlines()]
    assert [row[-1] for row in rows[:-1] if row and row[0] in ("1", "2", "3")] == ["done", "failed", "make"]
    assert rows[-1] == ["3", "clips:", "1", "done", "(1", "of", "them", "before),", "1", "failed,", "1", "not", "made"]
    told = json.loads(call(*command, "--json").stdout)
    assert [clip["status"] for clip in told["clips"]] == ["done", "failed", "planned"]
    assert (tree(tmp_path), (tmp_path / "manifest.jsonl").read_bytes()) == before


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--max-failures", "0"], "--max-failures takes a whole number from 1 up, got 0"),
        (["-p", "x"], "--prompt and --prompts-file say the same thing twice: give one of them"),
        (["--resume", "--overwrite"], "--resume keeps what is done and --overwrite makes it again: give one of them"),
    ],
)
def test_flags_that_do_not_go_together(tiny_wan_folder: Path, tmp_path: Path, extra: list[str], words: str) -> None:
    result = call(*flags(tiny_wan_folder, tmp_path / "out"), "--prompts-file", "-", *extra, text=THREE)
    *before, error = result.stderr.splitlines()
    assert (result.exit_code, error) == (2, f"error: {words}")
    assert all(line.startswith("warning: ") for line in before), "of a grid this small"
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(tiny_wan_folder: Path, tmp_path: Path) -> None:
    result = call(*flags(tiny_wan_folder, Path("/proc/clips")), "--prompts-file", "-", text=THREE)
    assert result.exit_code == 2
    assert "output folder /proc/clips cannot be written" in result.stderr
    (tmp_path / "manifest.jsonl").mkdir()
    result = call(*flags(tiny_wan_folder, tmp_path), "--prompts-file", "-", text=THREE)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith(f"error: manifest {tmp_path}/manifest.jsonl cannot be ")


def test_torchrun_gives_every_process_its_own_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from vmonarch_cli.batch.worker import on_own_device
    from vmonarch_cli.errors import InputError
    from vmonarch_cli.machine.torchrun import Rank, read_rank
    from vmonarch_cli.plan.request import GenerateRequest

    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert read_rank() == Rank(5, 8, 1)
    assert on_own_device(GenerateRequest(device="cuda"), read_rank()).device == "cuda:1"
    assert on_own_device(GenerateRequest(device="cpu"), read_rank()).device == "cpu"
    assert on_own_device(GenerateRequest(device="cuda"), Rank()).device == "cuda"
    result = call("generate", "--prompts-file", "-", "--overwrite", "-o", str(tmp_path), text=THREE)
    assert "which one process must do, not torchrun" in result.stderr
    monkeypatch.setenv("RANK", "x")
    with pytest.raises(InputError, match="RANK takes a whole number"):
        read_rank()


# Latents and decode


def test_saved_latents_are_decoded_by_the_command(tiny_wan_folder: Path, tmp_path: Path, fail_decode: Any) -> None:
    fail_decode(ValueError("no"))
    single = tmp_path / "single" / "x.mp4"
    command = flags(tiny_wan_folder, single)
    result = call(*command, "-p", "red")
    assert result.exit_code == 1
    latents = latents_path(single)
    assert f"latents are saved: vmonarch decode {latents}" in result.stderr
    assert tree(single.parent) == ["x.latents.safetensors"]
    kept = call("decode", str(latents), "--keep", "-o", str(tmp_path / "kept"), "--device", "cpu")
    assert (kept.exit_code, kept.stdout) == (0, f"{tmp_path}/kept/x.mp4\n")
    done = call("decode", str(single.parent), "--device", "cpu", "--json")
    assert json.loads(done.stdout)["clips"] == [{"latents": str(latents), "path": str(single), "error": None}]
    assert tree(single.parent) == ["x.json", "x.mp4"]
    record = json.loads(single.with_suffix(".json").read_text())
    assert len(record["timing"]["steps"]) == 2
    whole_run = call(*flags(tiny_wan_folder, tmp_path / "y.mp4"), "-p", "red", "--quiet")
    assert whole_run.exit_code == 0
    assert np.array_equal(frames(single), frames(tmp_path / "y.mp4"))
    assert np.array_equal(frames(single), frames(tmp_path / "kept" / "x.mp4"))


def test_decoding_loads_the_decoder_alone(
    tiny_wan_folder: Path, tmp_path: Path, fail_decode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_decode(ValueError("no"))
    assert call(*flags(tiny_wan_folder, tmp_path / "x.mp4"), "-p", "red").exit_code == 1
    monkeypatch.setattr("diffusers.WanTransformer3DModel.from_pretrained", None)
    monkeypatch.setattr("transformers.UMT5EncoderModel.from_pretrained", None)
    result = call("decode", str(latents_path(tmp_path / "x.mp4")), "--device", "cpu")
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path}/x.mp4\n"), result.stderr


def test_decode_keeps_a_batchs_manifest_true(tiny_wan_folder: Path, tmp_path: Path, fail_decode: Any) -> None:
    fail_decode(ValueError("no"), ValueError("no"))
    opened = batch(tiny_wan_folder, tmp_path, THREE)
    make(opened)
    with Claims(tmp_path) as claims, claims.take(opened.clips[0].key) as claim:  # type: ignore[union-attr]
        assert claim
        result = call("decode", str(tmp_path), "--device", "cpu")
    assert result.exit_code == 1
    assert "is making this clip" in result.stderr
    assert result.stdout == f"{tmp_path}/blue-s0.mp4\n"
    assert list(status(tmp_path).values()) == ["failed", "done", "done"]
    assert call("decode", str(tmp_path), "--device", "cpu", "-q").exit_code == 0
    assert tree(tmp_path) == whole(NAMES)


def test_what_decode_refuses(tmp_path: Path) -> None:
    (tmp_path / "x.latents.safetensors").write_bytes(b"nothing")
    for argument, words in (
        (tmp_path / "no", "there is no file or folder"),
        (tmp_path / "x.latents.safetensors", "is damaged"),
    ):
        result = call("decode", str(argument))
        assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
        assert words in result.stderr
    (tmp_path / "empty").mkdir()
    assert "has no latents to decode" in call("decode", str(tmp_path / "empty")).stderr


def test_torchrun_with_two_processes(tiny_wan_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch.distributed.run")
    (tmp_path / "p.txt").write_text(THREE)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "vmonarch_cli", *flags(tiny_wan_folder, tmp_path / "out"), "--prompts-file"]
    done = subprocess.run([*command, tmp_path / "p.txt"], capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{tmp_path}/out/{name}.mp4" for name in NAMES]
    assert tree(tmp_path / "out") == whole(NAMES)
    assert "red-s0.mp4" in (tmp_path / "out" / "index.html").read_text(), "the gallery comes with the batch"
