"""Both training scripts on tiny models: they learn, stop, resume exactly, and export."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from adapters import write
from diffusers import AutoencoderKLWan

from vmonarch_cli.demo import score
from vmonarch_cli.demo.card import main as write_card
from vmonarch_cli.demo.card import model_card
from vmonarch_cli.demo.model import DIT_PRESETS, build_text_encoder
from vmonarch_cli.demo.specs import sample_spec
from vmonarch_cli.demo.training import loop, objective
from vmonarch_cli.demo.training.__main__ import main
from vmonarch_cli.demo.training.buckets import parse_buckets
from vmonarch_cli.demo.training.compiled import compare_compiled
from vmonarch_cli.demo.training.flags import parse_phases
from vmonarch_cli.demo.training.loop import Schedule, learning_rate
from vmonarch_cli.demo.training.step_inputs import sigmas_for
from vmonarch_cli.demo.training.train_text import all_facts, facts, load_text_encoder
from vmonarch_cli.models.demo_vocabulary import vocabulary
from vmonarch_cli.plan.tuned import read
from vmonarch_cli.presets import load_preset

VAE = [
    "vae", "--preset", "tiny", "--size", "32", "--batch", "1", "--image-batch", "4", "--phases", "1:0.5,5:1",
    "--no-compile", "--device", "cpu", "--max-steps", "4", "--eval-clips", "1", "--latent-clips", "2",
]  # fmt: skip
DIT = [
    "dit", "--preset", "tiny", "--clips", "49x32", "--batch", "2", "--bank", "4", "--encode-batch", "4", "--no-compile",
    "--device", "cpu", "--max-steps", "4", "--refresh-every", "2", "--refresh", "1", "--sample-steps", "1",
]  # fmt: skip


TEXT = ["text", "--preset", "tiny", "--batch", "16", "--device", "cpu"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All parts trained for a few steps without a break."""
    out = tmp_path_factory.mktemp("whole")
    main([*VAE, "--out", str(out)])
    main([*TEXT, "--out", str(out), "--steps", "2"])
    main([*DIT, "--vae", str(out / "vae"), "--text", str(out), "--out", str(out), "--samples", "1"])
    return out


def _assert_same_state(a: Path, b: Path, keys: list[str]) -> None:
    first, second = (torch.load(p, weights_only=True) for p in (a, b))
    assert first["step"] == second["step"]
    for key in keys:
        one, two = first[key], second[key]
        for x, y in zip(*([one, two] if isinstance(one, list) else [[one], [two]]), strict=True):
            for name in x:
                torch.testing.assert_close(x[name], y[name], msg=lambda m, n=f"{key}.{name}": f"{n}: {m}")


def test_the_autoencoder_resumes_exactly(trained: Path, tmp_path: Path) -> None:
    main([*VAE, "--out", str(tmp_path), "--stop-after", "3"])
    main([*VAE, "--out", str(tmp_path), "--resume"])
    _assert_same_state(trained / "vae_checkpoint.pt", tmp_path / "vae_checkpoint.pt", ["model", "averaged"])


