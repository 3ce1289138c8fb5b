"""A batch on several GPUs against the same batch on one, and what becomes of it when a process is killed.

    python tests/bench/batch.py --processes 4 --clips 32 --work /tmp/batch --json batch.json

Makes the same clips four times: by one process, by a torchrun of N, by a torchrun one of whose processes is killed in
mid-run and that is started again, and by N processes without torchrun one of which is killed. Every time each clip must
be there once and have the pixels of the first run. Arguments after -- are `vmonarch generate`'s.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from vmonarch_cli.batch.manifest import DONE, FILE, Manifest
from vmonarch_cli.profile.record import Recorder, this_machine

GENERATE = ["-m", "vmonarch_cli", "generate", "--quiet"]
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")


def write_prompts(path: Path, clips: int) -> None:
    """Different prompts; frames as PNGs, which need no encoder."""
    lines = [
        {
            "prompt": f"a large {COLOURS[i % len(COLOURS)]} {SHAPES[i % len(SHAPES)]} rising on a white background",
            "seed": i,
            "output": f"{i:03}.png",
        }
        for i in range(clips)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def events(folder: Path) -> list[dict[str, Any]]:
    """The manifest's lines so far, without one that is being written."""
    path = folder / FILE
    rows = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(row) for row in rows if row.endswith("}")]


def start(command: list[str], gpu: int | None = None) -> subprocess.Popen[bytes]:
    own = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)}
    return subprocess.Popen(command, env={**os.environ, **own}, stdout=subprocess.DEVNULL)


def kill_one(folder: Path, after: int, timeout: float) -> int:
    """SIGKILL a process that is in the middle of a clip once `after` clips are done; the number done by then."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        seen = events(folder)
        done = {event["key"] for event in seen if event["event"] == "done"}
        busy = {event["pid"] for event in seen if event["event"] == "started" and event["key"] not in done}
        if len(done) >= after and busy:
            os.kill(min(busy), signal.SIGKILL)
            return len(done)
        time.sleep(0.02)
    raise TimeoutError(f"{folder}: {after} clips were not done after {timeout:g} s")


def pixels(folder: Path) -> dict[str, tuple[bytes, ...]]:
    """File contents of every clip's frames."""
    clips = sorted(folder.glob("*.png"))
    return {clip.name: tuple(frame.read_bytes() for frame in sorted(clip.iterdir())) for clip in clips}


def result_of(name: str, folder: Path, wall_s: float, clips: int, expected: dict[str, Any] | None) -> dict[str, Any]:
    """Times of a run, who made how many clips, and whether the clips are what they must be."""
    seen = events(folder)
    done = [event for event in seen if event["event"] == "done"]
    times = [datetime.fromisoformat(event["time"]) for event in seen if event["event"] in ("started", "done")]
    entries = Manifest(folder).read()
    once = len(done) == len({event["key"] for event in done}) == clips
    all_done = len(entries) == clips and all(entry.status == DONE for entry in entries.values())
    return {
        "name": name,
        "wall_s": wall_s,
        "working_s": (max(times) - min(times)).total_seconds(),
        "clips": clips,
        "by_process": sorted(sum(e["pid"] == pid for e in done) for pid in {e["pid"] for e in done}),
        "each_once": once and all_done,
        "same_pixels": expected is None or pixels(folder) == expected,
    }


def runs(args: argparse.Namespace, prompts: Path) -> Iterator[dict[str, Any]]:
    """The four runs, each in a folder of its own."""

    def command(folder: Path, *launcher: str) -> list[str]:
        made = [*GENERATE, "--prompts-file", str(prompts), "-o", str(folder), *args.arguments]
        return [sys.executable, *launcher, *made]

    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.processes))
    third = args.clips // 3

    folder, began = args.work / "one", time.monotonic()
    code = start(command(folder), gpu=0).wait(args.timeout)
    found = result_of("one process", folder, time.monotonic() - began, args.clips, None) | {"exit": code}
    expected = pixels(folder)
    yield found

    folder, began = args.work / "torchrun", time.monotonic()
    code = start(command(folder, *launcher)).wait(args.timeout)
    yield result_of("torchrun", folder, time.monotonic() - began, args.clips, expected) | {"exit": code}

    folder, began = args.work / "torchrun-killed", time.monotonic()
    process = start(command(folder, *launcher))
    at = kill_one(folder, third, args.timeout)
    first = process.wait(args.timeout)
    left = args.clips - sum(event["event"] == "done" for event in events(folder))
    code = start(command(folder, *launcher)).wait(args.timeout)
    found = result_of("torchrun, one killed, run again", folder, time.monotonic() - began, args.clips, expected)
    yield found | {"exit": code, "first_exit": first, "killed_after": at, "left_for_the_second_run": left}

    folder, began = args.work / "apart-killed", time.monotonic()
    apart = [start(command(folder), gpu=gpu) for gpu in range(args.processes)]
    at = kill_one(folder, third, args.timeout)
    codes = [process.wait(args.timeout) for process in apart]
    found = result_of("processes apart, one killed", folder, time.monotonic() - began, args.clips, expected)
    yield found | {"exit": max(codes), "exits": codes, "killed_after": at}


def main() -> int:
    """Make the four runs and write their record; 1 when one did not end as it must."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=max(2, torch.cuda.device_count()))
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--work", type=Path, required=True, help="an empty folder")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds per run")
    parser.add_argument("--json", type=Path)
    parser.add_argument("arguments", nargs="*")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    prompts = args.work / "prompts.jsonl"
    write_prompts(prompts, args.clips)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = {"processes": args.processes, "clips": args.clips, "arguments": args.arguments}
    recorder = Recorder(
        "batch", args.json and str(args.json), this_machine(device), settings, "python tests/bench/batch.py"
    )
    made: list[dict[str, Any]] = []
    for run in runs(args, prompts):
        made.append(run)
        recorder.save(runs=made)
        print(json.dumps(run))
    passed = all(run["each_once"] and run["same_pixels"] and run["exit"] <= 0 for run in made)
    recorder.finish(passed)
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
