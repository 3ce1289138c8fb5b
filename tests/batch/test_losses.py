"""What is lost, damaged or taken over while a batch runs or between two runs: nothing counts as done that is not."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batches import batch, frames, machine_of, tree, whole

from vmonarch_cli.batch import claims as claims_module
from vmonarch_cli.batch import manifest as manifest_module
from vmonarch_cli.batch.claims import FOLDER, Claims
from vmonarch_cli.batch.events import ClipFailed, ClipTakenOver
from vmonarch_cli.batch.folder import Batch, Terms
from vmonarch_cli.batch.manifest import Manifest, ManifestEntry, happened
from vmonarch_cli.batch.runner import Limits, run_batch
from vmonarch_cli.clip import make as run
from vmonarch_cli.clip.events import ClipStarted, Decoding, Retrying, StepDone
from vmonarch_cli.clip.interrupts import Interrupts
from vmonarch_cli.errors import InputError, OutputError
from vmonarch_cli.media.paths import latents_path, record_path

TWO = "red\nblue\n"

pytestmark = pytest.mark.usefixtures("one_thread")


def make(opened: Batch, on_event: Callable[[Any], None] = lambda event: None) -> dict[str, ManifestEntry]:
    return run_batch(opened, machine_of(opened), Limits(), Interrupts(), on_event=on_event)


LATER = ("vae_dtype", "dense_attention", "quality", "fuse", "sampler", "sigmas", "last_image", "video", "strength")
"""Settings that there were not always."""


def status(folder: Path) -> list[str]:
    return [entry.status for entry in Manifest(folder).read().values()]


def events_of(folder: Path, key: str) -> list[str]:
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    return [line["event"] for line in lines if line.get("key") == key]


# In mid-run


def truncate(folder: Path) -> None:
    os.truncate(folder / "manifest.jsonl", 0)


def cut_in_half(folder: Path) -> None:
    lines = (folder / "manifest.jsonl").read_text().splitlines(keepends=True)
    (folder / "manifest.jsonl").write_text("".join(lines[:2]))


def remove_manifest(folder: Path) -> None:
    (folder / "manifest.jsonl").unlink()


@pytest.mark.parametrize(
    ("lose", "words"),
    [
        (truncate, "was cut or replaced while the batch ran: 2 of the 2 clips"),
        (cut_in_half, "was cut or replaced while the batch ran: 1 of the 2 clips"),
        (remove_manifest, "is gone: it or its folder was removed while the batch ran"),
        (shutil.rmtree, "is gone: it or its folder was removed while the batch ran"),
    ],
)
@pytest.mark.parametrize("when", [StepDone, Decoding])
def test_a_manifest_that_is_lost_in_mid_run_is_a_failure(
    tiny_wan_folder: Path, tmp_path: Path, lose: Callable[[Path], None], words: str, when: type
) -> None:
    folder = tmp_path / "out"
    opened = batch(tiny_wan_folder, folder, TWO)
    lost = []

    def on_event(event: Any) -> None:
        if isinstance(event, when) and not lost:
            lost.append(event)
            lose(folder)

    with pytest.raises(OutputError) as caught:
        make(opened, on_event)
    assert words in caught.value.message
    assert caught.value.exit_code == 1


def test_a_clip_that_is_removed_in_mid_run_is_a_failure(tiny_wan_folder: Path, tmp_path: Path) -> None:
    opened = batch(tiny_wan_folder, tmp_path, TWO)

    def on_event(event: Any) -> None:
        if isinstance(event, ClipStarted) and event.index == 1:
            opened.clips[0].path.unlink()

    entries = make(opened, on_event)
    assert [entry.status for entry in entries.values()] == ["failed", "done"]
    assert next(entry.error for entry in entries.values()) == (
        "it was made, and its file was removed while the batch ran"
    )
    make(batch(tiny_wan_folder, tmp_path, TWO))
    assert tree(tmp_path) == whole(["red-s0", "blue-s0"])


def test_a_folder_that_turns_read_only_is_one_sentence(
    tiny_wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process of the superuser may write anywhere, so the calls refuse."""
    opened = batch(tiny_wan_folder, tmp_path, TWO)
    read_only = OSError(30, "Read-only file system")

    def refuse(*_: Any, **__: Any) -> None:
        raise read_only

    def on_event(event: Any) -> None:
        if isinstance(event, StepDone):
            for name in ("unlink", "rename", "replace", "mkdir", "rmdir", "link", "write"):
                monkeypatch.setattr(os, name, refuse)

    with pytest.raises(OutputError, match=r"Read-only file system; the batch stopped, nothing is half-written"):
        make(opened, on_event)


