"""What a training of the transformer draws, encodes and compiles, and how often."""

from __future__ import annotations

import json
import threading
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from vmonarch_cli.attention.ahead import KernelsAhead
from vmonarch_cli.demo.clips import frame_times, occupancy, render
from vmonarch_cli.demo.model import DIT_PRESETS, VAE_PRESETS, build_text_encoder, build_tokenizer, build_vae
from vmonarch_cli.demo.specs import ClipSpec, sample_spec
from vmonarch_cli.demo.training import loop, train_dit
from vmonarch_cli.demo.training.__main__ import main
from vmonarch_cli.demo.training.bank_set import BankSet
from vmonarch_cli.demo.training.buckets import Bucket, parse_buckets
from vmonarch_cli.demo.training.compiled import CompiledBlocks
from vmonarch_cli.demo.training.latent_bank import BankLimits, LatentBank
from vmonarch_cli.demo.training.loop import JsonLog
from vmonarch_cli.demo.training.middle_head import MiddleHead
from vmonarch_cli.demo.training.step_inputs import InputSource, shift_for
from vmonarch_cli.demo.training.train_dit import TransformerTraining

CPU = torch.device("cpu")


@dataclass
class Bank:
    """The part of a bank that inputs are drawn from."""

    bucket: Bucket
    specs: list[ClipSpec] = field(default_factory=lambda: [sample_spec("train", 0, i) for i in range(9)])


@pytest.fixture(scope="module")
def source() -> InputSource:
    encoder = build_text_encoder(DIT_PRESETS["tiny"][1]).eval()
    return InputSource(build_tokenizer(), encoder, CPU, batch=8, first=parse_buckets("49x96")[0], seed=3)


def test_inputs_drawn_at_once_are_those_drawn_one_by_one(source: InputSource) -> None:
    banks = cast(Any, [Bank(bucket) for bucket in parse_buckets("49x96,97x96")])
    steps = [(7, 1), (8, 0), (9, 1)]
    together = source.draw(steps, banks)
    assert [(len(x.rows), len(x.sigmas), len(x.text), x.bank) for x in together] == [
        (4, 4, 4, 1),
        (8, 8, 8, 0),
        (4, 4, 4, 1),
    ]
    for step, found in zip(steps, together, strict=True):
        (alone,) = source.draw([step], banks)
        assert torch.equal(found.rows, alone.rows)
        assert torch.equal(found.sigmas, alone.sigmas)
        torch.testing.assert_close(found.text, alone.text)


def test_halves_hold_the_same_clips_noise_levels_and_words(source: InputSource) -> None:
    (found,) = replace(source, halves_every=1).draw([(5, 0)], cast(Any, [Bank(source.first)]))
    assert found.halved
    for values in (found.rows, found.sigmas, found.text):
        assert len(values) == 8
        assert torch.equal(values[:4], values[4:])
    assert len(found.sigmas.unique()) == 4
    assert not torch.equal(found.text[0], found.text[1])


def test_steps_between_those_in_halves_are_as_they_were(source: InputSource) -> None:
    banks, steps = cast(Any, [Bank(source.first)]), [(step, 0) for step in range(6)]
    found = replace(source, halves_every=3).draw(steps, banks)
    assert [x.halved for x in found] == [True, False, False, True, False, False]
    for one, other in zip(found, source.draw(steps, banks), strict=True):
        assert len(one.rows) == 8
        if not one.halved:
            assert torch.equal(one.rows, other.rows)
            assert torch.equal(one.sigmas, other.sigmas)
    assert [replace(source, halves_every=3).trial(step, 0, banks).halved for step in range(3)] == [True] * 3
    assert not source.trial(4, 0, banks).halved


@pytest.mark.parametrize(
    ("clips", "at_once", "kept"), [(0, 4, 1), (3, 4, 3), (4, 4, 4), (11, 4, 8)], ids=["none", "few", "one", "several"]
)
def test_a_bank_holds_whole_batches(clips: int, at_once: int, kept: int) -> None:
    assert BankLimits.in_batches(clips, at_once, 1.0) == BankLimits(kept, at_once, 1.0)


def test_a_bank_is_renewed_in_batches_of_the_size_it_was_filled_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    vae = build_vae(VAE_PRESETS["tiny"]).eval().requires_grad_(False)
    limits = BankLimits.in_batches(9, 4, 100.0)
    bank = LatentBank(vae, CPU, JsonLog(tmp_path / "log.jsonl"), bucket=Bucket(5, 32, 1.0), limits=limits, seed=0)
    encode, sizes = bank.encode, []

    def counted(specs: list[ClipSpec]) -> Tensor:
        sizes.append(len(specs))
        return encode(specs)

    monkeypatch.setattr(bank, "encode", counted)
    bank.fill()
    bank.refresh(4)
    bank.refresh(11)  # two batches are more than what is left before the bank's end
    bank.refresh(10)
    bank.refresh(3)
    assert sizes == [4, 4, 4, 4, 4, 4, 3]
    assert bank.next_clip == 8 + 4 + 4 + 8 + 3
    newest = [max(n for n in range(bank.next_clip) if n % 8 == row) for row in range(8)]  # clip n is in row n modulo 8
    assert bank.specs == [sample_spec("train", 0, n, 5) for n in newest]
    torch.testing.assert_close(bank.latents.float(), encode(bank.specs), rtol=2e-3, atol=2e-3)