def refusal(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """What a training says that ends with the exit code for input that is not valid."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_the_decoder_learns_while_every_latent_stays(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [*VAE, "--phases", "5:1", "--init", str(trained / "vae"), "--decoder-only", "--lr", "0.01"]
    main([*more, "--out", str(tmp_path)])
    before, after = (AutoencoderKLWan.from_pretrained(folder / "vae") for folder in (trained, tmp_path))
    for name, value in before.state_dict().items():
        same = torch.equal(value, after.state_dict()[name])
        assert same or not name.startswith(("encoder.", "quant_conv.")), name
    assert not torch.equal(before.decoder.conv_in.weight, after.decoder.conv_in.weight)
    assert before.config.latents_std == after.config.latents_std
    said = refusal(capsys, [*VAE, "--decoder-only", "--out", str(tmp_path / "fresh")])
    assert said.startswith("error: --decoder-only: got no --init")


def test_the_transformer_resumes_exactly(trained: Path, tmp_path: Path) -> None:
    command = [*DIT, "--vae", str(trained / "vae"), "--text", str(trained), "--samples", "0", "--out", str(tmp_path)]
    main([*command, "--stop-after", "3"])
    main([*command, "--resume"])
    _assert_same_state(
        trained / "dit_checkpoint.pt", tmp_path / "dit_checkpoint.pt", ["transformer", "middle_head", "averaged"]
    )


MIXED = ["--clips", "17x32:1,49x32:1,97x32:2,17x48:1", "--small-until", "0.3", "--max-steps", "8"]


def test_the_transformer_trains_at_mixed_lengths_and_sizes(trained: Path, tmp_path: Path) -> None:
    parts = ["--vae", str(trained / "vae"), "--text", str(trained), "--samples", "0", *MIXED]
    main([*DIT, *parts, "--out", str(tmp_path / "whole"), "--profile-steps", "8"])
    lines = [json.loads(line) for line in (tmp_path / "whole" / "dit_log.jsonl").read_text().splitlines()]
    banks = [line["bucket"] for line in lines if line["event"] == "bank_full"]
    assert banks == ["17x16", "49x16", "97x16", "17x24", "17x32", "49x32", "97x32", "17x48"]
    steps = [line for line in lines if line["event"] == "step"]
    assert any(len(line["losses"]) > 1 for line in steps)
    assert 0 < steps[-1]["motions"] < math.log(2)  # what the middle head misses; ln 2 is chance
    report = json.loads((tmp_path / "whole" / "dit_report.json").read_text())
    assert report["mixed"] == {"17x32": 0.2, "49x32": 0.2, "97x32": 0.4, "17x48": 0.2}
    main([*DIT, *parts, "--out", str(tmp_path / "two"), "--stop-after", "5"])
    main([*DIT, *parts, "--out", str(tmp_path / "two"), "--resume"])
    keys = ["transformer", "middle_head", "averaged"]
    _assert_same_state(tmp_path / "whole" / "dit_checkpoint.pt", tmp_path / "two" / "dit_checkpoint.pt", keys)


def test_steps_of_all_lengths_and_sizes_have_as_many_tokens() -> None:
    first, *others = parse_buckets("49x96:2,17x96,97x96,193x96,193x128:0.5")
    assert sum(b.share for b in (first, *others)) == pytest.approx(1)
    assert (first.grid, first.tokens, first.share) == ((13, 24, 24), 1872, pytest.approx(2 / 5.5))
    for bucket in others:
        tokens = bucket.equal_count(64, first) * bucket.tokens
        assert tokens == pytest.approx(64 * 1872, rel=0.06)


@pytest.mark.parametrize("text", ["", "49", "49x96:x", "48x96", "49x90", "49x96:0", "49x96:inf", "49x96,49x96:2"])
def test_clips_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--clips: got"):
        parse_buckets(text)


def test_compilation_that_changes_gradients_is_found_out() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    scale = [1.0, 1.01, 1.0, 1.2]  # once as it is, once compiled

    def backward() -> None:
        (weight.sum() * scale.pop(0)).backward()

    compare_compiled([weight], backward)
    with pytest.raises(ArithmeticError, match=r"norm is 2\.078 compiled and 1\.732 otherwise"):
        compare_compiled([weight], backward)


def test_the_text_encoder_grows_by_later_words(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Known tokens keep their numbers and embeddings; an encoder that lacks words trains no transformer."""
    main([*TEXT, "--out", str(tmp_path / "old"), "--steps", "1"])
    smaller = build_text_encoder(DIT_PRESETS["tiny"][1])
    smaller.resize_token_embeddings(len(vocabulary()) - 1)
    smaller.save_pretrained(tmp_path / "old" / "text_encoder")
    old = ["--vae", str(trained / "vae"), "--text", str(tmp_path / "old"), "--out", str(tmp_path)]
    assert f"--text: the text encoder in {tmp_path / 'old'} knows 179 of 180 words" in refusal(capsys, [*DIT, *old])
    main([*TEXT, "--out", str(tmp_path / "new"), "--init", str(tmp_path / "old"), "--steps", "1", "--lr", "0"])
    grown = build_text_encoder(DIT_PRESETS["tiny"][1])
    load_text_encoder(grown, tmp_path / "new")
    torch.testing.assert_close(grown.shared.weight[:-1], smaller.shared.weight)
    report = json.loads((tmp_path / "new" / "text_report.json").read_text())
    assert report["before"]["steps"] == 1
    assert "order" in report["read_right"]


@pytest.mark.parametrize(("share", "first"), [([], 0), (["0.5"], 2)])
def test_training_tunes_both_kinds_of_attention(trained: Path, tmp_path: Path, share: list[str], first: int) -> None:
    command = [*DIT, "--vae", str(trained / "vae"), "--text", str(trained), "--out", str(tmp_path), "--samples", "0"]
    main([*command, "--structured", *share, "--batch", "4", "--small-until", "0", "--profile-steps", "5"])
    lines = [json.loads(line) for line in (tmp_path / "dit_log.jsonl").read_text().splitlines()]
    assert json.loads((tmp_path / "dit_report.json").read_text())["structured"]
    assert [line["step"] for line in lines if line["event"] == "structured"] == [first]
    assert (tmp_path / "weights" / "transformer").is_dir(), lines[-1]


def test_monarch_attention_in_one_of_several_steps(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    whole = objective.Objective.__call__

    def watched(self: objective.Objective, bank: Any, inputs: Any, **more: Any) -> Any:
        total, measured = whole(self, bank, inputs, **more)
        seen.append((inputs.halved, "disagreement" in measured, len(inputs.rows), len(inputs.sigmas.unique())))
        return total, measured

    monkeypatch.setattr(objective.Objective, "__call__", watched)
    command = [*DIT, "--vae", str(trained / "vae"), "--text", str(trained), "--out", str(tmp_path), "--samples", "0"]
    flags = ["--structured", "0.25", "--structured-every", "3", "--batch", "4", "--small-until", "0"]
    main([*command, *flags, "--profile-steps", "5", "--max-steps", "8"])
    dense, structured = (False, False, 4, 4), (True, True, 4, 2)
    assert seen == [dense, dense, dense, structured, dense, dense, structured, dense], "from step 2, every third"
    lines = [json.loads(line) for line in (tmp_path / "dit_log.jsonl").read_text().splitlines()]
    assert [line["disagreement"] > 0 for line in lines if line["event"] == "step"] == [True]


@pytest.mark.parametrize("count", ["0", "-1", "two"])
def test_what_is_no_count_of_steps_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, count: str) -> None:
    with pytest.raises(SystemExit):
        main([*DIT, "--vae", "v", "--text", "t", "--out", str(tmp_path), f"--structured-every={count}"])
    assert f"--structured-every: got {count}, valid are whole numbers from 1\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("small_until", "structured", "changes"), [("0.5", "0.5", 1), ("0", "0.5", 1), ("0.25", "0.5", 2), ("0.5", "0", 1)]
)
def test_what_begins_in_the_middle_does_not_move_the_schedule(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_until: str, structured: str, changes: int
) -> None:
    """Larger clips and Monarch attention that begin in one step are set up together, in time that does not count."""
    excluded: list[float] = []
    monkeypatch.setattr(Schedule, "exclude", lambda self, seconds: excluded.append(seconds))
    command = [*DIT, "--vae", str(trained / "vae"), "--text", str(trained), "--out", str(tmp_path), "--samples", "0"]
    main([*command, "--clips", "5x32", "--batch", "4", "--small-until", small_until, "--structured", structured])
    assert len(excluded) == changes
    report = json.loads((tmp_path / "dit_report.json").read_text())
    assert report["structured"]
    assert math.isfinite(report["loss"])


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--structured"], "--batch: got 2; with --structured, valid are multiples of 4"),
        (["--structured-every", "2"], "--structured-every: got 2; valid beside --structured"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], sentence: str
) -> None:
    command = [*DIT, "--vae", str(trained / "vae"), "--text", str(trained), "--out", str(tmp_path)]
    assert refusal(capsys, [*command, *flags]) == f"error: {sentence}"


