"""`--vae-dtype`: what the frames are decoded in, what is chosen where nobody says, and that the record tells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batches import request
from command import call

from vmonarch_cli.batch.keys import identity_of
from vmonarch_cli.clip import make
from vmonarch_cli.media.paths import latents_path
from vmonarch_cli.media.read import read_clip
from vmonarch_cli.models.cogvideox import COGVIDEOX_2B
from vmonarch_cli.models.demo import DEMO
from vmonarch_cli.models.wan import WAN21_1_3B
from vmonarch_cli.pipeline.device import pick_vae_dtype
from vmonarch_cli.plan.resolve import resolve

pytestmark = pytest.mark.usefixtures("one_thread")
BF16 = torch.bfloat16


def generate(model: Path, path: Path, *more: str) -> dict[str, Any]:
    shape = ["--size", "48x32", "--num-frames", "17", "--steps", "1", "--guidance-scale", "1", "--dense-every", "0"]
    call("generate", "-m", str(model), "-p", "red", "--device", "cpu", *shape, "-o", str(path), "-q", *more)
    found: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
    return found


@pytest.fixture(scope="module")
def made(tiny_wan_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with wide.png and narrow.png: one clip, decoded in float32 and in bfloat16."""
    folder = tmp_path_factory.mktemp("made")
    assert generate(tiny_wan_folder, folder / "wide.png")["vae_dtype"] == "float32"
    record = generate(tiny_wan_folder, folder / "narrow.png", "--vae-dtype", "bf16")
    assert record["vae_dtype"] == "bfloat16"
    assert record["settings"]["vae_dtype"] == {"value": "bfloat16", "origin": "flag"}
    return folder


def test_a_narrow_decoder_makes_nearly_the_same_frames(made: Path) -> None:
    wide, narrow = (read_clip(made / name).astype(float) for name in ("wide.png", "narrow.png"))
    error = np.square(wide - narrow).mean()
    assert error > 0
    assert 10 * np.log10(255**2 / error) > 20, "of random weights"


@pytest.mark.parametrize("name", ["wide", "narrow"])
def test_a_rerun_decodes_as_the_record_did_unless_told_otherwise(made: Path, tmp_path: Path, name: str) -> None:
    other = {"wide": "bfloat16", "narrow": "float32"}[name]
    call("rerun", str(made / f"{name}.json"), "-o", str(tmp_path / "same.png"))
    result = call("rerun", str(made / f"{name}.json"), "-o", str(tmp_path / "x.png"), "--vae-dtype", other, code=1)
    assert f"and is {other}" in result.stdout + result.stderr
    expected = made / f"{'narrow' if other == 'bfloat16' else 'wide'}.png"
    assert np.array_equal(read_clip(tmp_path / "x.png"), read_clip(expected))


def test_a_record_of_an_earlier_version_is_repeated_in_float32(made: Path, tmp_path: Path) -> None:
    record = json.loads((made / "wide.json").read_text())
    del record["vae_dtype"], record["settings"]["vae_dtype"], record["setup"]["vae_dtype"]
    (tmp_path / "old.json").write_text(json.dumps(record))
    from vmonarch_cli.clip.record import plan_again

    assert plan_again(tmp_path / "old.json", str(tmp_path / "x.png")).setup.vae_dtype == "float32"


def test_saved_latents_are_decoded_in_what_is_asked_for(
    tiny_wan_folder: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("no")

    with monkeypatch.context() as patch:
        patch.setattr(make, "decode", fail)
        with pytest.raises(AssertionError):
            generate(tiny_wan_folder, tmp_path / "x.png")
    latents = latents_path(tmp_path / "x.png")
    call("decode", str(latents), "--device", "cpu", "--vae-dtype", "bf16", "--keep", "-q")
    assert np.array_equal(read_clip(tmp_path / "x.png"), read_clip(made / "narrow.png"))
    assert json.loads((tmp_path / "x.json").read_text())["vae_dtype"] == "bfloat16"
    call("decode", str(latents), "--device", "cpu", "-q", "--overwrite")
    assert np.array_equal(read_clip(tmp_path / "x.png"), read_clip(made / "wide.png"))


@pytest.mark.parametrize("command", ["generate -p red", "compare -p red", "decode x", "rerun x.mp4"])
def test_other_values_are_refused(made: Path, command: str) -> None:
    command = command.replace(" x.mp4", f" {made / 'wide.json'}").replace(" x", f" {made}")
    if command.startswith("decode"):
        (made / "a.latents.safetensors").touch()
    result = call(*command.split(), "--vae-dtype", "double", code=2)
    assert result.stderr.splitlines()[-1] == (
        "error: --vae-dtype takes auto, float32 (fp32), bfloat16 (bf16) or float16 (fp16), got 'double'"
    )


@pytest.mark.parametrize(
    ("model", "dtype", "asked", "chosen"),
    [
        (WAN21_1_3B, BF16, "auto", torch.float32),  # its pipeline needs it
        (WAN21_1_3B, BF16, "bfloat16", BF16),
        (DEMO, BF16, "auto", BF16),
        (DEMO, BF16, "float32", torch.float32),
        (COGVIDEOX_2B, BF16, "auto", BF16),
        (COGVIDEOX_2B, torch.float32, "auto", torch.float32),
        (COGVIDEOX_2B, BF16, "float32", torch.float32),
    ],
)
def test_what_is_chosen(
    tiny_wan_folder: Path, tmp_path: Path, model: Any, dtype: torch.dtype, asked: str, chosen: torch.dtype
) -> None:
    plan = resolve(request(tiny_wan_folder, tmp_path / "x.mp4", prompt="red", vae_dtype=asked))
    assert pick_vae_dtype(plan.model_copy(update={"model": model}), dtype) == chosen


def test_the_name_of_a_clip_in_a_batch_is_that_of_earlier_versions_where_nobody_chose(
    tiny_wan_folder: Path, tmp_path: Path
) -> None:
    plans = [
        resolve(request(tiny_wan_folder, tmp_path / "x.mp4", prompt="red", **more))
        for more in ({}, {"vae_dtype": "auto"}, {"vae_dtype": "bfloat16"})
    ]
    keys = [identity_of(plan, None) for plan in plans]
    assert keys[0] == keys[1] != keys[2]
    assert "vae_dtype" not in plans[0].setup.model_dump(exclude_defaults=True)
