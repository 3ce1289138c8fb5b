"""The training of the transformer in two processes, as torchrun starts them: mean gradients and one decision."""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vmonarch_cli.demo.training.__main__ import main
from vmonarch_cli.demo.training.flags import add_dit_arguments
from vmonarch_cli.demo.training.train_dit import TransformerTraining
from vmonarch_cli.machine.group import Group

ROOT = Path(__file__).parents[2]
# Each process leaves its weights and its schedule beside what the first one exports.
PROGRAM = """
import os, sys, time, torch
from vmonarch_cli.demo.training import train_dit
from vmonarch_cli.demo.training.__main__ import main
from vmonarch_cli.demo.training.loop import learning_rate

train = train_dit.TransformerTraining.train
positions = []

def rate(base, position, step, **more):
    positions.append(position)
    return learning_rate(base, position, step, **more)

def whole(self):
    train(self)
    state = {"transformer": self.transformer.state_dict(), "averaged": self.averaged.state_dict()}
    state |= {"head": self.middle_head.state_dict(), "step": self.step, "positions": positions}
    state["specs"] = [str(bank.specs) for bank in self.banks.banks]
    torch.save(state, self.args.out / f"process_{self.group.rank}.pt")

fill = train_dit.TransformerTraining.fill_banks

def late(self):
    fill(self)
    time.sleep(float(os.environ.get("LATE", 0)) * self.group.rank)

train_dit.TransformerTraining.train = whole
train_dit.TransformerTraining.fill_banks = late
train_dit.loop.learning_rate = rate
main(sys.argv[1:])
"""
DIT = [
    "--preset", "tiny", "--clips", "5x32:1,9x32:1", "--batch", "4", "--bank", "6", "--encode-batch", "2",
    "--no-compile", "--device", "cpu", "--refresh-every", "3", "--refresh", "2", "--sample-steps", "1",
    "--samples", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The flags of a tiny autoencoder and text encoder."""
    out = tmp_path_factory.mktemp("parts")
    vae = "vae --preset tiny --size 32 --batch 1 --image-batch 4 --phases 1:0.5,5:1 --no-compile --device cpu"
    main([*vae.split(), "--max-steps", "2", "--eval-clips", "1", "--latent-clips", "2", "--out", str(out)])
    main(["text", "--preset", "tiny", "--batch", "4", "--device", "cpu", "--steps", "1", "--out", str(out)])
    return ["--vae", str(out / "vae"), "--text", str(out)]


def run_pair(command: list[str]) -> list[str]:
    """What two processes that train together say on stderr."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, "dit", *command], cwd=ROOT, text=True, stderr=subprocess.PIPE,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=300)[1] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], "\n".join(said)
    return said


def left_by(out: Path) -> list[dict[str, object]]:
    return [torch.load(out / f"process_{rank}.pt", weights_only=True) for rank in range(2)]


def assert_equal(one: object, other: object) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_the_gradient_is_the_mean_over_the_clips_of_both(parts: list[str], tmp_path: Path) -> None:
    """After one step AdamW's first moments are a tenth of the gradient, clipped to norm 1."""
    command = [*DIT, *parts, "--small-until", "0", "--max-steps", "1", "--samples", "0"]
    run_pair([*command, "--out", str(tmp_path / "pair")])
    state = torch.load(tmp_path / "pair" / "dit_checkpoint.pt", weights_only=True)["optimizer"]["state"]
    found = [10 * state[number]["exp_avg"] for number in sorted(state)]

    parser = argparse.ArgumentParser()
    add_dit_arguments(parser)
    args = parser.parse_args([*command, "--out", str(tmp_path / "alone")])
    gradients: list[list[Tensor]] = []
    for rank in range(2):
        alone = TransformerTraining(args, torch.device("cpu"), Group(rank))
        alone.fill_banks()
        alone.middle_head.listen_to(alone.transformer)
        banks = alone.banks.banks
        alone.losses(alone.source.draw([(0, alone.source.bank_of(0, banks))], banks)[0])[0].backward()
        both = [*alone.transformer.parameters(), *alone.middle_head.parameters()]
        gradients.append([p.grad for p in both if p.grad is not None])
    different = [(a - b).norm() / b.norm() for a, b in zip(*gradients, strict=True) if b.norm() > 0]
    assert max(different) > 0.1, "both processes have seen the same clips"
    wanted = [nn.Parameter(torch.zeros_like(a)) for a in gradients[0]]
    for parameter, one, other in zip(wanted, *gradients, strict=True):
        parameter.grad = (one + other) / 2
    nn.utils.clip_grad_norm_(wanted, 1.0)
    for mean, parameter in zip(found, wanted, strict=True):
        torch.testing.assert_close(mean, parameter.grad, rtol=1e-3, atol=1e-6)


def test_both_processes_come_to_the_same_weights_and_one_writes(parts: list[str], tmp_path: Path) -> None:
    """Through larger clips and Monarch attention, which begin in the same step, and on from a checkpoint."""
    command = [*DIT, *parts, "--small-until", "0.25", "--structured", "0.5", "--max-steps", "8", "--out", str(tmp_path)]
    said = run_pair([*command, "--stop-after", "6"])
    assert '"event": "step"' in said[0]
    assert '"event"' not in said[1]
    halfway = left_by(tmp_path)
    run_pair([*command, "--resume"])
    one, other = left_by(tmp_path)
    for key in ("transformer", "averaged", "head", "step", "positions"):
        assert_equal(one[key], other[key])
        assert_equal(halfway[0][key], halfway[1][key])
    assert one["step"] == 8
    assert one["specs"] != other["specs"], "each has clips of its own"
    events = [json.loads(line)["event"] for line in (tmp_path / "dit_log.jsonl").read_text().splitlines()]
    assert events.count("exported") == events.count("samples") == 2, "one of each run"
    assert events.count("structured") == 2
    written = load_file(tmp_path / "weights" / "transformer" / "diffusion_pytorch_model.safetensors")
    for name, value in written.items():
        torch.testing.assert_close(value.float(), one["averaged"][name], rtol=1e-2, atol=1e-2)  # type: ignore[index]
    report = json.loads((tmp_path / "dit_report.json").read_text())
    assert (report["processes"], report["processes_apart"]) == (2, 0)
    assert report["steps"] == 8


def test_the_first_process_decides_what_depends_on_the_time(parts: list[str], tmp_path: Path) -> None:
    """By seconds, whose clocks never agree, both see the same positions and end in the same step."""
    begun = ["--small-until", "0", "--seconds", "60", "--reserve", "0", "--total-seconds", "60", "--samples", "0"]
    run_pair([*DIT, *parts, *begun, "--stop-after", "5", "--structured", "0", "--out", str(tmp_path)])
    one, other = left_by(tmp_path)
    assert_equal(one["positions"], other["positions"])
    assert_equal(one["transformer"], other["transformer"])
    assert len(set(one["positions"])) == one["step"] == 5  # type: ignore[arg-type, call-overload]


def test_waiting_for_another_process_does_not_move_the_schedule(
    parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATE", "12")
    begun = ["--small-until", "0", "--seconds", "120", "--reserve", "0", "--total-seconds", "120", "--samples", "0"]
    run_pair([*DIT, *parts, *begun, "--stop-after", "2", "--out", str(tmp_path)])
    first, second = left_by(tmp_path)[0]["positions"]  # type: ignore[misc]
    assert second - first < 0.06, "12 of 120 s would be a tenth"
    met = [json.loads(line) for line in (tmp_path / "dit_log.jsonl").read_text().splitlines() if '"met"' in line]
    assert [line["step"] for line in met] == [0]
    assert met[0]["waited"] > 4


def test_a_mean_that_is_not_finite_is_left_out_by_both_and_what_differs_is_told(tmp_path: Path) -> None:
    program = """
import sys, torch
from pathlib import Path
from vmonarch_cli.demo.training.loop import GuardedStep
from vmonarch_cli.machine.group import joined

device = torch.device("cpu")
with joined(device, host=True) as group:
    weight = torch.nn.Parameter(torch.ones(3))
    step = GuardedStep(torch.optim.SGD([weight], lr=0.5), max_norm=9.0)
    found = []
    for value in (1.0, float("inf"), 1.0):
        weight.grad = torch.full((3,), value if group.rank else 3.0)
        group.average([weight.grad])
        step()
        found.append(weight.detach().clone())
    apart = [group.apart([torch.tensor([norm])]) for norm in (3.0, 3.0 + 2 * group.rank)]
    state = {"weights": found, "skipped": step.skipped, "apart": apart}
    torch.save(state, Path(sys.argv[1]) / f"process_{group.rank}.pt")
"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "PROGRAM", program.replace("sys.argv[1]", "sys.argv[2]"))
        run_pair([str(tmp_path)])
    one, other = left_by(tmp_path)
    assert_equal(one["weights"], other["weights"])
    assert_equal(one["weights"], [torch.full((3,), value) for value in (0.0, 0.0, -1.0)])
    assert one["skipped"] == other["skipped"] == 1
    assert one["apart"] == [0, pytest.approx(1 / 3)], "norms of 3 and 5"
    assert other["apart"] == [0, pytest.approx(1 / 5)]
