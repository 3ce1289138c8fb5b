"""Every family: a tiny checkpoint in its own format goes through the real path, from a folder to frames.

FAMILIES.md, written by ``python tests/support/families_table.py``, is the table of what passes here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import NEGATIVE, PROMPT, TINY, Tiny, latents_of, save_video

from vmonarch_cli.clip import make as run
from vmonarch_cli.families.registry import FAMILIES, facts_of
from vmonarch_cli.media.metrics import relative_error
from vmonarch_cli.models.registry import find_model
from vmonarch_cli.pipeline import call as pipelines
from vmonarch_cli.pipeline.call import decode_whole
from vmonarch_cli.pipeline.load import load_pipeline
from vmonarch_cli.pipeline.swap import swapped
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve
from vmonarch_cli.presets import Preset
from vmonarch_cli.timing import Coverage

STEPS = 2
EXACT = Preset(name="exact", band=1024)
PAPER = Preset(name="paper")
WARM = Preset(name="warm", warm_start=True, band=0)
SHARED = WARM.model_copy(update={"refresh": 1, "shared_refresh": True})
DENSE = Preset(name="dense", attention="dense")
CPU = torch.device("cpu")
CUDA = torch.cuda.is_available()
CLOSE: dict[str, Any] = {"rtol": 2e-4, "atol": 2e-4}  # float32, two steps, latents of size one
_AT_24 = ("ltx-2", "minimax", "kandinsky-6")
families = pytest.mark.parametrize("name", TINY)


pytestmark = pytest.mark.usefixtures("one_thread")


class Loaded:
    """A family's pipeline from disk, and what it makes when nothing is swapped."""

    def __init__(self, name: str, folder: Path) -> None:
        self.tiny: Tiny = TINY[name]
        self.folder = folder / name
        self.tiny.build().save_pretrained(self.folder, safe_serialization=True)
        self.pipeline = load_pipeline(str(self.folder), device=CPU, dtype=torch.float32)
        self.stock = latents_of(self.pipeline, self.tiny, steps=STEPS)
        self.calls = self.tiny.layers * self.tiny.forwards * STEPS


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loaded]:
    return {}