# Claims that are lost


def _batch_elsewhere(model: str, folder: str, host: str, lease: float, pipe: Any) -> None:
    """A batch on what looks like another host; it says when it has made a step, and how it ended."""
    torch.set_num_threads(1)
    socket.gethostname = lambda: host
    claims_module.LEASE_S = lease
    claims_module.HEARTBEAT_S = 0.2
    taken: list[str] = []

    def on_event(event: Any) -> None:
        if isinstance(event, StepDone) and not taken:
            pipe.send("step")
        if isinstance(event, ClipTakenOver):
            taken.append(event.path.name)

    entries = make(batch(Path(model), Path(folder), TWO, steps=3), on_event)
    pipe.send(([entry.status for entry in entries.values()], taken))


def test_a_host_that_wakes_up_drops_the_clip_that_it_lost(tiny_wan_folder: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    arguments = (str(tiny_wan_folder), str(tmp_path), "sleeper", 300.0, theirs)
    sleeper = context.Process(target=_batch_elsewhere, args=arguments)
    sleeper.start()
    try:
        assert mine.recv() == "step"
        os.kill(sleeper.pid or 0, signal.SIGSTOP)
        here, there = context.Pipe()
        other = context.Process(target=_batch_elsewhere, args=(*arguments[:2], "other", 1.0, there))
        other.start()
        while (told := here.recv()) == "step":
            pass
        other.join(60)
        assert told == (["done", "done"], [])
        before = (tmp_path / "manifest.jsonl").read_bytes()
        os.kill(sleeper.pid or 0, signal.SIGCONT)
        while (told := mine.recv()) == "step":
            pass
        sleeper.join(60)
        assert told == (["done", "done"], ["red-s0.mp4"]), "it goes on, and its batch is whole"
        assert sleeper.exitcode == 0
        assert (tmp_path / "manifest.jsonl").read_bytes() == before, "it says nothing of a clip that it lost"
        assert tree(tmp_path) == whole(["red-s0", "blue-s0"])
    finally:
        sleeper.kill()


def test_nothing_after_done_undoes_it(tiny_wan_folder: Path, tmp_path: Path) -> None:
    opened = batch(tiny_wan_folder, tmp_path, "red\n")
    key = opened.clips[0].key
    for event in ("started", "denoised", "done", "started", "denoised", "decoding", "failed", "dropped"):
        opened.manifest.append(happened(event, key, error="late"))
    assert [(entry.status, entry.error) for entry in Manifest(tmp_path).read().values()] == [("done", None)]


def test_a_number_that_is_used_again_gives_no_two_owners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look and the link of one process, another one dies and a third takes the next number."""
    folder = tmp_path / FOLDER
    with Claims(tmp_path) as mine, Claims(tmp_path) as third:
        link = os.link
        held = []

        def slow_link(source: Any, target: Any, **more: Any) -> None:
            if not held:
                held.append(None)
                (folder / "k.1.claim").write_text('{"place": "x", "host": "x", "pid": 1, "start": "1"}')
                os.utime(folder / "k.1.claim", (1, 1))
                held.append(third.take("k"))
            link(source, target, **more)

        monkeypatch.setattr(os, "link", slow_link)
        assert mine.take("k") is None
        assert [path.name for path in folder.glob("*.claim")] == ["k.2.claim"]
        assert held[1] is not None
        assert held[1].is_held
        with held[1]:
            pass


def test_waiting_for_the_lock_of_a_stopped_process_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_module, "WAIT_S", 0.1)
    said: list[str] = []
    heard = threading.Event()

    def on_wait(sentence: str) -> None:
        said.append(sentence)
        heard.set()

    holder = Manifest(tmp_path)
    waiter = Manifest(tmp_path, on_wait)
    with holder.locked():
        thread = threading.Thread(target=waiter.append, args=(happened("done", "k"),))
        thread.start()
        assert heard.wait(10)
    thread.join(10)
    assert len(said) == 1
    assert f"process {os.getpid()}" in said[0]
    assert "holds the lock of" in said[0]


# Manifests and claims of strangers


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "../escape.mp4"}, "a clip's name is a plain file name, and '../escape.mp4' is none"),
        ({"name": "/srv/escape.mp4"}, "a clip's name is a plain file name"),
        ({"name": "x.txt"}, "a clip's name is a plain file name"),
        ({"name": 3}, "name takes a text, got 3"),
        ({"name": None}, "name takes a text, got nothing"),
        ({"line": "x"}, "line takes a whole number, got 'x'"),
        ({"prompt": ["a"]}, "prompt takes a text"),
        ({"seed": 1.5}, "seed takes a whole number"),
    ],
)
def test_a_manifest_is_checked_as_a_prompts_file_is(
    tiny_wan_folder: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    folder = tmp_path / "out"
    batch(tiny_wan_folder, folder, "red\n")
    head, line = (folder / "manifest.jsonl").read_text().splitlines()
    (folder / "manifest.jsonl").write_text(f"{head}\n{json.dumps({**json.loads(line), **change})}\n")
    with pytest.raises(OutputError) as caught:
        batch(tiny_wan_folder, folder, "red\n")
    assert f"manifest {folder}/manifest.jsonl line 2: " in caught.value.message
    assert words in caught.value.message
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "lines",
    [
        '{"event": "done", "key": {"a": 1}, "retries": 5}',
        '{"event": ["done"], "key": "KEY"}',
        '{"event": "done", "key": "KEY", "retries": [1, {"with": 2}]}',
        "[" * 100_000,
        '{"event": "failed", "key": "KEY", "error": {"a": []}}',
        "9" * 5000,
    ],
)
def test_odd_events_of_a_manifest_are_no_errors_of_ours(tiny_wan_folder: Path, tmp_path: Path, lines: str) -> None:
    opened = batch(tiny_wan_folder, tmp_path, "red\n")
    with opened.manifest.path.open("a") as file:
        file.write(lines.replace("KEY", opened.clips[0].key) + "\n")
    again = batch(tiny_wan_folder, tmp_path, "red\n")
    assert [clip.path.name for clip in again.clips] == ["red-s0.mp4"]


@pytest.mark.parametrize("kind", ["fifo", "folder"])
def test_a_manifest_that_is_no_file_is_one_sentence(tiny_wan_folder: Path, tmp_path: Path, kind: str) -> None:
    (os.mkfifo if kind == "fifo" else os.mkdir)(tmp_path / "manifest.jsonl")
    with pytest.raises(OutputError, match=r"manifest .* cannot be read: it is a (pipe|folder), not a file"):
        batch(tiny_wan_folder, tmp_path, "red\n")


@pytest.mark.parametrize("about", ["{}", "[]", '{"place": 1, "host": [], "pid": "../..", "start": {}}', "", "[" * 9999])
def test_claims_of_strangers_are_only_old_or_young(tmp_path: Path, about: str) -> None:
    (tmp_path / FOLDER).mkdir()
    for name in ("k.1.claim", "k.x.claim", "k.1.2.claim", "k.claim", "a.b.draft", "odd.draft"):
        (tmp_path / FOLDER / name).write_text(about)
    with Claims(tmp_path) as claims:
        assert claims.take("k") is None
        os.utime(tmp_path / FOLDER / "k.1.claim", (1, 1))
        claim = claims.take("k")
        assert claim is not None
        with claim:
            assert claim.is_held


# Between two runs


def spoil(path: Path, how: str) -> None:
    """Damage a clip, or its record, in one of the ways that happen."""
    content = b"" if path.is_dir() else path.read_bytes()
    if how == "folder":
        path.unlink()
        path.mkdir()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "half":
        path.write_bytes(content[: len(content) // 2])
    elif how == "flipped":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :])
    elif how == "frame":
        sorted(path.iterdir())[3].unlink()
    else:
        record_path(path).write_bytes(b"" if how == "no record" else b'{"schema": 1}')


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *(("c.mp4", how) for how in ("empty", "half", "flipped", "no record", "odd record")),
        *(("c.gif", how) for how in ("empty", "half", "flipped")),
        ("c.png", "frame"),
    ],
)
def test_a_damaged_clip_is_made_again(tiny_wan_folder: Path, tmp_path: Path, name: str, how: str) -> None:
    text = json.dumps({"prompt": "red", "output": name})
    opened = batch(tiny_wan_folder, tmp_path, text, format="jsonl")
    make(opened)
    clip = opened.clips[0].path
    read: Callable[[Path], Any] = _pngs if name.endswith("png") else frames
    before = read(clip)
    assert batch(tiny_wan_folder, tmp_path, text, format="jsonl").notes == ()
    spoil(clip, how)
    again = batch(tiny_wan_folder, tmp_path, text, format="jsonl")
    assert again.notes
    assert again.notes[0].endswith(": it is made again")
    make(again)
    assert np.array_equal(read(clip), before)
    assert batch(tiny_wan_folder, tmp_path, text, format="jsonl").notes == ()


def _pngs(path: Path) -> Any:
    from vmonarch_cli.media.read import read_clip

    return read_clip(path)


def test_a_clip_that_somebody_edited_is_left_alone(tiny_wan_folder: Path, tmp_path: Path) -> None:
    opened = batch(tiny_wan_folder, tmp_path, "red\n")
    make(opened)
    clip = opened.clips[0].path
    clip.write_bytes(clip.read_bytes() + (16).to_bytes(4, "big") + b"free" + bytes(8))
    again = batch(tiny_wan_folder, tmp_path, "red\n")
    assert (again.notes, [entry.status for entry in again.before.values()]) == ((), ["done"])


def test_a_folder_in_a_clips_place_fails_that_clip_alone(tiny_wan_folder: Path, tmp_path: Path) -> None:
    opened = batch(tiny_wan_folder, tmp_path, TWO)
    make(opened)
    spoil(opened.clips[0].path, "folder")
    record_path(opened.clips[1].path).unlink()
    record_path(opened.clips[1].path).mkdir()
    failed: list[str] = []
    make(
        batch(tiny_wan_folder, tmp_path, TWO + "green\n"),
        lambda event: failed.append(event.sentence) if isinstance(event, ClipFailed) else None,
    )
    assert len(failed) == 2
    assert "red-s0.mp4 is a folder, which its clip cannot replace: move it away, then --retry-failed" in failed[0]
    assert "blue-s0.json is a folder" in failed[1]
    assert status(tmp_path) == ["failed", "failed", "done"]


def test_a_clip_with_stock_blocks_by_default_is_not_made_again(tiny_wan_folder: Path, tmp_path: Path) -> None:
    """When that was the default everywhere, records said so."""
    opened = batch(tiny_wan_folder, tmp_path, "red\n")
    make(opened)
    path = record_path(opened.clips[0].path)
    record = json.loads(path.read_text())
    record["settings"]["fuse"] = {"value": False, "origin": "default"}
    path.write_text(json.dumps(record))
    kept = [line for line in opened.manifest.path.read_text().splitlines() if json.loads(line)["event"] in _EARLY]
    opened.manifest.path.write_text("\n".join(kept) + "\n")
    seen: list[Any] = []
    make(batch(tiny_wan_folder, tmp_path, "red\n"), seen.append)
    assert seen == []
    assert status(tmp_path) == ["done"]


@pytest.mark.parametrize("unknown", [(), LATER], ids=["this version", "an earlier one"])
def test_a_torn_tail_is_mended_from_the_record(tiny_wan_folder: Path, tmp_path: Path, unknown: tuple[str, ...]) -> None:
    """Also from the record of an earlier version, which did not know some settings."""
    opened = batch(tiny_wan_folder, tmp_path, TWO)
    make(opened)
    for path in tmp_path.glob("*.json"):
        record = json.loads(path.read_text())
        assert set(unknown) <= set(record["settings"])
        record["settings"] = {name: entry for name, entry in record["settings"].items() if name not in unknown}
        path.write_text(json.dumps(record))
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.mp4")}
    kept = [line for line in opened.manifest.path.read_text().splitlines() if json.loads(line)["event"] in _EARLY]
    opened.manifest.path.write_text("\n".join(kept) + '\n{"event": "deno')
    seen: list[Any] = []
    make(batch(tiny_wan_folder, tmp_path, TWO), seen.append)
    assert seen == [], "nothing is loaded or made"
    assert status(tmp_path) == ["done", "done"]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.mp4")} == times
    make(batch(tiny_wan_folder, tmp_path, TWO, terms=Terms(overwrite=True)))
    assert all(path.stat().st_mtime_ns != time for path, time in times.items()), "asked for, they are made again"


_EARLY = ("batch", "planned", "started")


# Saved latents


def bits(tensor: torch.Tensor) -> torch.Tensor:
    changed = tensor.clone()
    changed.view(-1)[3] += 1
    return changed


def nan(tensor: torch.Tensor) -> torch.Tensor:
    changed = tensor.clone()
    changed.view(-1)[3] = float("nan")
    return changed


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "flipped": bits,
    "one frame": lambda tensor: tensor[:, :, :1].contiguous(),
    "doubled": lambda tensor: tensor.repeat(1, 1, 2, 1, 1),
    "bool": lambda tensor: tensor > 0,
    "int": lambda tensor: tensor.int(),
    "bfloat16": lambda tensor: tensor.bfloat16(),
    "nan": nan,
    "channels": lambda tensor: tensor[:, :2].contiguous(),
    "two dimensions": lambda tensor: tensor.flatten(1),
}


def decode_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("no")

    monkeypatch.setattr(run, "decode", fail)


@pytest.mark.parametrize("checksum", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_latents_that_changed_are_made_again(
    tiny_wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, checksum: bool
) -> None:
    """`checksum`: the file was written with the tensor that it holds, so that its checksum fits."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    from vmonarch_cli.clip.latents import load_latents, save_latents

    if checksum and change in ("flipped", "bfloat16"):
        pytest.skip("latents like any other")
    with monkeypatch.context() as patch:
        decode_fails(patch)
        opened = batch(tiny_wan_folder, tmp_path, TWO)
        make(opened)
    clip = opened.clips[0]
    path = latents_path(clip.path)
    saved = load_latents(path)
    changed = CHANGES[change](saved.denoised.latents)
    if checksum:
        from dataclasses import replace

        save_latents(path, saved.plan, 0, replace(saved.denoised, latents=changed), key=saved.key)
    else:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        save_file({"latents": changed}, path, metadata)
    with pytest.raises(InputError, match="is damaged: ") as caught:
        load_latents(path)
    said: list[str] = []
    make(
        batch(tiny_wan_folder, tmp_path, TWO, terms=Terms(retry_failed=True)),
        lambda event: said.append(event.sentence) if isinstance(event, Retrying) else None,
    )
    assert said == [f"{caught.value.message}: denoising again"]
    assert tree(tmp_path) == whole(["red-s0", "blue-s0"])
    assert events_of(tmp_path, clip.key).count("started") == 2
    assert events_of(tmp_path, opened.clips[1].key).count("started") == 1, "whole latents are decoded"


def test_latents_of_another_run_are_not_overwritten(
    tiny_wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A single run that failed in decoding left its latents where a clip of the batch would be."""
    from batches import request

    from vmonarch_cli.pipeline.preflight import check_machine
    from vmonarch_cli.plan.resolve import resolve

    opened = batch(tiny_wan_folder, tmp_path, TWO)
    alone = resolve(request(tiny_wan_folder, tmp_path / "red-s0.mp4", prompt="red"))
    with monkeypatch.context() as patch:
        decode_fails(patch)
        with pytest.raises(ValueError, match="no"):
            run.generate(alone, check_machine(alone))
    before = latents_path(alone.outputs[0]).read_bytes()
    failed: list[str] = []
    make(opened, lambda event: failed.append(event.sentence) if isinstance(event, ClipFailed) else None)
    assert len(failed) == 1
    assert "red-s0.latents.safetensors holds another run's latents: decode them or move them away" in failed[0]
    assert latents_path(alone.outputs[0]).read_bytes() == before
    later = batch(tiny_wan_folder, tmp_path, TWO + "red\n")
    assert [clip.path.name for clip in later.clips] == ["red-s0.mp4", "blue-s0.mp4", "red-s0-2.mp4"]
