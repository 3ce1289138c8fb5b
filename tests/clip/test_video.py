"""`--video`: what a clip is made from, checked before anything loads, through generate, plan and rerun."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from loading import load
from tiny_families import NEGATIVE, PROMPT, TINY, image, latents_of, save_video, video
from typer.testing import CliRunner, Result

from vmonarch_cli.cli.app import app
from vmonarch_cli.clip.make import ClipMaker
from vmonarch_cli.media.write import write_clip
from vmonarch_cli.models.catalogue import ENTRIES
from vmonarch_cli.pipeline.preflight import check_machine
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = ["--size", "48x32", "--num-frames", "17", "--seed", "3", "--device", "cpu"]
SHAPE += ["--flow-shift", "3", "--guidance-scale", "4"]
TAKERS = "demo, wan2.1-1.3b, wan2.1-14b, wan2.1-vace-1.3b and wan2.1-vace-14b"


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_video(tmp_path_factory.mktemp("films") / "film.gif", video())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("models") / "tiny-wan"
    TINY["wan"].build().save_pretrained(found, safe_serialization=True)
    return found


@pytest.fixture(scope="module")
def vace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "vace"
    TINY["wan-vace"].build().save_pretrained(folder, safe_serialization=True)
    return folder


def invoke(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def generate(folder: Path, output: Path, *more: str) -> Result:
    return invoke("generate", "-m", str(folder), "-p", PROMPT, *SHAPE, *more, "--quiet", "-o", str(output))


def planned(folder: Path, film: Path, **more: Any) -> Plan:
    shape = {"height": 32, "width": 48, "num_frames": 17}
    return resolve(GenerateRequest(model=str(folder), prompt=PROMPT, video=str(film), **{**shape, **more}))


def record_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
    return found


def latents(folder: Path, film: Path, **more: Any) -> torch.Tensor:
    plan = planned(folder, film, steps=2, flow_shift=3.0, guidance_scale=4.0, seed=3, device="cpu", **more)
    return ClipMaker(plan, check_machine(plan)).denoise(plan, 0).latents


def test_a_clip_is_what_diffusers_own_pipeline_makes_of_the_video(folder: Path, film: Path) -> None:
    """--strength 0.5 with two steps is half of a schedule of four, as the pipeline counts it."""
    made = latents(folder, film, strength=0.5, preset="exact", negative_prompt=NEGATIVE)
    stock = load(folder, given_pipeline="WanVideoToVideoPipeline", flow_shift=3.0)
    options: dict[str, Any] = {**TINY["wan-video"].options, "strength": 0.5, "max_sequence_length": 512}
    expected = latents_of(stock, TINY["wan-video"], steps=4, seed=3, **options)
    assert float((made - expected).norm() / expected.norm()) < 0.02, "its timesteps are whole numbers there"


def test_every_step_runs_structured_and_is_counted(folder: Path, film: Path, tmp_path: Path) -> None:
    flags = ("--video", str(film), "--strength", "0.5", "--steps", "3", "--preset", "paper")
    assert generate(folder, tmp_path / "x.gif", *flags).exit_code == 0
    record = record_of(tmp_path / "x.gif")
    assert len(record["schedule"]) == len(record["timing"]["steps"]) == len(record["sigmas"]) == 3
    assert record["coverage"]["structured"] == 2 * 2 * 3
    assert record["settings"]["video"] == {"value": str(film), "origin": "flag"}
    assert record["settings"]["strength"] == {"value": 0.5, "origin": "flag"}
    again = invoke("rerun", str(tmp_path / "x.json"), "--device", "cpu")
    assert again.exit_code == 0, again.stderr
    assert "identical: every pixel" in again.stdout + again.stderr
    assert f"the record reads the video {film}" in " ".join((again.stdout + again.stderr).split())


def test_the_plan_has_the_levels_of_a_part_of_the_schedule(folder: Path, film: Path) -> None:
    whole = planned(folder, film, steps=10, flow_shift=3.0, strength=1.0)
    part = planned(folder, film, steps=5, flow_shift=3.0, strength=0.5)
    assert whole.noise_levels is not None
    assert part.noise_levels is not None
    assert part.noise_levels == whole.noise_levels[5:]
    assert any("--video has next to no effect" in sentence for sentence in whole.warnings)
    assert not any("--video" in sentence for sentence in part.warnings)
    default = planned(folder, film, steps=8, flow_shift=3.0)
    assert (default.strength, default.origins["strength"]) == (0.8, "default")
    assert default.noise_levels == whole.noise_levels[2:]
    own = planned(folder, film, sigmas=(0.7, 0.3))
    assert (own.noise_levels, own.strength) == ((0.7, 0.3), None)


def test_vace_follows_a_video(vace: Path, film: Path, tmp_path: Path) -> None:
    for name, more in (("with", ("--video", str(film))), ("without", ())):
        result = generate(vace, tmp_path / f"{name}.gif", "--steps", "2", *more)
        assert result.exit_code == 0, result.stderr
    shas = {record_of(tmp_path / f"{name}.gif")["frames"]["sha256"] for name in ("with", "without")}
    assert len(shas) == 2
    result = generate(vace, tmp_path / "x.gif", "--video", str(film), "--strength", "0.5")
    assert result.exit_code == 2
    assert "--strength is for videos that are noised, and a WanVACEPipeline follows one: leave it out" in result.stderr


def test_what_cannot_be_made_is_said_before_anything_loads(folder: Path, film: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "x.gif"
    text, broken, short, still = (tmp_path / n for n in ("notes.txt", "broken.mp4", "short.mp4", "first.png"))
    text.write_text("not a video")
    broken.write_bytes(b"\x00\x00\x00\x18ftypmp42" + bytes(4096))
    image().save(still)
    from numpy import zeros

    write_clip(zeros((9, 32, 48, 3), "uint8"), short, 8)
    (tmp_path / "folder.mp4").mkdir()
    strange = tmp_path / "strange.mp4"
    strange.write_bytes(short.read_bytes().replace(b"avc1", b"zzz9").replace(b"avcC", b"zzzC"))
    unreadable = (
        "cannot be read: it is damaged or not what its name says, or has no pictures of a codec that ffmpeg knows"
    )
    given: list[tuple[tuple[str, ...], str]] = [
        (("--video", str(tmp_path / "none.mp4")), f"there is no video {tmp_path / 'none.mp4'}"),
        (("--video", str(text)), f"video {text} cannot be read: valid are files that end in .mp4, .webm, .gif, .webp"),
        (("--video", str(broken)), f"video {broken} {unreadable}"),
        (("--video", str(strange)), f"video {strange} {unreadable}"),
        (("--video", str(tmp_path / "folder.mp4")), f"video {tmp_path / 'folder.mp4'} is a folder, not a file"),
        (
            ("--video", str(short)),
            f"video {short} has 9 frames and the clip 17: choose fewer frames with --num-frames, or a longer video",
        ),
        (("--video", str(film), "--strength", "0"), "--strength takes a number from 0.01 to 1, got 0"),
        (
            ("--strength", "0.5"),
            "--strength is how far a given video is changed, and none was given: add --video FILE",
        ),
        (
            ("--video", str(film), "--strength", "0.5", "--sigmas", "0.5,0.2"),
            "--sigmas and --strength both say at which noise level the clip begins: give one of them",
        ),
    ]
    for flags, sentence in given:
        result = generate(folder, output, *flags)
        assert (result.exit_code, result.stderr) == (2, f"error: {sentence}\n"), flags
    assert not output.parent.exists()


def test_a_model_that_takes_none_names_those_that_do(film: Path, tmp_path: Path) -> None:
    for alias in ("wan2.2-5b", "wan2.2-a14b", "wan2.1-i2v-480p", "mochi-1", "skyreels-v2-t2v"):
        more = ("--image", str(image_file(tmp_path))) if "i2v" in alias else ()
        result = invoke("generate", "-m", alias, "-p", "a cat", "--video", str(film), *more)
        assert result.exit_code == 2
        sentence = f"{alias} takes no video: leave out --video, which is for models that do, as {TAKERS}"
        assert result.stderr == f"error: {sentence}\n"
    assert [entry.alias for entry in ENTRIES if entry.video_pipeline] == TAKERS.replace(" and ", ", ").split(", ")


def image_file(folder: Path) -> Path:
    path = folder / "first.png"
    image().save(path)
    return path


def test_a_folder_of_the_pipeline_needs_a_video(film: Path, tmp_path: Path) -> None:
    folder = tmp_path / "v2v"
    TINY["wan-video"].build().save_pretrained(folder, safe_serialization=True)
    result = generate(folder, tmp_path / "x.gif", "--steps", "2")
    assert (result.exit_code, result.stderr) == (
        2,
        "error: v2v changes a video and none was given: add --video FILE\n",
    )
    assert generate(folder, tmp_path / "x.gif", "--steps", "2", "--video", str(film)).exit_code == 0
