"""The head in the middle of the transformer: what it reads, that it learns beside Monarch attention, and goes along."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vmonarch_cli.demo.training.__main__ import main
from vmonarch_cli.demo.training.middle_head import HEAD_FILE, MiddleHead
from vmonarch_cli.models.demo_vocabulary import MOTIONS

DIT = [
    "dit", "--preset", "tiny", "--clips", "5x32", "--batch", "4", "--bank", "4", "--encode-batch", "4", "--no-compile",
    "--device", "cpu", "--small-until", "0", "--samples", "0",
]  # fmt: skip


class Passing(nn.Module):
    """A transformer whose only block passes its tokens on."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Identity()])

    def forward(self, x: Tensor) -> Any:
        return self.blocks[0](x)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    vae = "vae --preset tiny --size 32 --batch 1 --image-batch 4 --phases 1:0.5,5:1 --no-compile --device cpu"
    main([*vae.split(), "--max-steps", "2", "--eval-clips", "1", "--latent-clips", "2", "--out", str(out)])
    main(["text", "--preset", "tiny", "--batch", "4", "--device", "cpu", "--steps", "1", "--out", str(out)])
    main([*DIT, "--vae", str(out / "vae"), "--text", str(out), "--out", str(out), "--max-steps", "3"])
    return out


def parts(trained: Path) -> list[str]:
    return ["--vae", str(trained / "vae"), "--text", str(trained)]


def head_in(checkpoint: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(checkpoint / "dit_checkpoint.pt", weights_only=True)["middle_head"]
    return state


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_it_reads_the_first_clips_of_a_batch() -> None:
    torch.manual_seed(0)
    head, transformer = MiddleHead(8), Passing()
    head.listen_to(transformer)
    tokens = torch.randn(6, 2 * 4 * 4, 8)
    covered, moving = torch.rand(3, 2, 16, 16), torch.randint(0, 2, (3, 2, len(MOTIONS))).float()
    found = []
    for seen in (tokens, tokens[:3]):
        transformer(seen)
        found.append(head.losses(covered, moving))
    torch.testing.assert_close(found[0], found[1])


def test_it_learns_beside_monarch_attention(trained: Path, tmp_path: Path) -> None:
    main([*DIT, *parts(trained), "--structured", "--max-steps", "2", "--out", str(tmp_path)])
    state = torch.load(tmp_path / "dit_checkpoint.pt", weights_only=True)
    moments = state["optimizer"]["state"]
    of_head = sorted(moments)[-len(state["middle_head"]) :]
    assert len(moments) == len(state["transformer"]) + len(state["middle_head"])
    for number, value in zip(of_head, state["middle_head"].values(), strict=True):
        assert moments[number]["exp_avg"].shape == value.shape
        assert moments[number]["exp_avg"].abs().max() > 0


@pytest.mark.parametrize("from_checkpoint", [False, True])
def test_a_training_goes_on_with_the_head_of_the_one_before(
    trained: Path, tmp_path: Path, from_checkpoint: bool
) -> None:
    """At a learning rate of 0 it is still that at the end."""
    before = tmp_path / "before"
    before.mkdir()
    (before / "weights").symlink_to(trained / "weights")
    assert not (trained / "weights" / HEAD_FILE).exists()
    source = before / ("dit_checkpoint.pt" if from_checkpoint else HEAD_FILE)
    source.symlink_to(trained / source.name)
    on = ["--init", str(before / "weights"), "--lr", "0", "--max-steps", "1"]
    main([*DIT, *parts(trained), *on, "--out", str(tmp_path / "on")])
    assert same(head_in(tmp_path / "on"), head_in(trained))
    assert same(load_file(tmp_path / "on" / HEAD_FILE), head_in(trained))
    lines = [json.loads(line) for line in (tmp_path / "on" / "dit_log.jsonl").read_text().splitlines()]
    assert [line["of"] for line in lines if line["event"] == "middle_head"] == [str(source)]


def test_a_head_of_another_transformer_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "weights").symlink_to(trained / "weights")
    save_file(MiddleHead(8).state_dict(), tmp_path / HEAD_FILE)
    on = ["--init", str(tmp_path / "weights"), "--max-steps", "1"]
    with pytest.raises(SystemExit) as stop:
        main([*DIT, *parts(trained), *on, "--out", str(tmp_path / "on")])
    assert stop.value.code == 2
    said = f"error: --init: got {tmp_path / HEAD_FILE}, the middle head of another transformer than"
    assert said in capsys.readouterr().err
