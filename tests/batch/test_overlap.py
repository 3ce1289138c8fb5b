"""Batches that decode a clip while they denoise the next: the same clips, and no failure of one costs another."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batches import batch, frames, machine_of, request, tree, whole
from command import call

from vmonarch_cli.batch.events import ClipFailed, OverlapDone
from vmonarch_cli.batch.folder import Batch, Terms
from vmonarch_cli.batch.manifest import Manifest, ManifestEntry
from vmonarch_cli.batch.runner import Limits, run_batch
from vmonarch_cli.clip import make as run
from vmonarch_cli.clip.events import ClipDone, Decoding, Retrying, StepDone
from vmonarch_cli.clip.interrupts import FIRST, Interrupted, Interrupts, stoppable
from vmonarch_cli.errors import InputError, OutputError
from vmonarch_cli.pipeline.overlap import Overlap, needs_vae, overlap_of
from vmonarch_cli.pipeline.preflight import Machine
from vmonarch_cli.plan.memory import overlapped_peak, peaks_of
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve

THREE = "red\nblue\na circle\n"
NAMES = ["red-s0", "blue-s0", "a-circle-s0"]
PATIENCE_S = 30.0

pytestmark = pytest.mark.usefixtures("one_thread")


def make(
    opened: Batch, on_event: Callable[[Any], None] = lambda event: None, **limits: Any
) -> dict[str, ManifestEntry]:
    machine = machine_of(opened)
    return run_batch(opened, machine, Limits(overlap=True, **limits), Interrupts(), on_event=on_event)


def status(folder: Path) -> list[str]:
    return [entry.status for entry in Manifest(folder).read().values()]


def story(folder: Path) -> list[tuple[str, str]]:
    """(event, clip's name) of the manifest from the first clip's start on."""
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    names = {line["key"]: Path(line["name"]).stem for line in lines if line["event"] == "planned"}
    return [(line["event"], names[line["key"]]) for line in lines if "key" in line and line["event"] != "planned"]


class Held:
    """Decoding that goes on until the next clip has made a step; `fail`: what the decoding of each clip ends with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *fail: BaseException | None) -> None:
        self.threads: list[str] = []
        """Names of the threads that decoded, in order."""
        self.go_on = threading.Event()
        self._real, self._fail = run.decode, list(fail)
        monkeypatch.setattr(run, "decode", self._decode)

    def _decode(self, *arguments: Any) -> Iterator[Any]:
        self.threads.append(threading.current_thread().name)
        last = len(self.threads) == 3
        if self.threads[-1] == "clip-beside" and not last:
            assert self.go_on.wait(PATIENCE_S)
            self.go_on.clear()
        error = self._fail.pop(0) if self._fail else None
        if error is not None:
            raise error
        yield from self._real(*arguments)

    def on_event(self, event: Any) -> None:
        """The first step of each clip but the first lets the decoding beside it go on."""
        if isinstance(event, StepDone) and event.step.index == 0 and event.clip > 0:
            self.go_on.set()