@pytest.mark.parametrize(
    ("flag", "valid"), [("--structured", "from 0 up to below 1"), ("--small-until", "from 0 to 1")]
)
@pytest.mark.parametrize("share", ["nan", "1.5", "-0.1"])
def test_what_is_no_share_of_the_training_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, valid: str, share: str
) -> None:
    with pytest.raises(SystemExit):
        main([*DIT, "--vae", str(tmp_path), "--text", str(tmp_path), "--out", str(tmp_path), f"{flag}={share}"])
    assert f"{flag}: got {share}, valid are shares of the training {valid}\n" in capsys.readouterr().err


@pytest.mark.parametrize("share", ["1", "1.0"])
def test_a_start_of_monarch_attention_that_would_never_come_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], share: str
) -> None:
    with pytest.raises(SystemExit):
        main([*DIT, "--vae", str(tmp_path), "--text", str(tmp_path), "--out", str(tmp_path), "--structured", share])
    expected = f"--structured: got {share}, valid are shares of the training from 0 up to below 1\n"
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "flag", "given", "sentence"),
    [
        (VAE, "--phases", "2:1", "got '2:1', valid are rising ends up to 1 and frame counts 4 n + 1"),
        (VAE, "--phases", "x", "got 'x', valid are rising ends up to 1 and frame counts 4 n + 1"),
        (VAE, "--polish", "2", "got 2, valid are shares of the training from 0 to 1"),
        (DIT, "--clips", "48x96", "got '48x96', valid are different FRAMESxSIZE or FRAMESxSIZE:SHARE with commas"),
    ],
)
def test_what_a_training_cannot_read_is_refused_with_what_is_valid(
    capsys: pytest.CaptureFixture[str], command: list[str], flag: str, given: str, sentence: str
) -> None:
    with pytest.raises(SystemExit):
        main([*command, flag, given])
    assert f"error: argument {flag}: {sentence}" in capsys.readouterr().err