def test_a_bank_encodes_in_the_autoencoders_precision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = build_vae(VAE_PRESETS["tiny"]).eval().requires_grad_(False)
    found = {}
    for dtype in (torch.float32, torch.float16):
        limits, log = BankLimits(2, 2, 100.0), JsonLog(tmp_path / "log.jsonl")
        bank = LatentBank(vae.to(dtype), CPU, log, bucket=Bucket(5, 32, 1.0), limits=limits, seed=0)
        bank.fill()
        found[dtype] = bank.latents.float()
    error = (found[torch.float16] - found[torch.float32]).norm() / found[torch.float32].norm()
    assert 1e-5 < error < 2e-3  # of bfloat16 it would be 5e-3


def test_latents_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    vae = build_vae(VAE_PRESETS["tiny"]).eval().requires_grad_(False)
    vae.encoder.conv_in.bias.fill_(float("inf"))
    limits, log = BankLimits(1, 1, 100.0), JsonLog(tmp_path / "log.jsonl")
    bank = LatentBank(vae, CPU, log, bucket=Bucket(5, 32, 1.0), limits=limits, seed=0)
    with pytest.raises(FloatingPointError, match="--vae: it encodes clips of 5x32 to latents that are not finite"):
        bank.fill()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="nothing is queued on a CPU")
