"""Whole runs of other families than Wan through the command line's own functions, and what a user is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_families import TINY, image

from vmonarch_cli.clip import make as run
from vmonarch_cli.errors import InputError, ModelError
from vmonarch_cli.families.ltx import compressed
from vmonarch_cli.models.hub import explain
from vmonarch_cli.models.registry import find_model
from vmonarch_cli.pipeline.preflight import check_machine
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve

TEXT = ["hunyuan-video", "hunyuan-video-1.5", "ltx-video", "allegro"]
# Those whose own pipeline takes an image, and those that change into another for one.
IMAGE = ["wan-i2v", "wan-ti2v", "hunyuan-video-i2v", "ltx-2", "motif-video"]
FAMILIES = [*TEXT, *IMAGE, "hunyuan-video-1.5-i2v", "cogvideox-5b-i2v", "kandinsky-5-i2v"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name in FAMILIES:
        found[name] = tmp_path_factory.mktemp("models") / name
        TINY[name].build().save_pretrained(found[name], safe_serialization=True)
    return found


def request(folder: Path, name: str, output: Path, **more: Any) -> GenerateRequest:
    tiny = TINY[name]
    shape = {"height": tiny.height, "width": tiny.width, "num_frames": tiny.num_frames}
    fixed = {"steps": 2, "device": "cpu", "preset": "paper", "dense_every": 1, "output": str(output)}
    return GenerateRequest(model=str(folder), prompt="a red circle", **{**shape, **fixed, **more})


@pytest.mark.parametrize("name", TEXT)
def test_a_clip_of_another_family(folders: dict[str, Path], name: str, tmp_path: Path) -> None:
    tiny = TINY[name]
    plan = resolve(request(folders[name], name, tmp_path / "clip.gif"))
    (result,) = run.generate(plan, check_machine(plan))
    record = json.loads(result.record_path.read_text())
    assert result.path.stat().st_size > 0
    frames = record["frames"]
    assert (frames["count"], frames["height"], frames["width"]) == (tiny.num_frames, tiny.height, tiny.width)
    assert record["coverage"]["dense"] == {}
    assert record["coverage"]["structured"] == tiny.layers * tiny.forwards * 2
    assert tuple(record["grid"]) == plan.grid == tiny.grid
    assert record["setup"]["offload"] == "auto"
    assert record["skipped_calls"] == 0
    assert record["timing"]["steps"][0]["error"] is not None, "dense attention was sampled on joint tensors, too"


@pytest.mark.parametrize("name", IMAGE)
def test_a_first_frame_steers_the_clip(folders: dict[str, Path], name: str, tmp_path: Path) -> None:
    first, other = tmp_path / "first.png", tmp_path / "other.png"
    image().save(first)
    image().rotate(180).point(lambda value: 255 - value).save(other)
    made = []
    for index, path in enumerate((first, other)):
        plan = resolve(request(folders[name], name, tmp_path / f"{index}.gif", image=str(path)))
        maker = run.ClipMaker(plan, check_machine(plan))
        denoised = maker.denoise(plan, 0)
        assert denoised.grid == plan.grid
        assert denoised.coverage.dense == {}
        made.append(denoised.latents)
    assert plan.settings()["image"] == {"value": str(other), "origin": "flag"}
    assert not torch.allclose(made[0], made[1], rtol=1e-3, atol=1e-3)


def test_a_clip_from_an_image_has_the_size_asked_for(folders: dict[str, Path], tmp_path: Path) -> None:
    """HunyuanVideo-1.5's own pipeline would choose 16x32 for an image of these proportions."""
    first = tmp_path / "first.png"
    image().save(first)
    name = "hunyuan-video-1.5-i2v"
    plan = resolve(request(folders[name], name, tmp_path / "x.gif", image=str(first), height=32, width=48))
    (result,) = run.generate(plan, check_machine(plan))
    assert (result.record["frames"]["height"], result.record["frames"]["width"]) == (32, 48)
    assert result.grid == plan.grid == (5, 8, 12)