def test_what_training_writes(trained: Path) -> None:
    report = json.loads((trained / "vae_report.json").read_text())
    assert report["steps"] == 4
    config = json.loads((trained / "vae" / "config.json").read_text())
    assert config["latents_mean"] == report["latents_mean"]
    assert (config["scale_factor_spatial"], config["scale_factor_temporal"]) == (4, 4)
    assert (trained / "vae_sheet.png").is_file()
    assert (trained / "dit_sheet.png").is_file()
    events = [json.loads(line)["event"] for line in (trained / "dit_log.jsonl").read_text().splitlines()]
    assert events[-2:] == ["exported", "samples"]
    assert events.count("bank_full") == 2, "one for each size"
    assert (trained / "weights" / "model_index.json").is_file()


def test_scoring_and_the_model_card(trained: Path) -> None:
    used: list[str] = []

    def swap(pipeline: object, preset: str) -> object:
        used.append(preset)
        return score.swap_attention(pipeline, "dense")

    settings = score.Settings(prompts=2, steps=1, batch=2, size=32, num_frames=5)
    result = score.score(
        trained / "weights", settings, ["dense", "other"], device=torch.device("cpu"), reader_clips=2, vae_clips=1,
        swap=swap,  # type: ignore[arg-type]
    )  # fmt: skip
    assert used == ["dense", "other"]
    assert result["presets"]["other"]["against_first"]["latent_error_worst"] == 0
    assert result["presets"]["other"]["against_first"]["ssim_worst"] == pytest.approx(1)
    score.show(result)
    (trained / "score.json").write_text(json.dumps(result))
    longer = {**result, "settings": {**result["settings"], "num_frames": 9}}
    (trained / "score-9.json").write_text(json.dumps(longer))
    scores = [part for name in ("score-9.json", "score.json") for part in ("--score", str(trained / name))]
    write_card(["--reports", str(trained), *scores, "--weights", str(trained / "weights")])
    card = (trained / "weights" / "MODEL_CARD.md").read_text()
    assert f"{result['vae']['psnr']:.2f} dB PSNR" in card
    assert "| text encoder | 2 | 32 captions |" in card
    assert "49 frames of 96 x 96" not in card.replace("grid of 49 frames of 96 x 96", "")
    assert card.index("### 5 frames of 32 x 32") < card.index("### 9 frames of 32 x 32")


@pytest.mark.parametrize(
    ("command", "flags", "sentence"),
    [
        (score.main, ["--preset", "dense", "--preset", "fats"], "error: there is no preset 'fats'"),
        (score.main, ["--tuned", "nowhere.safetensors"], "error: "),
        (main, [*TEXT[:-2], "--device", "tpu", "--out", "out"], "error: "),
    ],
    ids=["an unknown preset", "an adapter that is not there", "an unknown device"],
)
def test_what_cannot_be_done_is_said_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: Any, flags: list[str],
    sentence: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(score, "check_reader", Mock(side_effect=AssertionError("work")))
    with pytest.raises(SystemExit) as stop:
        command(flags)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(sentence)
    assert said.count("\n") == 1


