"""MiniMax-H3: where the video is in its packed sequence, its given frames and its sound, from flags to files."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loading import PAPER, load
from tiny_families import PROMPT, TINY, image, latents_of, sharpen
from typer.testing import CliRunner, Result

from vmonarch_cli import monarch
from vmonarch_cli.attention.joint import Packed
from vmonarch_cli.cli.app import app
from vmonarch_cli.clip import make
from vmonarch_cli.clip.latents import load_latents
from vmonarch_cli.errors import ModelError, NonFiniteError
from vmonarch_cli.families.minimax import find_video
from vmonarch_cli.media.metrics import relative_error
from vmonarch_cli.media.read import read_clip
from vmonarch_cli.media.sound import Sound, read_sound
from vmonarch_cli.models.minimax import MINIMAX_H3
from vmonarch_cli.models.registry import find_model
from vmonarch_cli.pipeline.swap import swapped
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve
from vmonarch_cli.presets import load_preset
from vmonarch_cli.timing import Coverage

pytestmark = pytest.mark.usefixtures("one_thread")
FRAMES, RATE, SOUND_ROWS = 124, 32000, 2 * 207
GRID = (37, 2, 3)
SHAPE = f"--size 96x64 --num-frames {FRAMES} --steps 2 --seed 3 --device cpu"
CLOSE: dict[str, Any] = {"rtol": 2e-4, "atol": 2e-4}
Layout = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("models") / "h3"
    TINY["minimax-h3"].build().save_pretrained(found, safe_serialization=True)
    return found


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    return load(folder)


def layout(*anchors: str, text: int = 5, video_time: float = 0.3, given_time: float = 0.999) -> Layout:
    """The arguments that say where rows are, made by diffusers' own blocks for a clip of the grid above."""
    from diffusers.modular_pipelines.minimax_h3.before_denoise import (
        MiniMaxH3PrepareLayoutStep,
        MiniMaxH3SetTimestepsStep,
    )

    positions, tags, video, audio, texts, given, _ = MiniMaxH3PrepareLayoutStep.build_packed_sequence(
        torch.ones(text), GRID[0], 4, 6, 207, (1, 2, 2), 2, 2, 0, anchors
    )
    times, indices = MiniMaxH3SetTimestepsStep.build_row_timesteps(
        video, audio, given, 0, text, video_time, 0.5, given_time, 1.0
    )
    rows = {"video_indices": video, "audio_indices": audio, "text_indices": texts}
    return {**rows, "timestep": times, "timestep_indices": indices, "token_tags": tags, "position_ids": positions}


def found(rows: Layout) -> Packed:
    return find_video(
        **{name: tensor for name, tensor in rows.items() if name not in ("audio_indices", "text_indices")}
    )


def reordered(rows: Layout, order: torch.Tensor) -> Layout:
    """The same rows in another order: place i has what was in place order[i]."""
    place = torch.argsort(order)
    per_row = {name: rows[name][order] for name in ("timestep_indices", "token_tags", "position_ids")}
    where = {name: place[rows[name]] for name in ("video_indices", "audio_indices", "text_indices")}
    return {**rows, **per_row, **where}


def test_the_video_is_found_behind_text_given_frames_and_sound() -> None:
    for anchors in ((), ("first",), ("last",), ("first", "last")):
        others = 5 + len(anchors) * GRID[1] * GRID[2] + SOUND_ROWS
        assert found(layout(*anchors)) == Packed(GRID, before=others, others=others)


