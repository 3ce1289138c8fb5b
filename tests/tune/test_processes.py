"""Runs in processes of their own: killed with SIGKILL in both phases, and two that train together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vmonarch_cli.models.tuned import read_adapter

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
# A checkpoint after every trajectory, because a tiny model takes less than the usual time for all of them.
PROGRAM = (
    "import sys, vmonarch_cli.tune.loop as loop; loop.CHECKPOINT_EVERY_S = 0.0; "
    "from vmonarch_cli.cli.app import main; sys.argv = ['vmonarch', *sys.argv[1:]]; main()"
)
PROMPTS = [f"a {colour} {shape} moving {way}" for colour in ("red", "blue") for shape in ("circle", "square")
           for way in ("left", "right")]  # fmt: skip


def start(folder: Path, output: Path, *more: str, **environment: str) -> subprocess.Popen[str]:
    """`vmonarch tune` of the tiny model: 4 sampler steps, 7 trajectories, 60 steps of training of a LoRA or,
    with --full among `more`, of all weights.
    """
    prompts = output.with_suffix(".txt")
    prompts.write_text("\n".join(PROMPTS))
    flags = "--preset fast --sampler-steps 4 --size 48x32 --num-frames 17 --guidance-scale 3 --steps 60"
    flags += "" if "--full" in more else " --rank 4"
    command = [sys.executable, "-c", PROGRAM, "tune", "-m", str(folder), *flags.split(), "--eval-prompts", "1"]
    command += ["--prompts-file", str(prompts), "-o", str(output), *more]
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.Popen(
        command, env=os.environ | quiet, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def pair(folder: Path, output: Path, *more: str) -> list[subprocess.Popen[str]]:
    """Two processes, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [start(folder, output, *more, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(2)]


def finished(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors


def killed_when(process: subprocess.Popen[str], file: Path) -> None:
    """SIGKILL as soon as a file is there."""
    for _ in range(50_000):
        if file.exists():
            break
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL


def same_adapter(a: Path, b: Path) -> None:
    """Equal weights to the bit. Evaluations may differ by rounding: products depend on where weights lie."""
    first, second = load_file(a), load_file(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(second[name], value) for name, value in first.items())
    before, after = (read_adapter(path).evaluation for path in (a, b))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert after[name] == (pytest.approx(value, rel=1e-5) if isinstance(value, dict) else value)


def test_killed_in_both_phases_a_run_comes_to_the_same_adapter(tiny_wan_folder: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    finished(start(tiny_wan_folder, whole))
    killed_when(start(tiny_wan_folder, parts), parts.with_suffix(".tune") / "trajectories" / "00002.safetensors")
    assert not (parts.with_suffix(".tune") / "checkpoint.safetensors").exists()
    killed_when(start(tiny_wan_folder, parts, "--resume"), parts.with_suffix(".tune") / "checkpoint.safetensors")
    assert not parts.exists()
    finished(start(tiny_wan_folder, parts, "--resume"))
    same_adapter(whole, parts)
    assert not parts.with_suffix(".tune").exists()


@pytest.mark.parametrize("kind", ["lora", "weights"])
def test_two_processes_train_as_one_with_twice_the_batch(tiny_wan_folder: Path, tmp_path: Path, kind: str) -> None:
    """Each has its own trajectories, DDP or FSDP adds up the gradients, and the first one writes the file."""
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    more = ["--steps", "8", *(["--full", "--lr", "1e-3"] if kind == "weights" else [])]
    finished(start(tiny_wan_folder, one, "--batch", "2", *more))
    for process in pair(tiny_wan_folder, two, *more):
        finished(process)
    first, second = load_file(one), load_file(two)
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=2e-2, atol=2e-4, msg=name)
    if kind == "weights":
        weights = load_file(tiny_wan_folder / "transformer" / "diffusion_pytorch_model.safetensors")
        learnt = [{name: state[f"transformer.{name}"] - value for name, value in weights.items()}
                  for state in (first, second)]  # fmt: skip
        for name, value in learnt[0].items():
            assert (learnt[1][name] - value).norm() < 0.02 * value.norm() + 1e-6, name
    made, twice = read_adapter(one), read_adapter(two)
    assert made.kind == twice.kind == kind
    assert (made.training["batch"], twice.training["batch"]) == (2, 2)
    assert made.training["loss_first"] == pytest.approx(twice.training["loss_first"], rel=1e-4)
    assert made.training["loss_last"] == pytest.approx(twice.training["loss_last"], rel=1e-3)


def test_two_processes_that_share_all_weights_go_on_where_they_were_killed(
    tiny_wan_folder: Path, tmp_path: Path
) -> None:
    """Each has a part of every weight; the checkpoint has them whole."""
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    more = ["--full", "--lr", "1e-3"]
    for process in pair(tiny_wan_folder, whole, *more):
        finished(process)
    first, second = pair(tiny_wan_folder, parts, *more)
    killed_when(first, parts.with_suffix(".tune") / "checkpoint.safetensors")
    second.kill()
    second.communicate(timeout=60)
    assert not parts.exists()
    for process in pair(tiny_wan_folder, parts, *more, "--resume"):
        finished(process)
    same_adapter(whole, parts)