def test_the_card_of_a_model_for_several_lengths(trained: Path) -> None:
    settings = score.Settings(prompts=6, steps=1, batch=6, size=32, num_frames=97)
    result = score.score(trained / "weights", settings, device=torch.device("cpu"), reader_clips=2, vae_clips=1)
    entry = result["presets"]["dense"]
    assert entry["several_motions"] > 0
    assert set(entry["several"]) == {"colour", "background", "motion", "shape"}
    score.show(result)
    vae, text, dit = (json.loads((trained / f"{part}_report.json").read_text()) for part in ("vae", "text", "dit"))
    dit = {**dit, "mixed": {"17x32": 0.2, "49x32": 0.4, "97x32": 0.2, "193x48": 0.2}, "before": dit}
    short = _score_of_nothing()
    result["settings"] |= {"sampler": "dpm++sde", "guidance": 2.5}
    card = model_card(vae, dit, [short, result], 1, {**text, "captions": 7, "before": text})
    assert "Run it with 1 steps, guidance 4 and" in card
    assert "clips of 97 frames and more with 1 steps, guidance 2.5, sampler `dpm++sde`." in card
    assert "shapes: 17 to 193 frames of 32 x 32 and 48 x 48 pixels" in card
    assert "were trained at 97 and 193. There" in card
    assert "--clips 17x32:0.2,49x32:0.4,97x32:0.2,193x48:0.2 --out DIR" in card
    assert "### 49 frames of 32 x 32\n" in card
    assert "### 97 frames of 32 x 32\n" in card
    assert f"; {entry['several_motions']} with several motions" in card
    assert "| its clips of several motions |" in card
    rows = [line.split(" | ")[0] for line in card.splitlines() if line.startswith(("| text", "| transformer"))]
    assert rows[2:] == ["| text encoder", "| transformer", "| text encoder, continued", "| transformer, continued"]


def test_an_adapter_has_a_row_of_its_own(trained: Path, tmp_path: Path) -> None:
    made_for = {"size": "32x32", "num_frames": 5, "steps": 1, "training": {"device": "NVIDIA H200", "seconds": 1.0}}
    path = write(trained / "weights", tmp_path / "mine.safetensors", load_preset("paper"), **made_for)
    settings = score.Settings(prompts=1, steps=1, batch=1, size=32, num_frames=5)
    result = score.score(
        trained / "weights", settings, ["dense", "paper", read(path)], device=torch.device("cpu"), reader_clips=1,
        vae_clips=1,
    )  # fmt: skip
    assert list(result["presets"]) == ["dense", "paper", "paper, tuned"]
    errors = [result["presets"][name]["against_first"]["latent_error_mean"] for name in ("paper", "paper, tuned")]
    assert errors[0] != errors[1]
    vae, dit = (json.loads((trained / f"{name}_report.json").read_text()) for name in ("vae", "dit"))
    card = model_card(vae, dit, [result], 1, adapters=[read(path).adapter])
    assert "| preset `paper` with its adapter |" in card
    assert "| `paper` | 1 | 3 | 5 | NVIDIA H200, 1 s | 2 | 0.400 | 0.250 |" in card


def test_the_text_encoder_learns_to_read(tmp_path: Path) -> None:
    main([*TEXT, "--out", str(tmp_path), "--steps", "400", "--batch", "32", "--lr", "0.02"])
    right = json.loads((tmp_path / "text_report.json").read_text())["read_right"]
    # One word each; motions, which take several, come later.
    assert right["shape"] > 2 / 6, right
    assert right["colour"] > 2 / 8, right
    main([*TEXT, "--out", str(tmp_path / "on"), "--init", str(tmp_path), "--steps", "1"])


def test_facts_name_everything_a_clip_shows() -> None:
    known = set(all_facts())
    for spec in (sample_spec(split, 0, i) for split in ("train", "heldout") for i in range(200)):
        found = facts(spec)
        assert found <= known
        assert ("background", spec.background) in found
        for item in spec.objects:
            assert ("colour", item.colour, "shape", item.shape) in found
            assert all(("shape", item.shape, "motion", motion) in found for motion in item.motions)


