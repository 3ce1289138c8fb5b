"""Small inputs that once showed a fault, each through the whole command: one sentence and the right exit code."""

from __future__ import annotations

import shutil
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import TINY, latents_of
from typer.testing import CliRunner, Result

from vmonarch_cli.cli.app import app
from vmonarch_cli.errors import InputError, VmonarchError
from vmonarch_cli.media.pictures import load_picture
from vmonarch_cli.pipeline.load import load_pipeline
from vmonarch_cli.plan.setup import Setup

INPUTS = Path(__file__).parent / "inputs"
PRESETS = {
    "ansi.toml": "field 'name' takes",
    "bighex.toml": "more than 100 digits",
    "bigint.toml": "more than 100 digits",
    "deep.toml": "is nested too deeply",
    "markup.toml": "field 'name' takes",
}
PROMPTS_FILES = {
    "img_tilde.jsonl": "line 1: ",
    "nul_preset.jsonl": "line 1: preset holds a NUL character",
    "seeds.yaml": "line 2: seed takes a whole number, got 1:30",
    "sur_neg.jsonl": "line 1: negative_prompt is not valid UTF-8 text",
    "sur_preset.jsonl": "line 1: preset is not valid UTF-8 text",
    "yaml_U.yaml": "line 2: is not valid YAML",
    "yaml_U110000.yaml": "line 3: is not valid YAML",
    "yaml_hex_seed.yaml": "line 1: seed takes a whole number",
}
RECORDS = sorted(path.name for path in INPUTS.glob("rec_*.json"))
SAME_LORAS = ["bare_diffusers", "diffsynth", "native"]
PLAIN_LORA = INPUTS / "lora" / "diffusers.safetensors"
LORAS_WITH_MORE = ["native_diff_m", "native_norm_diff", "dora_scale_diffusers"]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def assert_one_sentence(result: Result, *parts: str) -> None:
    """Exit code 2 and one line on stderr, which has each of the parts."""
    assert result.exit_code == 2, result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("error: ")
    assert all(part in result.stderr for part in parts), result.stderr
    assert "unexpected" not in result.stderr
    assert "Traceback" not in result.stderr


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A clip of nine frames, beside which the records are copied under its name."""
    path = tmp_path / "clips" / "blue-s0.mp4"
    path.parent.mkdir()
    imageio.imwrite(path, np.zeros((9, 48, 48, 3), dtype=np.uint8), fps=16, codec="libx264", macro_block_size=1)
    return path


@pytest.mark.parametrize(("name", "part"), PRESETS.items(), ids=PRESETS)
def test_a_preset(name: str, part: str) -> None:
    assert_one_sentence(call("presets", "check", INPUTS / name), name, part)
    assert_one_sentence(call("plan", "--prompt", "a red star", "--preset", INPUTS / name), name, part)


@pytest.mark.parametrize(("name", "part"), PROMPTS_FILES.items(), ids=PROMPTS_FILES)
def test_a_prompts_file(name: str, part: str, tmp_path: Path) -> None:
    result = call("plan", "--prompts-file", INPUTS / name, "-o", f"{tmp_path}/out/")
    assert_one_sentence(result, name, part)
    assert not (tmp_path / "out").exists()


def test_a_seed_with_a_zero_in_front_is_that_seed(tmp_path: Path) -> None:
    lines = (INPUTS / "seeds.yaml").read_text(encoding="utf-8").splitlines(keepends=True)
    prompts = tmp_path / "seeds.yaml"
    prompts.write_text("".join(line for line in lines if "1:30" not in line), encoding="utf-8")
    result = call("plan", "--prompts-file", prompts, "-o", f"{tmp_path}/out/", "--quiet")
    assert result.exit_code == 0, result.stderr
    assert "-s42" in result.stdout


@pytest.mark.parametrize("name", RECORDS)
def test_a_record(name: str, clip: Path) -> None:
    record = clip.with_suffix(".json")
    shutil.copyfile(INPUTS / name, record)
    other = clip.with_name("other.mp4")
    shutil.copyfile(clip, other)
    gallery = call("gallery", clip.parent)
    assert gallery.exit_code == 0, gallery.stderr
    assert record.name in gallery.stderr + gallery.stdout
    assert_one_sentence(call("compare", clip, other), record.name)
    assert_one_sentence(call("rerun", record), record.name)


def test_a_postscript_file_is_no_picture() -> None:
    with pytest.raises(InputError, match="cannot be read: give a PNG"):
        load_picture(INPUTS / "eps.png", "image eps.png")


def test_grey_levels_stay() -> None:
    levels = np.asarray(load_picture(INPUTS / "images" / "gray16.png", "image"))[..., 0]
    assert len(np.unique(levels)) == levels.shape[1]  # a ramp over the columns


def test_what_is_hidden_under_a_transparent_part_stays_hidden() -> None:
    pixels = np.asarray(load_picture(INPUTS / "images" / "transparent.png", "image")).reshape(-1, 3).astype(int)
    magenta = (pixels[:, 0] > 150) & (pixels[:, 2] > 150) & (pixels[:, 1] < 100)
    assert not magenta.any()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("models") / "wan"
    TINY["wan"].build().save_pretrained(target, safe_serialization=True)
    return target


def latents_with(folder: Path, lora: Path, scale: float = 1) -> torch.Tensor:
    setup = Setup(offload="none", loras=(f"{lora}:{scale}",))
    pipeline = load_pipeline(str(folder), device=torch.device("cpu"), dtype=torch.float32, setup=setup)
    return latents_of(pipeline, TINY["wan"])


@pytest.fixture(scope="module")
def expected(folder: Path) -> torch.Tensor:
    return latents_with(folder, PLAIN_LORA)


@pytest.mark.parametrize("name", SAME_LORAS)
def test_a_lora_in_another_format_is_the_same(name: str, folder: Path, expected: torch.Tensor) -> None:
    found = latents_with(folder, INPUTS / "lora" / f"{name}.safetensors")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_alpha_over_rank_is_applied(folder: Path) -> None:
    """The file's alpha is 2 and its rank 4: it is the plain file at half its strength."""
    found = latents_with(folder, INPUTS / "lora" / "diffusers_alpha_keys.safetensors")
    expected = latents_with(folder, PLAIN_LORA, scale=0.5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_kohya_file_of_some_layers_only(folder: Path, tmp_path: Path) -> None:
    part = tmp_path / "self-attention.safetensors"
    plain = load_file(PLAIN_LORA)
    save_file({key: tensor for key, tensor in plain.items() if ".attn1." in key}, part)
    found = latents_with(folder, INPUTS / "lora" / "kohya_selfattn_only.safetensors")
    torch.testing.assert_close(found, latents_with(folder, part), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LORAS_WITH_MORE)
def test_what_a_lora_has_beside_its_pairs_is_not_lost(name: str, folder: Path, expected: torch.Tensor) -> None:
    found = latents_with(folder, INPUTS / "lora" / f"{name}.safetensors")
    assert (found - expected).abs().max() > 0.01


def test_a_lora_of_a_second_transformer_is_refused_where_there_is_one(folder: Path) -> None:
    with pytest.raises(VmonarchError, match=r"transformer2_prefix.* is for the second of two transformers"):
        latents_with(folder, INPUTS / "lora" / "transformer2_prefix.safetensors")
