"""tests/bench/records.py: the program takes every command of its list, and each makes the record that is named."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from scripts import ROOT, bench_script
from typer.testing import CliRunner

from vmonarch_cli.cli.app import app

BENCH = ROOT / "tests" / "bench"
RECORDS = bench_script("records", BENCH)
ENTRIES = RECORDS.entries()
MODULES = ("vmonarch_cli", "torch.distributed.run")


@pytest.fixture(scope="module")
def records() -> ModuleType:
    return RECORDS


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure")
@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if entry.command.startswith("vmonarch ")])
def test_the_program_takes_the_command_as_far_as_the_gpu(name: str, tiny_wan_folder: Path, tmp_path: Path) -> None:
    assert "device 'cuda' cannot be used" in said_without_gpu(ENTRIES[name], tiny_wan_folder, tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure")
@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("vmonarch profile model -m cogvideox-5b --random-weights --fuse", "have no fused form"),
        ("vmonarch profile clip -m {weights} --prompt red --steps 0", "--steps takes a whole number"),
    ],
)
def test_a_command_that_no_gpu_could_run_is_found_without_one(
    records: ModuleType, command: str, sentence: str, tiny_wan_folder: Path, tmp_path: Path
) -> None:
    """Else the list's fault shows where minutes of a GPU are spent on it."""
    entry = records.Entry("wrong", command, 60, weights="wan2.1-1.3b" if "{weights}" in command else None)
    assert sentence in said_without_gpu(entry, tiny_wan_folder, tmp_path)


def said_without_gpu(entry: Any, tiny_wan_folder: Path, tmp_path: Path) -> str:
    """What a command says where there is no GPU; no record is left."""
    target = tmp_path / "record.json"
    arguments = entry.arguments(target, tmp_path / "work", tmp_path)[3:]
    given = [str(tiny_wan_folder) if word == str(tmp_path / str(entry.weights)) else word for word in arguments]
    result = CliRunner().invoke(app, [*given, "--device", "cuda"])
    assert result.exit_code == 2
    assert not target.exists()
    return result.stderr


SCRIPTS = sorted({word for entry in ENTRIES.values() for word in entry.command.split() if word.endswith(".py")})


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_script_knows_its_flags(script: str, tmp_path: Path) -> None:
    help_text = subprocess.run(
        [sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    commands = [entry.arguments(tmp_path / "record.json", tmp_path / "work", tmp_path) for entry in ENTRIES.values()]
    flags = {word for words in commands if script in words for word in words[words.index(script) :] if word[:2] == "--"}
    assert flags
    assert not [flag for flag in flags if flag not in help_text]


def test_the_file_is_named_for_the_chip(records: ModuleType) -> None:
    names = ["NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA GeForce RTX 4090", "AMD Instinct MI300X", "Some card"]
    assert [records.chip_of(name) for name in names] == ["h200", "h100", "4090", "mi300x", "gpu"]
    assert ENTRIES["kernel"].file("h200") == "h200-kernel.json"
    several = {entry.file("h200") for entry in ENTRIES.values() if entry.gpus == 2}
    cited = {path.name for path in (ROOT / "kernels" / "bench" / "results").glob("h200x2-*.json")}
    assert several >= cited - {"h200x2-scaling-float32.json"}


def test_what_is_good_stays_and_what_does_not_fit_is_said(
    records: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commands run in their order: one that works, one that fails, one whose checks fail, one that takes too long."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")

    def entry(name: str, code: str, seconds: float = 60, **fields: object) -> object:
        script = tmp_path / f"{name}.py"
        script.write_text(f"import json, sys, time\nout = open(sys.argv[2], 'w')\n{code}\n")
        return records.Entry(name, f"{{python}} {script}", seconds, **fields)

    late = f"import pathlib, time; time.sleep(4); pathlib.Path({str(tmp_path / 'late.alive')!r}).touch()"
    later = [sys.executable, "-c", late]
    good = "json.dump({'checks_passed': True}, out)"
    wanted = {
        "one": entry("one", good),
        "fails": entry("fails", "sys.exit('no kernel')"),
        "wrong": entry("wrong", "json.dump({'checks_passed': False}, out)"),
        "slow": entry("slow", f"import subprocess; subprocess.run({later!r}); time.sleep(60)", seconds=3),
        "two cards": entry("two", good, gpus=2),
        "long": entry("long", good, seconds=1e6),
        "peer": entry("peer", good, package="no_such_package.inside"),
    }
    said = dict(records.made(wanted, tmp_path, 1000.0))
    assert said["one"].startswith("made in ")
    assert said["fails"].startswith("exit 1, see ")
    assert "no kernel" in Path(said["fails"].rpartition(" ")[2]).read_text()
    assert "its checks failed" in said["wrong"]
    assert "stopped after" in said["slow"]
    time.sleep(2.5)  # by now it would have written, if it lived
    assert not list(tmp_path.glob("*.alive")), "what a command started ends with it"
    assert said["two cards"] == "left out: 2 GPUs are needed, 1 here"
    assert said["long"].startswith("left out: ")
    assert said["peer"] == "left out: no_such_package.inside is not installed"
    before = (tmp_path / "h200-one.json").stat()
    again = dict(records.made({"one": wanted["one"]}, tmp_path, 1000.0))
    assert again == {"one": "is there"}
    assert (tmp_path / "h200-one.json").stat().st_mtime_ns == before.st_mtime_ns
    assert json.loads((tmp_path / "h200-one.json").read_text()) == {"checks_passed": True}