def test_the_video_is_found_behind_references() -> None:
    """A picture, a film with its sound and a sound alone, each with rows of its own."""
    from diffusers.modular_pipelines.minimax_h3 import (
        MiniMaxH3AudioReference,
        MiniMaxH3ImageReference,
        MiniMaxH3VideoReference,
    )
    from diffusers.modular_pipelines.minimax_h3.before_denoise import (
        MiniMaxH3Ref2VAPrepareLayoutStep,
        MiniMaxH3SetTimestepsStep,
    )

    sound = torch.zeros(2, 8)
    references = [
        MiniMaxH3ImageReference(image=image()),
        MiniMaxH3VideoReference(frames=[], audio=sound),
        MiniMaxH3AudioReference(audio=sound),
    ]
    latents = [torch.zeros(1, 4, 1, 8, 8), torch.zeros(1, 4, 7, 4, 6)]
    sounds = [torch.zeros(2 * 20, 4), torch.zeros(2 * 30, 4)]
    positions, tags, video, audio, _, given, heard = MiniMaxH3Ref2VAPrepareLayoutStep.build_ref2va_packed_sequence(
        torch.ones(5), references, latents, sounds, GRID[0], 4, 6, 207, (1, 2, 2), 2, 2, 0
    )
    times, indices = MiniMaxH3SetTimestepsStep.build_row_timesteps(video, audio, given, heard, 5, 0.3, 0.5, 0.999, 1.0)
    rows = {"video_indices": video, "token_tags": tags, "position_ids": positions}
    others = 5 + 16 + 40 + 7 * 6 + 60 + SOUND_ROWS
    assert find_video(**rows, timestep=times, timestep_indices=indices) == Packed(GRID, before=others, others=others)


def test_the_video_is_found_wherever_it_stands() -> None:
    rows = layout("first")
    count, size = len(rows["token_tags"]), GRID[0] * GRID[1] * GRID[2]
    places = torch.arange(count)
    front = torch.cat([places[-size:], places[:-size]])
    middle = torch.cat([places[:5], places[-size:], places[5:-size]])
    assert found(reordered(rows, front)) == Packed(GRID, before=0, others=count - size)
    assert found(reordered(rows, middle)) == Packed(GRID, before=5, others=count - size)


@pytest.mark.parametrize("what", ["swapped", "apart", "missing", "bent", "tagged", "indistinct"])
def test_rows_that_are_no_whole_grid_in_raster_order_are_none(what: str) -> None:
    rows = layout("first", given_time=0.3 if what == "indistinct" else 0.999)
    count, size = len(rows["token_tags"]), GRID[0] * GRID[1] * GRID[2]
    order = torch.arange(count)
    if what == "swapped":
        order[[-1, -2]] = order[[-2, -1]]
        rows = reordered(rows, order)
        rows["video_indices"] = rows["video_indices"].sort().values
    elif what == "apart":  # a row of sound among them
        rows = reordered(rows, torch.cat([order[: -size - 1], order[-size:-5], order[-size - 1 : -size], order[-5:]]))
    elif what == "missing":
        rows["video_indices"] = rows["video_indices"][:-1]
    elif what == "bent":
        rows["position_ids"][-1, 2] += 0.5
    elif what == "tagged":
        rows["token_tags"][-1] = 2
    packed = found(rows)
    assert packed.text is None
    assert packed.grid[:2] == (1, 1)
    assert packed.grid[2] < count, "so that the call fits no grid"


def forward(transformer: Any, rows: Layout, width: int = 16) -> torch.Tensor:
    """The video's velocity, on random rows."""
    generator = torch.Generator().manual_seed(0)

    def noise(name: str, channels: int) -> torch.Tensor:
        return torch.randn(1, len(rows[name]), channels, generator=generator)

    with torch.no_grad():
        result: torch.Tensor = transformer(
            hidden_states=noise("video_indices", 16),
            audio_hidden_states=noise("audio_indices", 4),
            encoder_hidden_states=noise("text_indices", width),
            return_dict=False,
            **rows,
        )[0]
    return result


def structured(transformer: Any, rows: Layout) -> tuple[torch.Tensor, Coverage]:
    with swapped(transformer, PAPER) as session:
        session.begin_clip(1)
        session.begin_step()
        result = forward(transformer, rows)
        session.end_step()
        return result, session.coverage()


def test_structured_attention_does_not_depend_on_where_the_video_stands(pipeline: Any) -> None:
    rows = layout("first", "last")
    places, size = torch.arange(len(rows["token_tags"])), GRID[0] * GRID[1] * GRID[2]
    middle = torch.cat([places[:9], places[-size:], places[9:-size]])
    stock = forward(pipeline.transformer, rows)
    first, coverage = structured(pipeline.transformer, rows)
    second, again = structured(pipeline.transformer, reordered(rows, middle))
    assert coverage == again == Coverage(structured=2)
    torch.testing.assert_close(first, second, **CLOSE)
    assert float((first - stock).norm() / stock.norm()) > 1e-3