def test_the_clips_are_those_of_a_batch_without(
    tiny_wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = batch(tiny_wan_folder, tmp_path / "without", THREE)
    run_batch(without, machine_of(without), Limits(), Interrupts())
    events: list[Any] = []
    held = Held(monkeypatch)

    def on_event(event: Any) -> None:
        events.append(event)
        held.on_event(event)

    make(batch(tiny_wan_folder, tmp_path / "with", THREE), on_event)
    assert tree(tmp_path / "with") == whole(NAMES)
    assert held.threads == ["clip-beside"] * 3
    for name in NAMES:
        assert np.array_equal(frames(tmp_path / "with" / f"{name}.mp4"), frames(tmp_path / "without" / f"{name}.mp4"))
    told = story(tmp_path / "with")
    for before, after in itertools.pairwise(NAMES):
        moments = [("denoised", before), ("started", after), ("done", before), ("done", after)]
        assert sorted(moments, key=told.index) == moments, "its latents are saved first, and clips end in order"
    assert [event.result.index for event in events if isinstance(event, ClipDone)] == [0, 1, 2]
    (ended,) = (event for event in events if isinstance(event, OverlapDone))
    assert 0 < ended.hidden_s < ended.seconds
    records = [json.loads((tmp_path / "with" / f"{name}.json").read_text()) for name in NAMES]
    assert [record["overlap"]["steps_beside_decoding"][:1] for record in records[1:]] == [[0], [0]]
    assert [record["overlap"]["decoded_beside_denoising"] for record in records] == [True, True, False]
    alone = json.loads((tmp_path / "without" / "red-s0.json").read_text())
    assert "overlap" not in alone
    assert alone["frames"]["sha256"] == records[0]["frames"]["sha256"]


def test_a_decoder_that_fails_costs_its_own_clip(
    tiny_wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed: list[ClipFailed] = []
    with monkeypatch.context() as patch:
        held = Held(patch, None, ValueError("no luck"))

        def on_event(event: Any) -> None:
            if isinstance(event, ClipFailed):
                failed.append(event)
            held.on_event(event)

        make(batch(tiny_wan_folder, tmp_path, THREE), on_event)
    assert status(tmp_path) == ["done", "failed", "done"]
    assert [(one.clip, one.line, one.sentence) for one in failed] == [(1, 2, "unexpected ValueError: no luck")]
    assert "no luck" in failed[0].trace
    told = story(tmp_path)
    assert told.index(("failed", "blue-s0")) > told.index(("started", "a-circle-s0"))
    assert tree(tmp_path) == sorted([*whole(["red-s0", "a-circle-s0"]), "blue-s0.latents.safetensors"])
    make(batch(tiny_wan_folder, tmp_path, THREE, terms=Terms(retry_failed=True)))
    assert tree(tmp_path) == whole(NAMES)
    assert [event for event, name in story(tmp_path) if name == "blue-s0"].count("started") == 1


def test_a_writer_that_fails_ends_the_batch_and_loses_nothing(
    tiny_wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        held = Held(patch)

        def full(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr("imageio.v2.get_writer", full)
        with pytest.raises(
            OutputError, match=r"No space left on device; the batch stopped, nothing is half-"
        ) as caught:
            make(batch(tiny_wan_folder, tmp_path, THREE), held.on_event)
    assert caught.value.exit_code == 1
    assert "red-s0.latents.safetensors" in tree(tmp_path)
    assert not [name for name in tree(tmp_path) if ".vmonarch" in name or name.endswith((".mp4", ".json"))]
    assert "failed" not in status(tmp_path)
    make(batch(tiny_wan_folder, tmp_path, THREE))
    assert tree(tmp_path) == whole(NAMES)
    assert [event for event, name in story(tmp_path) if name == "red-s0"].count("started") == 1


def test_a_decoder_that_runs_out_of_memory_gets_the_machine_for_itself(
    tiny_wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[Any] = []
    held = Held(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"))

    def on_event(event: Any) -> None:
        if isinstance(event, Retrying):
            said.append((event.clip, event.sentence))
        held.on_event(event)

    make(batch(tiny_wan_folder, tmp_path, THREE), on_event)
    assert status(tmp_path) == ["done"] * 3
    assert said == [(0, "decoding ran out of memory beside another clip: clips are made one by one now")]
    assert held.threads == ["clip-beside", "MainThread", "MainThread", "MainThread"]
    retry = {"stage": "decode", "reason": "out of memory", "with": "nothing beside it"}
    assert [json.loads((tmp_path / f"{name}.json").read_text())["retries"] for name in NAMES] == [[retry], [], []]


def test_a_denoiser_that_runs_out_of_memory_begins_again_alone(
    tiny_wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = run.denoise, [0]
    held = Held(monkeypatch)

    def denoise(*arguments: Any, **more: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            held.go_on.set()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*arguments, **more)

    monkeypatch.setattr(run, "denoise", denoise)
    make(batch(tiny_wan_folder, tmp_path, THREE), held.on_event)
    assert status(tmp_path) == ["done"] * 3
    retry = {"stage": "denoise", "reason": "out of memory", "with": "nothing beside it"}
    assert [json.loads((tmp_path / f"{name}.json").read_text())["retries"] for name in NAMES] == [[], [retry], []]
    assert calls == [4]


# Signals and kills


@pytest.mark.parametrize("signals", [1, 2])
def test_a_signal_drops_the_step_and_finishes_the_clip_beside(
    tiny_wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signals: int
) -> None:
    """A second one stops at once; the clip beside then has its latents."""
    opened = batch(tiny_wan_folder, tmp_path, THREE)
    said: list[str] = []
    with monkeypatch.context() as patch:
        held = Held(patch)

        def on_event(event: Any) -> None:
            if isinstance(event, StepDone) and event.clip == 1:
                signal.raise_signal(signal.SIGINT)
            elif isinstance(event, Decoding):
                if signals == 2:
                    signal.raise_signal(signal.SIGINT)
                held.go_on.set()

        if signals == 2:
            patch.setattr("vmonarch_cli.clip.beside._CANCEL_S", 0.1)
        with stoppable(said.append) as interrupts, pytest.raises(Interrupted) as caught:
            run_batch(opened, machine_of(opened), Limits(overlap=True), interrupts, on_event=on_event)
        held.go_on.set()
    assert caught.value.exit_code == 130
    assert said == [FIRST]
    assert status(tmp_path) == ["done" if signals == 1 else "denoised", "planned", "planned"]
    make(batch(tiny_wan_folder, tmp_path, THREE))
    assert tree(tmp_path) == whole(NAMES)
    assert [event for event, name in story(tmp_path) if name == "red-s0"].count("started") == 1


@pytest.mark.parametrize("moment", ["decoding beside a step", "done beside a step", "waiting for the clip beside"])
def test_killed_with_two_clips_on_the_way_nothing_denoised_is_lost(
    tiny_wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def work() -> None:
        torch.set_num_threads(1)
        held = Held(monkeypatch)

        def on_event(event: Any) -> None:
            if moment.startswith("done"):
                held.on_event(event)
                if isinstance(event, ClipDone) and event.result.index == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            elif isinstance(event, Decoding if moment.startswith("waiting") else StepDone) and (
                held.threads or isinstance(event, Decoding)
            ):
                os.kill(os.getpid(), signal.SIGKILL)

        make(batch(tiny_wan_folder, tmp_path, THREE), on_event)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    saved = [name for event, name in story(tmp_path) if event == "denoised"]
    expected = {"decoding beside a step": [NAMES[:1]], "waiting for the clip beside": [NAMES[:2]]}
    assert saved in expected.get(moment, [NAMES[:1], NAMES[:2]])
    make(batch(tiny_wan_folder, tmp_path, THREE))
    assert tree(tmp_path) == whole(NAMES)
    started = [name for event, name in story(tmp_path) if event == "started"]
    assert all(started.count(name) == 1 for name in saved)


# The decision


def card(free_gib: float, **facts: Any) -> Machine:
    return Machine("cuda:0", "A card", "bfloat16", "triton", free_bytes=round(free_gib * 2**30), **facts)


def plan_of(model: str, **flags: Any) -> Plan:
    return resolve(GenerateRequest(model=model, prompt="red", output="x.mp4", **flags))


def test_it_is_decided_by_the_memory_of_both() -> None:
    plan = plan_of("wan2.1-1.3b")
    need = overlapped_peak([plan], "bfloat16", tiled=False)
    assert need > peaks_of(plan, "bfloat16", tiled=False)["none"]
    assert overlapped_peak([plan, plan_of("wan2.1-1.3b", num_frames=5)], "bfloat16", tiled=False) == need
    gib = need / 2**30
    assert overlap_of([plan], card(gib + 1), None).on
    small = overlap_of([plan], card(gib - 1), None)
    assert not small.on
    assert small.reason.startswith("both together do not fit: about ")
    assert overlap_of([plan], card(gib - 1), True).on, "as asked"
    assert overlap_of([plan], card(gib + 1), False) == Overlap(False, "as asked")


def test_where_it_cannot_be_had() -> None:
    plan = plan_of("wan2.1-1.3b")
    for machine, other, words in (
        (card(100, offload="model"), plan, "offload model moves the weights from one to the other"),
        (card(500), plan_of("minimax-h3"), "denoises and decodes in one sequence of blocks"),
    ):
        found = overlap_of([other], machine, None)
        assert not found.on
        assert words in found.reason
        with pytest.raises(InputError, match=f"--overlap cannot be had: .*{words}"):
            overlap_of([other], machine, True)
    cpu = Machine("cpu", "CPU", "float32", "torch")
    assert overlap_of([plan], cpu, None) == Overlap(False, "on a CPU both would take the same cores")
    assert overlap_of([plan], cpu, True).on


def test_a_clip_whose_denoising_runs_the_vae_waits(tiny_wan_folder: Path, tmp_path: Path) -> None:
    assert not needs_vae(plan_of("wan2.1-1.3b"))
    assert needs_vae(plan_of("wan2.1-vace-1.3b"))
    plan = resolve(request(tiny_wan_folder, tmp_path / "x.mp4", prompt="red"))
    assert needs_vae(plan.model_copy(update={"video": "x.mp4"}))
    assert needs_vae(plan.model_copy(update={"last_image": "x.png"}))


# The command line


def test_the_header_the_summary_and_the_manifest_say_it(tiny_wan_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text(THREE)
    shape = ["--size", "48x32", "--num-frames", "17", "--steps", "2", "--guidance-scale", "1", "--dense-every", "0"]
    flags = ["-m", str(tiny_wan_folder), "--device", "cpu", *shape, "--prompts-file", str(tmp_path / "p.txt")]

    def folder(name: str) -> list[str]:
        return [*flags, "-o", str(tmp_path / name)]

    def recorded(name: str) -> dict[str, Any]:
        head = json.loads((tmp_path / name / "manifest.jsonl").read_text().splitlines()[0])
        return dict(head["overlap"])

    with_it = call("generate", *folder("a"), "--overlap")
    assert "overlap: a clip is decoded and written while the next one is denoised (as asked)" in with_it.stderr
    assert " of decoding and writing went on beside denoising" in with_it.stderr.splitlines()[-2]
    assert with_it.stderr.splitlines()[-1] == "3 clips: 3 done"
    assert recorded("a") == {"on": True, "reason": "as asked"}
    told = json.loads(call("generate", *folder("b"), "--overlap", "--json").stdout)["overlap"]
    assert told["on"]
    assert 0 < told["hidden_s"] < told["seconds"]
    without = call("generate", *folder("c"))
    assert "overlap: none (on a CPU both would take the same cores)" in without.stderr
    assert "beside denoising" not in without.stderr
    assert recorded("c") == {"on": False, "reason": "on a CPU both would take the same cores"}
    rows = [line.split(maxsplit=1) for line in call("plan", *folder("d"), "--vram", "24").stdout.splitlines()]
    (row,) = (row[1] for row in rows if row[:1] == ["overlap"])
    assert row.endswith(" of the card to decode a clip while the next is denoised, fits")
    rows = [line.split() for line in call("plan", *folder("d"), "--no-overlap").stdout.splitlines()]
    assert ["overlap", "none,", "as", "asked"] in rows