@pytest.fixture
def case(name: str, loaded: dict[str, Loaded], tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    if name not in loaded:
        loaded[name] = Loaded(name, tmp_path_factory.mktemp("families"))
    return loaded[name]


def processors(transformer: Any) -> dict[str, Any]:
    return {name: module.processor for name, module in transformer.named_modules() if hasattr(module, "processor")}


@families
def test_exact_equals_the_stock_pipeline(case: Loaded, name: str) -> None:
    for preset, coverage in (
        (EXACT, Coverage(dense={"the structure is exact": case.calls})),
        (EXACT.model_copy(update={"warm_start": True}), Coverage(dense={"the structure is exact": case.calls})),
        (DENSE, Coverage(dense={"preset is dense": case.calls})),
    ):
        with swapped(case.pipeline, preset) as session:
            latents = latents_of(case.pipeline, case.tiny, steps=STEPS)
        torch.testing.assert_close(latents, case.stock, **CLOSE)
        assert session.coverage() == coverage
        assert session.grid == case.tiny.grid


@families
def test_paper_is_structured_in_every_self_attention_layer_and_nowhere_else(case: Loaded, name: str) -> None:
    with swapped(case.pipeline, PAPER) as session:
        inside = processors(case.pipeline.transformer)
        latents = latents_of(case.pipeline, case.tiny, steps=STEPS)
    stock = processors(case.pipeline.transformer)
    changed = [path for path in stock if inside[path] is not stock[path]]
    assert len(changed) == case.tiny.layers
    assert len(changed) < len(stock) or "hunyuan" not in name, "token refiners keep their processors"
    assert session.coverage() == Coverage(structured=case.calls)
    assert session.impl == "torch"
    assert 0.001 < float((latents - case.stock).norm() / case.stock.norm()) < 1.0


@families
def test_reference_and_torch_implementations_agree(case: Loaded, name: str) -> None:
    made = []
    for impl in ("reference", "torch"):
        with swapped(case.pipeline, WARM.model_copy(update={"impl": impl})):
            made.append(latents_of(case.pipeline, case.tiny, steps=STEPS))
    # L is kept in eight bits, and a rounding that falls the other way is one part in sixteen of a small weight.
    torch.testing.assert_close(made[0], made[1], rtol=2e-2, atol=2e-2 * float(case.stock.abs().max()))


@pytest.mark.parametrize("name", TINY if CUDA else ["cogvideox-5b"])
def test_triton_and_torch_agree(case: Loaded, name: str) -> None:
    """The kernels in a family's own calls: on a GPU in bfloat16, interpreted in float32 and there for one family alone,
    whose calls have text and both prompts.
    """
    pipeline, most = case.pipeline, 2e-3
    if CUDA:
        pipeline = load_pipeline(str(case.folder), device=torch.device("cuda"), dtype=torch.bfloat16)
        most = 3e-2
    made = []
    for impl in ("torch", "triton"):
        with swapped(pipeline, SHARED.model_copy(update={"impl": impl})) as session:
            made.append(latents_of(pipeline, case.tiny, steps=STEPS))
        assert session.impl == impl
        assert session.coverage() == Coverage(structured=case.calls)
    assert relative_error(made[1], made[0]) < most


@pytest.mark.parametrize("name", [name for name, tiny in TINY.items() if tiny.guidance_by_batch])
def test_prompts_of_one_forward_are_guidance_branches(case: Loaded, name: str) -> None:
    """As two forwards would: both start from the same L, and the second uses what the first keeps."""
    held = {}
    for preset in (WARM, SHARED):
        same: dict[str, Any] = {"negative_prompt": PROMPT}
        with swapped(case.pipeline, preset) as session:
            guided = latents_of(case.pipeline, case.tiny, steps=STEPS, **same)
            held[preset] = session.kept_bytes
        if preset is WARM:
            with swapped(case.pipeline, preset):
                unguided = latents_of(case.pipeline, case.tiny, steps=STEPS, guidance_scale=1.0, **same)
            torch.testing.assert_close(guided, unguided, **CLOSE)
    frames, rows, columns = case.tiny.grid
    entry, _ = find_model(str(case.folder))
    corrections = case.tiny.layers * frames * rows * columns * entry.heads * (entry.head_dim + 4)
    assert held[SHARED] - held[WARM] == corrections, "of one sample, not of two"


@pytest.mark.parametrize("name", ["hunyuan-video-1.5"])  # diffusers' Motif pipeline fails with an interval
def test_a_guidance_interval_starts_both_branches_from_the_same(case: Loaded, name: str) -> None:
    """With the same prompt on both sides guidance changes nothing, also in the first step that has it."""
    before = case.pipeline.guider
    made = []
    try:
        for options in ({"guidance_scale": 4.0, "start": 0.5}, {"guidance_scale": 1.0}):
            case.pipeline.guider = before.new(**options)
            with swapped(case.pipeline, WARM) as session:
                made.append(latents_of(case.pipeline, case.tiny, steps=4, negative_prompt=PROMPT))
            calls = [step.calls for step in session.steps]
            assert calls == [case.tiny.layers * n for n in ((1, 1, 2, 2) if "start" in options else (1, 1, 1, 1))]
    finally:
        case.pipeline.guider = before
    torch.testing.assert_close(made[0], made[1], **CLOSE)


@families
def test_everything_is_put_back_to_the_bit(case: Loaded, name: str) -> None:
    before = processors(case.pipeline.transformer)
    with swapped(case.pipeline, PAPER):
        pass
    assert processors(case.pipeline.transformer) == before
    assert torch.equal(latents_of(case.pipeline, case.tiny, steps=STEPS), case.stock)


@families
def test_a_run_makes_the_frames_of_the_pipelines_own_call(case: Loaded, name: str, tmp_path: Path) -> None:
    """Text, denoising and decoding one by one, as a run does them, against one call of the pipeline."""
    tiny, pipeline = case.tiny, case.pipeline
    shape = (tiny.height, tiny.width, tiny.num_frames)
    scale = tiny.options.get("guidance_scale", 4.0)
    options = {key: value for key, value in tiny.options.items() if key not in ("negative_prompt", "guidance_scale")}
    tokens = options.pop("max_sequence_length", 16)
    image = options.pop("image", None)
    path = film = None
    if image is not None:
        path = str(tmp_path / "first.png")
        image.save(path)
    pictures, strength = options.pop("video", None), options.pop("strength", None)
    if pictures is not None:
        film = str(save_video(tmp_path / "film.gif", pictures))
    with swapped(pipeline, EXACT) as session:
        embeddings = run.encode(pipeline, PROMPT, NEGATIVE, scale, tokens)
        if options:  # LTX-2 with an image, which a run compresses itself
            latents = pipelines.call(
                pipeline,
                embeddings,
                shape,
                num_inference_steps=STEPS,
                guidance_scale=scale,
                generator=torch.Generator("cpu").manual_seed(0),
                fps=24,
                image=image,
                **options,
            )
        else:
            asked = GenerateRequest(
                model=str(case.folder),
                prompt=PROMPT,
                height=tiny.height,
                width=tiny.width,
                num_frames=tiny.num_frames,
                steps=STEPS,
                guidance_scale=scale,
                fps=24 if name.startswith(_AT_24) else 25,  # as the stock call has it by default
                image=path,
                video=film,
                strength=strength,
                output=str(tmp_path / "x.mp4"),
            )
            plan = resolve(asked).model_copy(update={"guidance_scale_2": None})
            latents = run.denoise(pipeline, session, embeddings, plan, seed=0).frames
    frames = decode_whole(pipeline, latents, shape)
    expected = latents_of(pipeline, tiny, steps=STEPS, output_type="np")[0]
    assert frames.shape == expected.shape
    difference = torch.from_numpy(frames).float() - torch.from_numpy(expected * 255)
    # Cosmos cuts fractions off for its safety checks: a value on the edge of two falls to either.
    assert difference.abs().max() < (1.001 if name.startswith("cosmos") else 1.0), "more than a rounding apart"


@families
def test_every_part_of_a_clip_follows_its_latents(case: Loaded, name: str) -> None:
    """Corners of the first, a middle and the last frame: no part is blank, and other latents change all of them."""
    tiny = case.tiny
    shape = (tiny.height, tiny.width, tiny.num_frames)
    noise = torch.randn(case.stock.shape, generator=torch.Generator().manual_seed(3))
    clips = [
        torch.from_numpy(decode_whole(case.pipeline, latents, shape)).float()
        for latents in (case.stock, case.stock + 3 * noise)
    ]
    assert clips[0].shape == (tiny.num_frames, tiny.height, tiny.width, 3)
    side = min(tiny.height, tiny.width) // 4
    for frame in (0, tiny.num_frames // 2, tiny.num_frames - 1):
        for rows in (slice(side), slice(-side, None)):
            for columns in (slice(side), slice(-side, None)):
                first, second = (clip[frame, rows, columns] for clip in clips)
                assert first.std() > 0 or second.std() > 0, "a corner is constant"
                assert (first - second).abs().max() > 0, "a corner does not depend on the latents"


@families
def test_a_folder_describes_itself(case: Loaded, name: str) -> None:
    entry, source = find_model(str(case.folder))
    tiny = case.tiny
    assert source == str(case.folder)
    assert entry.pipeline == type(case.pipeline).__name__
    assert entry.layers == tiny.layers
    assert (entry.heads, entry.head_dim) in {(2, 16), (2, 24)}
    entry.check_shape(tiny.height, tiny.width, tiny.num_frames)
    assert entry.grid(tiny.height, tiny.width, tiny.num_frames) == tiny.grid
    does_both = entry.image_pipeline == entry.pipeline
    assert does_both or entry.takes_image == ("image" in tiny.options)
    forwards = 1 if entry.embedded_guidance or facts_of(case.pipeline).guidance_by_batch else 2
    assert forwards + entry.extra_forwards == tiny.forwards


def test_every_swappable_transformer_is_tested() -> None:
    assert {tiny.transformer_class for tiny in TINY.values()} == set(FAMILIES)