def test_a_forward_without_a_whole_grid_runs_dense_and_is_counted_so(pipeline: Any) -> None:
    rows = layout()
    rows["position_ids"][-1, 2] += 0.5
    result, coverage = structured(pipeline.transformer, rows)
    assert coverage == Coverage(dense={"token count does not fit the grid": 2})
    torch.testing.assert_close(result, forward(pipeline.transformer, rows), **CLOSE)


def test_what_stands_beside_the_video_is_exact(pipeline: Any) -> None:
    """Where the video's own attention is exact in the structured code, so is everything: sound and given frames."""
    rows = layout("first", "last")
    stock = forward(pipeline.transformer, rows)
    with swapped(pipeline.transformer, load_preset("exact")) as session:
        session.begin_clip(1)
        session.begin_step()
        result = forward(pipeline.transformer, rows)
        session.end_step()
    torch.testing.assert_close(result, stock, **CLOSE)


def test_a_script_swaps_both_partitions_and_references_run_structured() -> None:
    """A picture and a sound: their rows are in the sequence of the partition that takes references."""
    import diffusers
    from diffusers.modular_pipelines.minimax_h3 import MiniMaxH3AudioReference, MiniMaxH3ImageReference

    pipeline = TINY["minimax-h3"].build()
    torch.manual_seed(7)
    other = diffusers.MiniMaxH3Transformer3DModel.from_config(pipeline.transformer.config)
    pipeline.update_components(transformer_ref=sharpen(other), reference_image_short_edge=64)
    sound = torch.randn(2, 8000, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    references = [MiniMaxH3ImageReference(image=image(64, 64)), MiniMaxH3AudioReference(audio=sound, sample_rate=RATE)]
    made = []
    for preset in (None, "exact", "balanced"):
        with monarch(pipeline, preset) if preset else nullcontext() as session:
            made.append(latents_of(pipeline, TINY["minimax-h3"], steps=3, references=references))
            assert session is None or session.coverage.calls == 2 * 3
    assert session is not None
    assert session.coverage == Coverage(structured=6)
    torch.testing.assert_close(made[1], made[0], **CLOSE)
    assert relative_error(made[2], made[0]) > 1e-3
    with monarch(pipeline, "balanced") as session:
        latents_of(pipeline, TINY["minimax-h3"], steps=3)
    assert session.coverage == Coverage(structured=6), "and so does the first partition"


def invoke(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def generate(folder: Path, output: Path, *more: str) -> Result:
    flags = [*SHAPE.split(), "--preset", "dense", "--quiet", *more]
    return invoke("generate", "-m", str(folder), "-p", PROMPT, *flags, "-o", str(output))


def record_of(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
    return record


@pytest.fixture(scope="module")
def samples(pipeline: Any) -> Any:
    """(N, channels): the pipeline's own, for the clip that `generate` is asked for."""
    made = pipeline(
        prompt=PROMPT,
        height=64,
        width=96,
        num_frames=FRAMES,
        num_inference_steps=3,
        generator=torch.Generator("cpu").manual_seed(3),
        output_type="np",
        output=["audio", "sampling_rate"],
    )
    assert made["sampling_rate"] == RATE
    return made["audio"][0].numpy().T


def test_a_clip_has_the_pipelines_own_sound(folder: Path, samples: Any, tmp_path: Path) -> None:
    result = generate(folder, tmp_path / "x.mp4")
    assert result.exit_code == 0, result.stderr
    expected = Sound.of(samples[: round(FRAMES / 24 * RATE)], RATE)
    record = record_of(tmp_path / "x.mp4")
    assert len(read_clip(tmp_path / "x.mp4")) == record["frames"]["count"] == FRAMES
    assert record["audio"]["sha256"] == expected.sha256()
    assert (record["audio"]["samples"], record["audio"]["channels"]) == (165333, 2)
    heard = read_sound(tmp_path / "x.mp4", RATE, 2)
    assert heard is not None
    assert abs(len(heard.samples) - 165333) < 2048, "AAC fills its last frame"
    assert expected.samples.std() > 1, "and there is something to hear"
    both, own = heard.samples[2048:150000].astype(float), expected.samples[2048:150000].astype(float)
    assert np.corrcoef(both.sum(1), own.sum(1))[0, 1] > 0.5


def test_without_audio_a_clip_is_silent_and_has_any_rate(folder: Path, tmp_path: Path) -> None:
    assert generate(folder, tmp_path / "x.gif", "--no-audio", "--fps", "12").exit_code == 0
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["x.gif", "x.json"]
    assert record_of(tmp_path / "x.gif")["frames"]["fps"] == 12


def test_saved_latents_hold_both_and_decode_keeps_the_sound(
    folder: Path, samples: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise NonFiniteError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(make, "decode", killed)
        assert generate(folder, tmp_path / "x.gif").exit_code == 1
    saved = load_latents(tmp_path / "x.latents.safetensors").denoised
    assert saved.sound is not None
    assert (saved.latents.shape, saved.sound.shape) == ((1, 4, 37, 4, 6), (1, 2, 4, 207))
    result = invoke("decode", str(tmp_path / "x.latents.safetensors"), "--device", "cpu", "-q")
    assert result.exit_code == 0, result.stderr
    expected = Sound.of(samples[: round(FRAMES / 24 * RATE)], RATE)
    assert record_of(tmp_path / "x.gif")["audio"]["sha256"] == expected.sha256()


def test_first_and_last_frames_steer_the_clip(folder: Path, pipeline: Any, tmp_path: Path) -> None:
    first, last = tmp_path / "first.png", tmp_path / "last.png"
    image(96, 64).save(first)
    image(96, 64).rotate(180).save(last)
    made = {}
    for flags in (
        (),
        ("--image", str(first)),
        ("--last-image", str(last)),
        ("--image", str(first), "--last-image", str(last)),
    ):
        output = tmp_path / f"{len(made)}.gif"
        result = generate(folder, output, "--no-audio", *flags, "--preset", "paper")
        assert result.exit_code == 0, result.stderr
        record = record_of(output)
        assert record["coverage"]["structured"] == 4
        assert record["coverage"]["dense"] == {}
        made[flags] = record["frames"]["sha256"]
    assert len(set(made.values())) == 4
    settings = record["settings"]
    assert settings["image"] == {"value": str(first), "origin": "flag"}
    assert settings["last_image"] == {"value": str(last), "origin": "flag"}
    again = invoke("rerun", str(tmp_path / "3.json"), "-o", str(tmp_path / "again.gif"))
    assert again.exit_code == 0, again.stderr
    assert "identical" in again.stdout


def test_a_batch_takes_last_frames_by_line(folder: Path, tmp_path: Path) -> None:
    image(96, 64).save(tmp_path / "last.png")
    lines = tmp_path / "prompts.jsonl"
    lines.write_text(json.dumps({"prompt": "red", "last_image": str(tmp_path / "last.png")}) + '\n{"prompt": "blue"}\n')
    flags = [*SHAPE.split(), "--preset", "paper", "-q", "-o", str(tmp_path / "out")]
    result = invoke("generate", "-m", str(folder), "--prompts-file", str(lines), *flags)
    assert result.exit_code == 0, result.stderr
    found = {path.stem: record_of(path) for path in (tmp_path / "out").glob("*.mp4")}
    assert found["red-s3"]["settings"]["last_image"]["value"] == str(tmp_path / "last.png")
    assert found["blue-s3"]["settings"]["last_image"]["value"] is None


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--num-frames 120", "120 frames do not fit h3: the frame count must be a multiple of 17 plus 5, 124 at least, "
         "the nearest valid counts are 124 and 141"),
        ("--num-frames 362", "362 frames do not fit h3: it makes clips of 124 to 345 frames"),
        ("--size 100x64", "size 100x64 does not fit h3: width and height must be multiples of 32 pixels, the nearest "
         "valid sizes are 96x64 and 128x64"),
        ("--fps 16", "--fps 16 does not fit h3: it makes 24 frames per second, and no other rate keeps in step with "
         "its sound, which --no-audio leaves out"),
        ("--last-image none.png", "there is no last image none.png"),
        ("--cache pab", "--cache pab does not run in a MiniMaxH3ModularPipeline of diffusers: no cache can"),
        ("--sampler euler", "--sampler cannot be set: the noise schedule of h3 is not a flow from noise level 1 to 0"),
    ],
)  # fmt: skip
def test_what_it_cannot_make_is_one_sentence(folder: Path, tmp_path: Path, flags: str, sentence: str) -> None:
    base = [word for word in SHAPE.split() if flags.split()[0] != "--size" or word not in ("--size", "96x64")]
    output = ("-o", str(tmp_path / "x.mp4"))
    result = invoke("generate", "-m", str(folder), "-p", "a cat", *base, *flags.split(), *output)
    assert (result.exit_code, result.stderr) == (2, f"error: {sentence}\n")
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_a_last_frame_refuses_one(tiny_wan_folder: Path, tmp_path: Path) -> None:
    image().save(tmp_path / "last.png")
    result = invoke("plan", "-m", str(tiny_wan_folder), "-p", "a cat", "--last-image", str(tmp_path / "last.png"))
    assert result.exit_code == 2
    sentence = "takes no last frame: leave out --last-image, which is for models that end on one, as minimax-h3 does"
    assert result.stderr == f"error: tiny-wan {sentence}\n"


def test_guidance_is_in_its_weights() -> None:
    plan = resolve(GenerateRequest(model="minimax-h3", prompt="a cat", guidance_scale=5.0, negative_prompt="blurry"))
    assert plan.warnings == (
        "--guidance-scale has no effect: guidance is in the weights of minimax-h3",
        "--negative-prompt has no effect: guidance is in the weights of minimax-h3",
    )


def test_costs_count_sound_and_given_frames(tmp_path: Path) -> None:
    image().save(tmp_path / "x.png")
    request: dict[str, Any] = {"model": "minimax-h3", "prompt": "a cat", "num_frames": 243, "preset": "paper"}
    plain = resolve(GenerateRequest(**request))
    given = resolve(GenerateRequest(**request, image=str(tmp_path / "x.png"), last_image=str(tmp_path / "x.png")))
    assert plain.grid == (72, 24, 42)
    assert plain.other_tokens == 2 * 405
    assert given.other_tokens - plain.other_tokens == 2 * 2 * 24 * 42
    tokens, others, width = plain.tokens, plain.other_tokens, 56 * 128
    assert plain.flops.dense_call == 4 * (tokens + others) ** 2 * width
    assert given.flops.structured_call > plain.flops.structured_call
    alone = plain.flops.structured_call - 4 * others * (2 * tokens + others) * width
    assert plain.flops.dense_call / plain.flops.structured_call < 4 * tokens**2 * width / alone


def test_its_seconds_are_the_pipelines() -> None:
    """5 to 15 at 24 frames per second, of the counts that the VAE can make."""
    counts = MINIMAX_H3.axes()[0]
    assert (counts.first, counts.step, counts.largest) == (124, 17, 345)
    for count in (counts.first, counts.largest):
        assert 5 <= count / 24 <= 15
        assert MINIMAX_H3.grid(768, 1344, count)[0] == (count - 5) // 17 * 5 + 2


def test_a_part_of_another_library_is_not_loaded(folder: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(folder, tmp_path / "x")
    path = tmp_path / "x" / "modular_model_index.json"
    index = json.loads(path.read_text())
    index["scheduler"][:2] = ["os", "OtherScheduler"]
    path.write_text(json.dumps(index))
    with pytest.raises(
        ModelError, match=r"names os\.OtherScheduler as its scheduler, which is no class of diffusers or transf"
    ):
        load(tmp_path / "x")
    del index["audio_vae"]
    path.write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"not a complete model: its modular_model_index\.json names no audio_vae"):
        find_model(str(tmp_path / "x"))


def test_an_index_that_was_written_before_anything_was_loaded_is_read_too(folder: Path, tmp_path: Path) -> None:
    """As it is published: classes are named by the places that components come from."""
    import shutil

    shutil.copytree(folder, tmp_path / "x")
    path = tmp_path / "x" / "modular_model_index.json"
    index = json.loads(path.read_text())
    for value in index.values():
        if isinstance(value, list):
            value[:2] = [None, None]
            value[2]["pretrained_model_name_or_path"] = "someone/elsewhere"
    index["tokenizer"][2]["type_hint"] = ["transformers", "PreTrainedTokenizerFast"]
    path.write_text(json.dumps(index))
    assert find_model(str(tmp_path / "x"))[0].pipeline == "MiniMaxH3ModularPipeline"
    tiny = TINY["minimax-h3"]
    torch.testing.assert_close(latents_of(load(tmp_path / "x"), tiny), latents_of(load(folder), tiny))
