"""Measure what a full-size model needs on a smaller card: `vmonarch generate`, no flag given, with that much free.

    python tests/bench/small_card.py --model wan2.1-1.3b --card 24 --card 12 --work /tmp/models --json peaks.json

Writes the model once with random weights of the true size (`--work` must hold its bytes), then takes memory of the
GPU away until only `--card` GiB are free and lets the command line choose its offload mode. Beside its estimate
stands the measured peak: of the allocator, and of the whole process as the driver sees it.
"""

import argparse
import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from random_model import WAN, write_model  # beside this script

from vmonarch_cli.profile.record import Recorder, this_machine

GIB = 2**30


class Watch(threading.Thread):
    """The least memory that was free on the GPU while it ran, read from the driver every 20 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.least = torch.cuda.mem_get_info()[0]
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(0.02):
            self.least = min(self.least, torch.cuda.mem_get_info()[0])

    def stop(self) -> int:
        self._over.set()
        self.join()
        return self.least


def measure(folder: Path, card: float, arguments: list[str], timeout: float) -> dict[str, Any]:
    """One clip with `card` GiB free; `error` says why there is none."""
    free = torch.cuda.mem_get_info()[0]
    taken = torch.empty(int(free - card * GIB), dtype=torch.uint8, device="cuda")
    before = torch.cuda.mem_get_info()[0]
    out = folder.parent / f"card-{card:g}" / "clip.png"  # alone there: the record of card 2 is not card 24's
    command = [sys.executable, "-m", "vmonarch_cli", "generate", "-m", str(folder), "-o", str(out), "--overwrite"]
    command += ["--prompt", "a red circle rising", *arguments]
    watch = Watch()
    watch.start()
    start = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        code, shown = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired:
        code, shown = 124, ""
    least = watch.stop()
    del taken
    torch.cuda.empty_cache()
    found: dict[str, Any] = {
        "card_gib": card,
        "free_gib": before / GIB,
        "process_peak_gib": (before - least) / GIB,
        "seconds": time.monotonic() - start,
        "exit": code,
        "said": [line.strip() for line in shown.splitlines() if re.search(r"offload|memory", line)],
    }
    record = next(iter(out.parent.glob("*.json")), None)
    if code == 0 and record is not None:
        text = json.loads(record.read_text())
        found["allocator_peak_gib"] = text["timing"]["peak_memory_bytes"] / GIB
        found["timing"] = text["timing"]
    else:
        found["error"] = shown[-2000:]
    return found


def main() -> None:
    """Write the model if it is not there, then measure it on each card; the JSON is kept up after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=WAN, required=True)
    parser.add_argument("--card", type=float, action="append", help="GiB free (repeatable; default 24)")
    parser.add_argument("--work", type=Path, required=True, help="folder for the model and the clips")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds per clip")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("arguments", nargs="*", help="more flags of generate, after --")
    args = parser.parse_args()
    folder = args.work / args.model
    write_model(WAN[args.model], folder)
    settings = {"model": args.model, "arguments": args.arguments, "dtype": "bfloat16"}
    machine = this_machine(torch.device("cuda"))
    recorder = Recorder("card", str(args.json), machine, settings, "python tests/bench/small_card.py")
    cards: list[dict[str, Any]] = []
    for card in args.card or [24.0]:
        cards.append(measure(folder, card, args.arguments, args.timeout))
        recorder.save(cards=cards)
        print(json.dumps(cards[-1], indent=2))
    recorder.finish(all(card["exit"] == 0 for card in cards))


if __name__ == "__main__":
    main()
