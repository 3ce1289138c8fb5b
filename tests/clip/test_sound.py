"""A clip's sound, from the model's own samples to its file, and through everything that is done with clips."""

from __future__ import annotations

import json
import shutil
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loading import load
from tiny_families import NEGATIVE, PROMPT, TINY
from typer.testing import CliRunner, Result

from vmonarch_cli.cli.app import app
from vmonarch_cli.clip import make
from vmonarch_cli.clip.latents import load_latents
from vmonarch_cli.clip.whole import damage
from vmonarch_cli.errors import InputError, NonFiniteError
from vmonarch_cli.media.read import read_clip
from vmonarch_cli.media.sound import Sound, read_sound

pytestmark = pytest.mark.usefixtures("one_thread")
FPS, FRAMES, RATE = 8, 9, 16000
SHAPE = f"--size 32x32 --num-frames {FRAMES} --fps {FPS} --steps 2 --guidance-scale 4 --seed 3 --device cpu"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("models") / "ltx-2"
    TINY["ltx-2"].build().save_pretrained(found, safe_serialization=True)
    return found


@pytest.fixture(scope="module")
def samples(folder: Path) -> Any:
    """(N, channels): the pipeline's own, for the clip that `generate` is asked for below."""
    audio = load(folder)(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        height=32,
        width=32,
        num_frames=FRAMES,
        frame_rate=FPS,
        num_inference_steps=2,
        guidance_scale=4.0,
        generator=torch.Generator("cpu").manual_seed(3),
        max_sequence_length=1024,
        output_type="np",
    ).audio
    return audio[0].numpy().T


