"""Claims and the manifest between processes: one wins, the dead are noticed, torn lines are skipped."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from vmonarch_cli.batch import claims as claims_module
from vmonarch_cli.batch.claims import FOLDER, LEASE_S, Claims
from vmonarch_cli.batch.manifest import Manifest, ManifestEntry, happened, planned
from vmonarch_cli.clip.interrupts import FIRST, Interrupted, Interrupts, stoppable
from vmonarch_cli.errors import OutputError
from vmonarch_cli.machine.process import digest, this_process


def hold(folder: str, key: str) -> subprocess.Popen[str]:
    """Another process that has a claim until it is killed."""
    code = (
        "import sys, time; from pathlib import Path; from vmonarch_cli.batch.claims import Claims\n"
        "with Claims(Path(sys.argv[1])) as claims:\n"
        "    claim = claims.take(sys.argv[2]); (claim.work / 'half').touch()\n"
        "    print('held', flush=True); time.sleep(300)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, folder, key], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_claim_is_one_processs_until_it_is_released(tmp_path: Path) -> None:
    with Claims(tmp_path) as claims:
        claim = claims.take("k")
        assert claim is not None
        with claim:
            assert claim.work.is_dir()
            assert claims.take("k") is None
            assert str(os.getpid()) in claims.owner("k")
            other = claims.take("k2")
            assert other is not None
            with other:
                pass
        again = claims.take("k")
        assert again is not None
        with again:
            pass
        assert claims.owner("k") == ""
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_nothing_locked(tmp_path: Path) -> None:
    process = hold(str(tmp_path), "k")
    try:
        with Claims(tmp_path) as claims:
            assert claims.take("k") is None
            process.kill()
            process.wait()
            claim = claims.take("k")
            assert claim is not None
            with claim:
                assert [path.name for path in (tmp_path / FOLDER).glob("k.1.*")] == []
        assert list(tmp_path.iterdir()) == []
    finally:
        process.kill()
        process.wait()


def test_a_process_id_that_was_given_again_is_not_the_owner(tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    with Claims(tmp_path) as claims:
        about = {**asdict(this_process()), "start": "1"}
        (tmp_path / FOLDER / "k.1.claim").write_text(json.dumps(about))
        claim = claims.take("k")
        assert claim is not None
        with claim:
            pass


def test_another_hosts_claim_lives_as_long_as_it_is_touched(tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    path = tmp_path / FOLDER / "k.1.claim"
    path.write_text(json.dumps({"place": "elsewhere", "host": "other", "pid": 1, "start": "1"}))
    with Claims(tmp_path) as claims:
        assert claims.take("k") is None
        assert claims.owner("k") == "process 1 on other"
        old = time.time() - LEASE_S - 5
        os.utime(path, (old, old))
        claim = claims.take("k")
        assert claim is not None
        with claim:
            # The other host wakes up and releases what is no longer its own.
            assert [found.name for found in (tmp_path / FOLDER).glob("*.claim")] == ["k.2.claim"]


def test_an_owner_keeps_its_claim_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims_module, "HEARTBEAT_S", 0.02)
    with Claims(tmp_path) as claims:
        claim = claims.take("k")
        assert claim is not None
        with claim:
            path = tmp_path / FOLDER / "k.1.claim"
            os.utime(path, (1, 1))
            deadline = time.monotonic() + 10
            while path.stat().st_mtime < 2 and time.monotonic() < deadline:
                time.sleep(0.01)
            assert path.stat().st_mtime > 2


def test_without_hard_links_claims_are_exclusive_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    with Claims(tmp_path) as claims:
        claim = claims.take("k")
        assert claim is not None
        with claim:
            assert claims.take("k") is None


def test_what_a_killed_claimer_drafted_is_removed(tmp_path: Path) -> None:
    with Claims(tmp_path):
        place = digest(this_process().place)
        (tmp_path / FOLDER / f"{place}.999999.12.draft").touch()
    assert list(tmp_path.iterdir()) == []


def _race(folder: str, barrier: Any, wins: Any) -> None:
    with Claims(Path(folder)) as claims:
        for number in range(60):
            barrier.wait()
            claim = claims.take(f"k{number}")
            if claim is not None:
                wins.put(number)
            barrier.wait()
            if claim is not None:
                with claim:
                    pass


def test_of_four_processes_one_gets_a_claim_also_of_a_dead_one(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    (tmp_path / FOLDER).mkdir()
    with Claims(tmp_path):
        dead = json.dumps({**asdict(this_process()), "start": "1"})
        for number in range(0, 60, 2):
            (tmp_path / FOLDER / f"k{number}.1.claim").write_text(dead)
    barrier, wins = context.Barrier(4), context.Queue()
    processes = [context.Process(target=_race, args=(str(tmp_path), barrier, wins)) for _ in range(4)]
    for process in processes:
        process.start()
    found = sorted(wins.get(timeout=60) for _ in range(60))
    for process in processes:
        process.join(60)
    assert wins.empty()
    assert found == list(range(60))
    assert list(tmp_path.iterdir()) == []


# The manifest


def entry(key: str = "k") -> ManifestEntry:
    return ManifestEntry(key, f"{key}.mp4", 1, "a\nb \u2028 🎬", 0)


def test_states_of_a_clip(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path)
    assert manifest.read() == {}
    manifest.append(planned(entry()))
    assert manifest.read() == {"k": entry()}
    seen = []
    for event in (
        "started",
        "dropped",
        "started",
        "denoised",
        "failed",
        "again",
        "decoding",
        "done",
        "lost",
        "forgotten",
    ):
        manifest.append(happened(event, "k", error="why"))
        seen.append(manifest.read()["k"].status if event != "forgotten" else manifest.read())
    assert seen == [
        "denoising",
        "planned",
        "denoising",
        "denoised",
        "failed",
        "planned",
        "planned",
        "done",
        "planned",
        {},
    ]


@pytest.mark.parametrize("cut", [2, 10, 60])
def test_a_torn_line_did_not_happen(tmp_path: Path, cut: int) -> None:
    manifest = Manifest(tmp_path)
    manifest.append(planned(entry()), happened("done", "k"))
    manifest.path.write_bytes(manifest.path.read_bytes()[:-cut])
    assert manifest.read()["k"].status == "planned"
    manifest.append(happened("started", "k"))
    assert manifest.read()["k"].status == "denoising"


def test_a_manifest_of_a_later_version_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "manifest.jsonl").write_text('{"event": "batch", "schema": 2}\n')
    with pytest.raises(OutputError, match="was written by another version of vmonarch"):
        Manifest(tmp_path).read()


def test_an_event_that_does_not_fit_the_disk_is_not_half_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Manifest(tmp_path)
    manifest.append(planned(entry()))
    before = manifest.path.read_bytes()
    write = os.write

    def full(file: int, data: bytes) -> int:
        if len(data) < 20:
            raise OSError(28, "No space left on device")
        return write(file, data[:-19])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OutputError, match=r"manifest .* cannot be written: No space left on device"):
        manifest.append(happened("done", "k"))
    assert manifest.path.read_bytes() == before


def _append(folder: str, number: int) -> None:
    manifest = Manifest(Path(folder))
    for i in range(50):
        manifest.append(planned(entry(f"{number}-{i}")))


def test_lines_of_several_processes_do_not_mix(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_append, args=(str(tmp_path), number)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert len(Manifest(tmp_path).read()) == 200


def test_two_signals_and_what_they_stop() -> None:
    before = signal.getsignal(signal.SIGTERM)
    done = []

    def finish(interrupts: Interrupts, *numbers: signal.Signals, error: Exception | None = None) -> None:
        with interrupts.finishing():
            for number in numbers:
                signal.raise_signal(number)
                done.append(number)
            if error is not None:
                raise error

    with stoppable(), pytest.raises(Interrupted) as caught:
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.exit_code == 143
    said: list[str] = []
    with stoppable(said.append) as interrupts, pytest.raises(Interrupted) as caught:
        finish(interrupts, signal.SIGINT)
    assert (caught.value.exit_code, done) == (130, [signal.SIGINT])
    assert said == [FIRST], "the first signal is answered at once"
    with stoppable() as interrupts, pytest.raises(Interrupted):
        finish(interrupts, signal.SIGINT, error=OSError("ffmpeg was interrupted as well"))
    done.clear()
    with stoppable() as interrupts, pytest.raises(Interrupted):
        finish(interrupts, signal.SIGINT, signal.SIGTERM)
    assert done == [signal.SIGINT], "the second signal does not wait"
    assert signal.getsignal(signal.SIGTERM) == before