def test_rendering_does_not_wait_for_the_gpu() -> None:
    specs = [sample_spec("train", 0, i) for i in range(8)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        video = render(specs, frame_times(5), size=32, device="cuda")
        covered = occupancy(specs, frame_times(5), size=32, device="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(video.cpu(), render(specs, frame_times(5), size=32), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(covered.cpu(), occupancy(specs, frame_times(5), size=32), rtol=1e-3, atol=1e-3)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + cast(Tensor, self.linear(x)).tanh()


class Blocks(nn.Module):
    """A transformer whose blocks are compiled without a code generator."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def compile_repeated_blocks(self, *, dynamic: bool) -> None:
        for block in self.blocks:
            block.compile(backend="aot_eager", dynamic=dynamic)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture
def compiled(tmp_path: Path) -> CompiledBlocks:
    torch.compiler.reset()
    blocks = CompiledBlocks(
        Blocks(), MiddleHead(8), JsonLog(tmp_path / "log.jsonl"), CPU, Blocks.compile_repeated_blocks
    )
    blocks.compile(dynamic=True)
    return blocks


def events(folder: Path) -> list[str]:
    return [json.loads(line)["event"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_only_code_that_is_new_is_compared(compiled: CompiledBlocks, tmp_path: Path) -> None:
    runs: list[str] = []

    def of(name: str, x: Tensor) -> tuple[str, Callable[[], Tensor]]:
        def objective() -> Tensor:
            runs.append(name)
            return cast(Tensor, compiled.transformer(x)).square().sum()

        return name, objective

    compiled.keep_if_right([of("first", torch.randn(4, 6, 8)), of("same code", x := torch.randn(5, 7, 8))])
    assert runs == ["first"] * 3 + ["same code"]
    compiled.keep_if_right([of("known", torch.randn(6, 9, 8)), of("other code", torch.randn(4, 8))])
    assert runs[4:] == ["known"] + ["other code"] * 3
    compiled.keep_if_right([of("beside new code", torch.randn(4, 6, 8)), of("known", x)], compare_first=True)
    assert runs[8:] == ["beside new code"] * 3 + ["known"]
    assert compiled.kept
    assert events(tmp_path) == ["compiled"] * 6


def test_wrong_code_is_taken_back_and_tried_no_more(compiled: CompiledBlocks, tmp_path: Path) -> None:
    x, scales = torch.randn(4, 6, 8), [1.0, 1.0, 1.2]  # a first run, then without compilation and compiled

    def objective() -> Tensor:
        return scales.pop(0) * cast(Tensor, compiled.transformer(x)).square().sum()

    compiled.keep_if_right([("49x96", objective), ("97x96", objective)])
    compiled.keep_if_right([("49x96", objective)])
    assert not compiled.kept
    assert not scales
    assert events(tmp_path) == ["compile_failed"]
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled.transformer(torch.randn(2, 8))  # of another shape: compiled blocks would raise an error


def trained_parts(folder: Path) -> list[str]:
    """Flags of a training of the transformer, of an autoencoder and a text encoder that are made in a folder."""
    vae = "vae --preset tiny --size 32 --batch 1 --image-batch 4 --phases 1:0.5,5:1 --no-compile --device cpu"
    main([*vae.split(), "--max-steps", "2", "--eval-clips", "1", "--latent-clips", "2", "--out", str(folder)])
    main(["text", "--preset", "tiny", "--batch", "4", "--device", "cpu", "--steps", "1", "--out", str(folder)])
    return ["--vae", str(folder / "vae"), "--text", str(folder)]


def test_the_report_says_what_the_time_went_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that stands still but for 10 s of set-up, 3 s a bank, 7 s a trial, 0.5 s a step, 2 s of export."""
    now = [90.0]
    parts = trained_parts(tmp_path)

    def takes(owner: Any, name: str, seconds: float) -> None:
        known = getattr(owner, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            now[0] += seconds
            return known(*args, **kwargs)

        monkeypatch.setattr(owner, name, run)

    monkeypatch.setattr(loop, "_PROCESS_START", now[0])
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    uncompiled = partial(CompiledBlocks, compile_blocks=lambda transformer, dynamic: None)
    monkeypatch.setattr(train_dit, "CompiledBlocks", uncompiled)
    takes(train_dit, "build_tokenizer", 10.0)
    takes(LatentBank, "fill", 3.0)
    takes(loop, "trial", 7.0)
    takes(TransformerTraining, "train_step", 0.5)
    takes(train_dit, "export_pipeline", 2.0)
    flags = "--preset tiny --clips 5x32,9x32 --batch 4 --bank 4 --encode-batch 4 --device cpu --samples 0 --max-steps 6"
    main(["dit", *flags.split(), *parts, "--small-until", "0.5", "--structured", "0.8", "--out", str(tmp_path)])
    # Both banks in both sizes; both kinds of clips at the start, when they grow and when Monarch attention begins.
    spent = {"setup": 10.0, "banks": 12.0, "compilation": 42.0, "training": 3.0, "export": 2.0}
    assert json.loads((tmp_path / "dit_report.json").read_text())["spent"] == pytest.approx(spent)
    (line,) = [json.loads(x) for x in (tmp_path / "dit_log.jsonl").read_text().splitlines() if '"exported"' in x]
    assert line["spent"] == pytest.approx(spent)


@pytest.mark.parametrize("ends", ["early", "in an error"])
def test_kernels_that_nobody_waits_for_are_not_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    """A training that ends before Monarch attention begins would stay until the last of them is."""
    parts = trained_parts(tmp_path)
    over, compiled = threading.Event(), []

    class Kernel:
        def compile(self) -> None:
            compiled.append(self)
            over.wait(60)

    started = KernelsAhead(lambda: None, lambda rehearse: [Kernel() for _ in range(100)])
    monkeypatch.setattr(train_dit, "kernels_ahead", lambda *_: started)
    if ends != "early":
        monkeypatch.setattr(LatentBank, "_put", Mock(side_effect=FloatingPointError("no number")))
    flags = "--preset tiny --clips 5x32 --batch 4 --bank 4 --encode-batch 4 --no-compile --device cpu --samples 0"
    steps = "--max-steps 4 --stop-after 1 --structured 0.5 --small-until 0"
    with nullcontext() if ends == "early" else pytest.raises(FloatingPointError):
        main(["dit", *flags.split(), *steps.split(), *parts, "--out", str(tmp_path)])
    over.set()
    started.wait()
    assert 0 < len(compiled) < 10


def test_longer_and_larger_clips_get_more_noise() -> None:
    first, longer, larger, smaller = parse_buckets("49x96,193x96,49x192,49x48")
    assert shift_for(first, first) == pytest.approx(6)
    assert shift_for(longer, first) == pytest.approx(6 * (49 / 13) ** 0.5)
    assert (shift_for(larger, first), shift_for(smaller, first)) == (pytest.approx(12), pytest.approx(3))


def test_banks_are_renewed_as_often_as_training_takes_clips_from_them(tmp_path: Path) -> None:
    buckets = parse_buckets("49x96:6,97x96:3,193x96:1")
    args = Namespace(clips=buckets, refresh=49 * 4)
    banks = BankSet(args, None, CPU, JsonLog(tmp_path / "log.jsonl"), seed=0)
    banks.banks[:] = [Mock(bucket=bucket) for bucket in buckets]
    for turn in range(1, 201):
        banks.refresh(turn)
    calls = [cast(Mock, bank).refresh.call_args_list for bank in banks.banks]
    assert [len(of_bank) for of_bank in calls] == [pytest.approx(n, abs=2) for n in (120, 60, 20)]
    assert [of_bank[0].args[0] for of_bank in calls] == [196, 102, 52]  # as many tokens