def test_facts_say_which_motion_comes_when() -> None:
    known, names = set(all_facts()), {2: ("first", "last"), 3: ("first", "middle", "last")}
    for spec in (sample_spec("train", 0, i, 193) for i in range(100)):
        found, motions = facts(spec), spec.objects[0].motions
        assert found <= known
        if len(motions) > 1:
            wanted = {
                ("turn", name, "motion", motion) for name, motion in zip(names[spec.motions], motions, strict=True)
            }
            assert {fact for fact in found if fact[0] == "turn"} == wanted
        else:
            assert not {fact for fact in found if fact[0] == "turn"}


def test_a_training_that_goes_on_says_what_it_went_on_from(trained: Path, tmp_path: Path) -> None:
    weights = trained / "weights"
    (weights / "training").mkdir(exist_ok=True)
    (weights / "training" / "dit_report.json").write_text((trained / "dit_report.json").read_text())
    parts = ["--vae", str(trained / "vae"), "--text", str(weights)]
    main([*DIT, *parts, "--init", str(weights), "--samples", "0", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "dit_report.json").read_text())
    assert report["before"] == json.loads((trained / "dit_report.json").read_text())
    card = model_card(
        json.loads((trained / "vae_report.json").read_text()), report, [_score_of_nothing()], vae_parameters=1
    )  # fmt: skip
    assert "| transformer | 4 | 20 (" in card
    assert "| transformer, continued | 4 | 20 (" in card


def _score_of_nothing() -> dict[str, Any]:
    shares = dict.fromkeys(("colour", "background", "motion", "shape"), 0.0)
    vae = dict.fromkeys(("psnr", "psnr_worst_clip", "psnr_first", "psnr_middle", "psnr_last"), 0.0)
    return {
        "device": "CPU",
        "settings": {"size": 32, "num_frames": 49, "guidance": 4.0, "steps": 1},
        "reader": {"clips": 0, **shares},
        "reader_through_vae": {"clips": 0, **shares},
        "vae": {"clips": 0, **vae},
        "presets": {"dense": {"prompts": 0, "pairs": 0, **shares, "single": shares, "pair": shares}},
    }


def test_the_schedule_spans_runs() -> None:
    clock = Schedule(run_seconds=1e9, total_seconds=200.0, reserve=0.0, before=100.0)
    assert 0.5 <= clock.position(0) <= 1.0
    assert learning_rate(1.0, 0.25, 1000) == 1.0
    assert learning_rate(1.0, 0.75, 1000) == pytest.approx(0.505)
    assert learning_rate(1.0, 1.0, 1000) == pytest.approx(0.01)
    assert learning_rate(1.0, 0.0, 0) == pytest.approx(0.01)


def test_a_training_in_two_runs_comes_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs of 100 s, each with 20 s of set-up and 10 s kept for its end: 140 s of training, and no more."""
    now = [0.0]
    monkeypatch.setattr(loop, "_PROCESS_START", 0.0)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    first, second = (Schedule(run_seconds=100.0, total_seconds=200.0, reserve=10.0) for _ in range(2))
    now[0] = 20.0
    first.start()
    now[0] = 50.0
    assert first.state() == {"elapsed": 30.0, "aside": 20.0}, "of a run that may be killed before its end"
    now[0] = 90.0
    assert first.over(0)
    assert first.state() == {"elapsed": 70.0, "aside": 30.0}
    second.resume(first.state())
    now[0] = 20.0
    second.start()
    assert second.position(0) == 70 / 140
    now[0] = 89.0
    assert not second.over(0)
    now[0] = 90.0
    assert second.position(0) == 1.0
    earlier = Schedule(run_seconds=100.0, total_seconds=200.0, reserve=10.0)
    earlier.resume({"elapsed": 70.0})
    assert (earlier.before, earlier.aside) == (70.0, 0.0)


def test_noise_levels_lean_towards_noise() -> None:
    for step in (0, 1):
        sigma = sigmas_for(step, 4000, torch.Generator().manual_seed(0))
        assert 0 <= sigma.min() < sigma.max() <= 1
        assert 0.75 < sigma.median() < 0.92


@pytest.mark.parametrize("text", ["1:0.5", "2:0.5,49:1", "1:0.9,49:0.5,5:1"])
def test_phases_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--phases"):
        parse_phases(text)