def test_what_an_image_model_cannot_make_is_said(folders: dict[str, Path], tmp_path: Path) -> None:
    def refused(name: str, sentence: str, **more: Any) -> None:
        with pytest.raises(InputError, match=sentence):
            resolve(request(folders[name], name, tmp_path / "x.gif", image=str(first), **more))

    first = tmp_path / "first.png"
    image().save(first)
    refused("cogvideox-5b-i2v", r"its positions are learned, and the only valid size is 48x32", height=48, width=48)
    refused(
        "kandinsky-5-i2v", r"must be a multiple of 4 plus one, 17 at least, the .* counts are 17 and 21", num_frames=9
    )

    config = json.loads((folders["hunyuan-video-i2v"] / "transformer" / "config.json").read_text())
    older = tmp_path / "older"
    shutil.copytree(folders["hunyuan-video-i2v"], older)
    config |= {"image_condition_type": "latent_concat", "in_channels": 9}
    (older / "transformer" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"this HunyuanVideo-I2V has 33 input channels, .*: use hunyuanvideo-comm"):
        find_model(str(older))

    bare = tmp_path / "bare"
    shutil.copytree(folders["motif-video"], bare)
    index = json.loads((bare / "model_index.json").read_text())
    (bare / "model_index.json").write_text(json.dumps({**index, "feature_extractor": [None, None]}))
    with pytest.raises(InputError, match=r"bare makes clips from text alone: leave out --image"):
        resolve(request(bare, "motif-video", tmp_path / "x.gif", image=str(first)))


def test_an_image_for_ltx_2_is_compressed_as_video_is() -> None:
    coarse, fine = (np.asarray(compressed(image(), quality), dtype=float) for quality in (40, 1))
    exact = np.asarray(image(), dtype=float)
    assert coarse.shape == exact.shape
    assert np.abs(fine - exact).mean() < np.abs(coarse - exact).mean() < 10


def test_a_pipeline_of_an_unknown_family_says_what_was_found(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "unknown"
    shutil.copytree(folders["ltx-video"], folder)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": "LattePipeline", "transformer": ["diffusers", "LatteTransformer3DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"a LattePipeline with a LatteTransformer3DModel, and the layout of its tok"):
        find_model(str(folder))


def test_bad_flags_are_found_before_anything_loads(folders: dict[str, Path], tmp_path: Path) -> None:
    for more, expected in [
        ({"image": "/nowhere.png"}, r"hunyuan-video makes clips from text alone"),
        ({"offload": "disk"}, r"--offload takes auto, none, model, group or sequential, got 'disk'"),
        ({"quantize": "fp4"}, r"--quantize takes fp8, int8, fp8-storage or int8-storage, got 'fp4'"),
        ({"cache": "teacache"}, r"--cache takes first-block, pab or taylorseer, got 'teacache'"),
        ({"loras": ("missing.safetensors:1",)}, r"there is no LoRA missing\.safetensors"),
    ]:
        with pytest.raises(InputError, match=expected) as caught:
            resolve(request(folders["hunyuan-video"], "hunyuan-video", tmp_path / "x.gif", **more))
        assert caught.value.exit_code == 2


def test_a_repository_that_cannot_be_reached_is_one_sentence() -> None:
    with pytest.raises(ModelError, match=r"someone/some-model") as caught:
        find_model("someone/some-model")
    assert "\n" not in caught.value.message
    assert caught.value.exit_code == 2


def test_failures_of_the_hub_name_the_next_step() -> None:
    from huggingface_hub import errors

    def sentence(error: Exception) -> str:
        return explain(error, "a/b", "v9").message

    response: Any = type("Response", (), {"headers": {}, "request": None, "status_code": 403})()
    assert "a/b is gated: ask for access at https://huggingface.co/a/b and set HF_TOKEN" in sentence(
        errors.GatedRepoError("no", response=response)
    )
    assert "a/b has no revision 'v9'" in sentence(errors.RevisionNotFoundError("no", response=response))
    assert "there is no model a/b on the hub, or it is private" in sentence(
        errors.RepositoryNotFoundError("no", response=response)
    )
    assert "HF_HUB_OFFLINE is set" in sentence(errors.OfflineModeIsEnabled("no"))
    assert "the disk became full while a/b was downloaded" in sentence(OSError(28, "No space left on device"))
    assert "the hub cannot be reached" in sentence(ConnectionError("Failed to connect"))