def invoke(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def generate(folder: Path, output: Path, *more: str) -> Result:
    flags = [*SHAPE.split(), "--preset", "dense", "--quiet", *more]
    return invoke("generate", "-m", str(folder), "-p", PROMPT, "--negative-prompt", NEGATIVE, *flags, "-o", str(output))


@pytest.fixture(scope="module")
def clip(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An .mp4 with sound."""
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    result = generate(folder, path)
    assert result.exit_code == 0, result.stderr
    return path


@pytest.fixture(scope="module")
def gif(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clips") / "clip.gif"
    result = generate(folder, path)
    assert result.exit_code == 0, result.stderr
    return path


def record_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
    return found


def as_long(heard: Any, written: Any) -> bool:
    """Whether decoded sound has the length of what was written; ffmpeg 7.0 gives the last block of AAC as a whole."""
    return bool(heard.shape[1:] == written.shape[1:] and 0 <= len(heard) - len(written) < 1024)


def as_heard(values: Any) -> Any:
    """Without what no ear and no codec keeps: the mean."""
    return values - values.mean(0)


def test_an_mp4_has_the_pipelines_own_samples(clip: Path, samples: Any) -> None:
    expected = Sound.of(samples, RATE)
    heard = read_sound(clip, RATE, 2)
    assert heard is not None
    assert expected.samples.shape == (17440, 2)
    assert as_long(heard.samples, expected.samples)
    assert len(read_clip(clip)) == FRAMES

    def distance(shift: int) -> float:
        """Relative, with the decoded sound moved by so many samples."""
        moved, own = np.roll(heard.samples[: len(expected.samples)], shift, 0)[800:-800], expected.samples[800:-800]
        return float(np.linalg.norm(as_heard(moved.astype(float)) - as_heard(own.astype(float)))) / float(
            np.linalg.norm(as_heard(own.astype(float)))
        )

    assert distance(0) < 0.1, "AAC keeps what is heard"
    assert min(range(-64, 65), key=distance) == 0, "and it begins with the first frame"


def test_a_webm_holds_its_sound_and_a_webp_has_it_beside(folder: Path, tmp_path: Path, samples: Any) -> None:
    expected = Sound.of(samples, RATE)
    for name, file in (("x.webm", "x.webm"), ("y.webp", "y.wav")):
        assert generate(folder, tmp_path / name).exit_code == 0
        record = record_of(tmp_path / name)
        assert (record["audio"]["file"], record["audio"]["sha256"]) == (file, expected.sha256())
        heard = read_sound(tmp_path / file, RATE, 2)
        assert heard is not None
        assert abs(len(heard.samples) - 17440) < 100
        own = as_heard(expected.samples[800:16000].astype(float))
        moved = {shift: as_heard(np.roll(heard.samples, shift, 0)[800:16000].astype(float)) for shift in range(-64, 65)}
        distances = {shift: float(np.linalg.norm(found - own) / np.linalg.norm(own)) for shift, found in moved.items()}
        assert distances[0] == min(distances.values()), "it begins with the first frame"
        assert distances[0] < 0.4, "noise, of which Opus keeps what is heard"
    assert not (tmp_path / "x.wav").exists()


def test_the_record_says_what_there_is_to_hear(clip: Path, gif: Path, samples: Any) -> None:
    for path, file in ((clip, "clip.mp4"), (gif, "clip.wav")):
        record = record_of(path)
        expected = Sound.of(samples, RATE)
        assert record["audio"] == {
            "file": file,
            "rate": RATE,
            "samples": 17440,
            "channels": 2,
            "sha256": expected.sha256(),
        }
        assert record["settings"]["audio"] == {"value": True, "origin": "model default"}


def test_beside_a_gif_the_samples_are_exact(gif: Path, samples: Any) -> None:
    with wave.open(str(gif.with_suffix(".wav"))) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (RATE, 2, 2)
        content = np.frombuffer(file.readframes(file.getnframes()), "<i2").reshape(-1, 2)
    assert np.array_equal(content, np.round(np.clip(samples.astype(float), -1, 1) * 32767).astype(np.int16))


def test_without_audio_a_clip_is_silent(folder: Path, tmp_path: Path) -> None:
    assert generate(folder, tmp_path / "x.mp4", "--no-audio").exit_code == 0
    assert read_sound(tmp_path / "x.mp4") is None
    assert generate(folder, tmp_path / "frames.png", "--no-audio").exit_code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"x.mp4", "x.json", "frames.png", "frames.json"}
    for path in (tmp_path / "x.mp4", tmp_path / "frames.png"):
        record = record_of(path)
        assert "audio" not in record
        assert record["settings"]["audio"] == {"value": False, "origin": "flag"}


def test_a_silent_model_takes_no_choice_of_sound(tiny_wan_folder: Path, tmp_path: Path) -> None:
    for flag in ("--no-audio", "--audio"):
        result = invoke("generate", "-m", str(tiny_wan_folder), "-p", "a cat", flag, "-o", str(tmp_path / "x.mp4"))
        assert result.exit_code == 2
        sentence = f"tiny-wan makes silent clips: leave out {flag}, which is for models that make sound, as ltx-2 does"
        assert result.stderr == f"error: {sentence}\n"
    assert list(tmp_path.iterdir()) == []


def test_a_sound_of_that_name_is_not_replaced(folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "x.wav"
    mine.write_bytes(b"mine")
    result = generate(folder, tmp_path / "x.gif")
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {mine} exists already: pass --overwrite")
    assert mine.read_bytes() == b"mine"
    assert generate(folder, tmp_path / "x.gif", "--no-audio").exit_code == 0
    assert mine.read_bytes() == b"mine"
    assert generate(folder, tmp_path / "x.gif", "--overwrite").exit_code == 0
    assert read_sound(mine) is not None


def test_saved_latents_hold_both_and_decode_keeps_the_sound(
    folder: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that dies while it decodes loses neither."""

    def killed(*_: object, **__: object) -> None:
        raise NonFiniteError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(make, "decode", killed)
        assert generate(folder, tmp_path / "x.gif").exit_code == 1
    latents = tmp_path / "x.latents.safetensors"
    assert [path.name for path in tmp_path.iterdir()] == [latents.name]
    saved = load_latents(latents).denoised
    assert saved.sound is not None
    assert saved.sound.shape == (1, 2, 28, 2)
    result = invoke("decode", str(latents), "--device", "cpu", "-q")
    assert result.exit_code == 0, result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.gif", "x.json", "x.wav"]
    assert record_of(tmp_path / "x.gif")["audio"]["sha256"] == record_of(clip)["audio"]["sha256"]


def test_latents_whose_sound_is_another_are_refused(folder: Path, tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    from vmonarch_cli.pipeline.preflight import check_machine
    from vmonarch_cli.plan.request import GenerateRequest
    from vmonarch_cli.plan.resolve import resolve

    request = GenerateRequest(
        model=str(folder),
        prompt="a",
        height=32,
        width=32,
        num_frames=9,
        steps=2,
        device="cpu",
        output=f"{tmp_path}/x.mp4",
    )
    plan = resolve(request)
    maker = make.ClipMaker(plan, check_machine(plan))
    path = tmp_path / "x.latents.safetensors"
    maker.save(path, plan, 0, maker.denoise(plan, 0))
    with safe_open(path, framework="pt") as file:
        metadata, latents, sound = file.metadata(), file.get_tensor("latents"), file.get_tensor("sound")
    for tensors, sentence in (
        ({"latents": latents}, "is damaged: it holds no sound, and its clip has one"),
        ({"latents": latents, "sound": sound + 1}, "is damaged: its checksum is another"),
    ):
        save_file(tensors, path, metadata)
        with pytest.raises(InputError, match=sentence):
            load_latents(path)


def test_a_rerun_compares_the_sound_too(gif: Path, tmp_path: Path) -> None:
    for file in (gif, gif.with_suffix(".wav"), gif.with_suffix(".json")):
        shutil.copy(file, tmp_path)
    result = invoke("rerun", str(tmp_path / "clip.json"))
    assert result.exit_code == 0, result.stderr
    assert "identical: every pixel of every frame is as in the record, and every sample of the sound" in result.stdout
    assert (tmp_path / "clip-rerun.wav").read_bytes() == gif.with_suffix(".wav").read_bytes()
    record = record_of(tmp_path / "clip.gif")
    record["audio"]["sha256"] = "0" * 64
    (tmp_path / "clip.json").write_text(json.dumps(record))
    result = invoke("rerun", str(tmp_path / "clip.json"), "-o", str(tmp_path / "again.gif"))
    assert result.exit_code == 1


def test_a_clip_that_lost_its_sound_is_damaged(gif: Path, tmp_path: Path) -> None:
    for file in (gif, gif.with_suffix(".wav"), gif.with_suffix(".json")):
        shutil.copy(file, tmp_path)
    assert damage(tmp_path / "clip.gif") is None
    wav = tmp_path / "clip.wav"
    wav.write_bytes(wav.read_bytes()[:-2])
    lost = "has lost its sound, which is not in clip.wav as it was written"
    assert damage(tmp_path / "clip.gif") == lost
    wav.unlink()
    assert damage(tmp_path / "clip.gif") == lost


def test_a_gallery_plays_it(clip: Path, gif: Path, tmp_path: Path) -> None:
    for number, file in enumerate((clip, gif)):
        for ending in (file.suffix, ".json", ".wav"):
            if file.with_suffix(ending).exists():
                shutil.copy(file.with_suffix(ending), tmp_path / f"{number}{ending}")
    assert invoke("gallery", str(tmp_path)).exit_code == 0
    page = (tmp_path / "index.html").read_text()
    assert '<audio controls preload="none" src="./1.wav"' in page
    assert page.count("<audio") == 1
    assert "<video controls loop playsinline" in page
    assert page.count("16,000 Hz, 2 channels, 1.09 s") == 2


def test_a_comparison_keeps_it(folder: Path, samples: Any, clip: Path, gif: Path, tmp_path: Path) -> None:
    made = invoke(
        *("compare", "-m", str(folder), "-p", PROMPT, "--negative-prompt", NEGATIVE, *SHAPE.split()),
        *("--preset", "paper", "-o", str(tmp_path / "made")),
    )
    assert made.exit_code == 0, made.stderr
    assert "the side-by-side video has the sound of dense" in made.stdout
    with_record = invoke("compare", str(gif), str(clip), "-o", str(tmp_path / "files"))
    assert with_record.exit_code == 0, with_record.stderr
    names = ("made/dense.mp4", "made/paper.mp4", "made/side-by-side.mp4", "files/side-by-side.mp4")
    for name in names:
        heard = read_sound(tmp_path / name, RATE, 2)
        assert heard is not None
        assert as_long(heard.samples, samples), name


def test_a_batch_keeps_it(folder: Path, tmp_path: Path) -> None:
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"prompt": "a red circle", "output": "a.gif"}\n{"prompt": "a blue square"}\n')
    batch = ("generate", "-m", str(folder), "--prompts-file", str(lines), *SHAPE.split(), "-q")
    result = invoke(*batch, "-o", str(tmp_path / "with"))
    assert result.exit_code == 0, result.stderr
    assert read_sound(tmp_path / "with" / "a.wav") is not None
    assert read_sound(tmp_path / "with" / "a-blue-square-s3.mp4") is not None
    (tmp_path / "with" / "a.wav").unlink()
    again = invoke(*batch, "-o", str(tmp_path / "with"))
    assert again.exit_code == 0, again.stderr
    assert read_sound(tmp_path / "with" / "a.wav") is not None, "a clip without its sound is made again"
    assert invoke(*batch, "--no-audio", "-o", str(tmp_path / "without")).exit_code == 0
    assert not (tmp_path / "without" / "a.wav").exists()


def test_a_longer_sound_ends_with_the_last_frame() -> None:
    sound = Sound(np.zeros((1000, 1), np.int16), 100)
    assert len(sound.until(2.5).samples) == 250
    assert len(sound.until(20).samples) == 1000


def test_values_beyond_the_range_are_cut_off() -> None:
    sound = Sound.of(np.array([[2.0], [-2.0], [0.5]]), 100)
    assert sound.samples.tolist() == [[32767], [-32767], [16384]]
