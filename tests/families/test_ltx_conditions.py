"""LTX-Video and LTX-2 from a video or keyframes: the clip's own tokens are structured, those of keyframes exact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loading import CLOSE, EXACT, PAPER, load
from tiny_families import TINY, image, latents_of, ltx2, ltx2_condition, ltx_condition, save_video, video
from typer.testing import CliRunner

from vmonarch_cli.attention.joint import Packed
from vmonarch_cli.cli.app import app
from vmonarch_cli.errors import InputError
from vmonarch_cli.families.registry import FAMILIES
from vmonarch_cli.media.read import read_clip
from vmonarch_cli.media.sound import read_sound
from vmonarch_cli.pipeline.swap import swapped
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve
from vmonarch_cli.timing import Coverage

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for build in (ltx_condition, ltx2_condition, ltx2):
        found[build.__name__] = tmp_path_factory.mktemp("models") / build.__name__
        build().save_pretrained(found[build.__name__], safe_serialization=True)
    return found


def generate(folder: Path, output: Path, *more: str) -> dict[str, Any]:
    """The record of a clip of 11 frames."""
    shape = "--size 32x32 --num-frames 11 --fps 24 --steps 2 --device cpu --quiet --preset paper"
    words = ["generate", "-m", str(folder), "-p", "a red circle", *shape.split(), *more, "-o", str(output)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.stderr
    record: dict[str, Any] = json.loads(output.with_suffix(".json").read_text())
    return record


def test_ltx_2_goes_on_from_a_video_with_sound(folders: dict[str, Path], tmp_path: Path) -> None:
    """The folder's class takes none, and another class of the same weights does."""
    pictures = video(12, 32, 32)
    clips = {}
    for name, part in {"whole": pictures, "end": pictures[3:], "start": pictures[:9]}.items():
        film = save_video(tmp_path / f"{name}.gif", part)
        record = generate(folders["ltx2"], tmp_path / f"{name}.mp4", "--video", str(film))
        assert record["coverage"] == {**record["coverage"], "structured": 2 * 3 * 2, "dense": {}}
        clips[name] = read_clip(tmp_path / f"{name}.mp4")
        assert read_sound(tmp_path / f"{name}.mp4") is not None
    assert np.array_equal(clips["whole"], clips["end"])
    assert not np.array_equal(clips["whole"], clips["start"])


def test_a_first_frame_is_compressed_for_ltx_2_of_conditions(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(
        "vmonarch_cli.families.ltx.compressed", lambda picture, quality: seen.append(quality) or picture
    )
    picture = tmp_path / "first.png"
    image(32, 32).save(picture)
    generate(folders["ltx2_condition"], tmp_path / "x.mp4", "--image", str(picture))
    assert seen == [33]


def test_keyframes_beside_the_clip_are_exact(folders: dict[str, Path]) -> None:
    """As a script gives them: before the clip's tokens in LTX-Video, behind them in LTX-2."""
    from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition
    from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition

    first, last = image(32, 32), image(32, 32).rotate(180)
    for name, tiny_name, keyframes in (
        (
            "ltx_condition",
            "ltx-video-condition",
            [LTXVideoCondition(image=first), LTXVideoCondition(image=last, frame_index=16)],
        ),
        (
            "ltx2_condition",
            "ltx-2-continued",
            [LTX2VideoCondition(frames=first, crf=0), LTX2VideoCondition(frames=last, index=-1, crf=0)],
        ),
    ):
        tiny, pipeline = TINY[tiny_name], load(folders[name])
        known = {key: value for key, value in tiny.options.items() if key not in ("image", "video")}

        def made(keyframes: Any = keyframes, known: Any = known, pipeline: Any = pipeline, tiny: Any = tiny) -> Any:
            return pipeline(
                conditions=keyframes,
                prompt="a red circle",
                height=32,
                width=32,
                num_frames=tiny.num_frames,
                num_inference_steps=2,
                generator=torch.Generator("cpu").manual_seed(0),
                output_type="latent",
                **known,
            ).frames

        stock = made()
        with swapped(pipeline, EXACT):
            torch.testing.assert_close(made(), stock, **CLOSE)
        with swapped(pipeline, PAPER) as session:
            structured = made()
        assert session.grid == tiny.grid
        assert session.coverage() == Coverage(structured=tiny.layers * tiny.forwards * 2)
        assert not torch.allclose(structured, stock, **CLOSE)


def test_tokens_in_no_grid_run_dense() -> None:
    find: Any = FAMILIES["LTXVideoTransformer3DModel"].packed
    transformer = ltx_condition().transformer
    grid = torch.stack(torch.meshgrid(*(torch.arange(n).float() for n in (3, 2, 4)), indexing="ij")).flatten(1)

    def found(places: torch.Tensor) -> Packed:
        tokens = torch.zeros(1, places.shape[1], 8)
        packed: Packed = find(transformer, (tokens,), {"video_coords": places[None]})
        return packed

    assert found(grid) == Packed((3, 2, 4))
    keyframe = grid[:, :8] + torch.tensor([[5.0], [0.0], [0.0]])
    assert found(torch.cat([keyframe, grid], dim=1)) == Packed((3, 2, 4), before=8, others=8)
    assert found(grid[:, torch.randperm(24, generator=torch.Generator().manual_seed(0))]) == Packed((1, 1, 1))
    assert found(torch.cat([grid, keyframe], dim=1)[:, :-1]) == Packed((1, 1, 1))


def test_what_it_cannot_do_is_said(folders: dict[str, Path], tmp_path: Path) -> None:
    def request(**more: Any) -> GenerateRequest:
        shape = {"height": 32, "width": 32, "num_frames": 11}
        return GenerateRequest(model=str(folders["ltx2"]), prompt="a red circle", **{**shape, **more})

    short = save_video(tmp_path / "short.gif", video(8, 32, 32))
    with pytest.raises(InputError, match=r"has 8 frames, and a clip goes on from the last 9: give a longer video"):
        resolve(request(video=str(short)))
    film = save_video(tmp_path / "film.gif", video(9, 32, 32))
    with pytest.raises(InputError, match="--strength is for videos that are noised, and an LTX2ConditionPipeline"):
        resolve(request(video=str(film), strength=0.5))
    assert resolve(request(video=str(film))).video == str(film)


def test_the_frames_that_are_given_are_the_first_of_the_clip(folders: dict[str, Path]) -> None:
    """Held as they are: their latents are those of the video, whatever the seed."""
    tiny, pipeline = TINY["ltx-2-continued"], load(folders["ltx2_condition"])
    with swapped(pipeline, PAPER):
        one, other = (latents_of(pipeline, tiny, seed=seed) for seed in (0, 1))
    torch.testing.assert_close(one[:, :, :5], other[:, :, :5], **CLOSE)
    assert not torch.allclose(one[:, :, 5:], other[:, :, 5:], **CLOSE)
