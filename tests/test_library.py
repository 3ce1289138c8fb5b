"""Monarch attention in a script: `monarch`, `enable_monarch`, `disable_monarch`."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_wan
import torch
from tiny_wan import LAYERS, latents_of, tiny_pipeline

from vmonarch_cli import (
    Coverage,
    ModelError,
    Preset,
    PresetError,
    disable_monarch,
    enable_monarch,
    load_preset,
    monarch,
)

STEPS = 4
CALLS = 2 * LAYERS * STEPS


@pytest.fixture
def pipeline() -> Any:
    return tiny_pipeline()


def processors(pipeline: Any) -> dict[str, Any]:
    return {name: part.processor for name, part in pipeline.transformer.named_modules() if hasattr(part, "processor")}


def test_a_block_runs_structured_and_puts_all_back(pipeline: Any) -> None:
    stock, before = latents_of(pipeline), processors(pipeline)
    with monarch(pipeline, "paper") as session:
        structured = latents_of(pipeline)
    assert not torch.equal(structured, stock)
    assert session.coverage == Coverage(structured=CALLS)
    assert session.impl in ("torch", "triton")
    assert [step.index for step in session.steps] == list(range(STEPS))
    assert processors(pipeline) == before
    assert torch.equal(latents_of(pipeline), stock)


def test_exact_equals_the_model_and_dense_is_the_model(pipeline: Any) -> None:
    stock = latents_of(pipeline)
    with monarch(pipeline, "exact"):
        torch.testing.assert_close(latents_of(pipeline), stock, rtol=1e-4, atol=1e-4)
    with monarch(pipeline, "dense") as session:
        torch.testing.assert_close(latents_of(pipeline), stock, rtol=1e-4, atol=1e-4)
    assert session.coverage == Coverage(dense={"preset is dense": CALLS})


def test_presets_come_by_name_path_or_object_and_fields_change_them(pipeline: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("num_steps = 3\n")
    for preset in (str(file), file, Preset(name="mine", num_steps=3)):
        with monarch(pipeline, preset, dense_steps=1, band=None) as session:
            assert session.preset == Preset(name="mine", num_steps=3, dense_steps=1, band=None)
            latents_of(pipeline)
        assert session.coverage == Coverage(CALLS - 2 * LAYERS, {"dense_steps": 2 * LAYERS})
    with monarch(pipeline) as session:
        assert session.preset == load_preset("balanced")


def test_enable_lasts_until_disable_and_its_figures_stay(pipeline: Any) -> None:
    stock = latents_of(pipeline)
    session = enable_monarch(pipeline, "balanced", dense_every=1)
    assert session.table() == "no denoising step has ended yet"
    for _ in range(2):
        latents_of(pipeline)
        assert session.coverage == Coverage(structured=CALLS), "figures are of the last call"
    assert disable_monarch(pipeline) is session
    assert torch.equal(latents_of(pipeline), stock)
    lines = session.table(width=120).splitlines()
    assert [title in lines[0] + lines[1] for title in ("step", "attention", "dense", "speedup", "error")] == [True] * 5
    assert [line.split()[0] for line in lines[3 : 3 + STEPS]] == ["1", "2", "3", "4"]
    assert lines[-1] == f"{CALLS} of {CALLS} self-attention calls structured"
    assert all(step.dense_s is not None and step.error is not None for step in session.steps)


def test_all_is_back_after_an_error_in_the_block(pipeline: Any) -> None:
    stock, before = latents_of(pipeline), processors(pipeline)
    pipeline.transformer.blocks[1].register_forward_hook(lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError), monarch(pipeline, "paper"):
        latents_of(pipeline)
    pipeline.transformer.blocks[1]._forward_hooks.clear()
    assert processors(pipeline) == before
    assert torch.equal(latents_of(pipeline), stock)
    with monarch(pipeline, "paper"):
        pass


def test_disabled_within_the_block_it_is_not_ended_twice(pipeline: Any) -> None:
    with monarch(pipeline, "paper"):
        disable_monarch(pipeline)
        enabled = enable_monarch(pipeline, "dense")
    assert disable_monarch(pipeline) is enabled


def test_what_cannot_be_is_one_sentence(pipeline: Any) -> None:
    before = processors(pipeline)
    with monarch(pipeline, "paper"):
        inside = processors(pipeline)
        with pytest.raises(ModelError, match=r"swapped already: end that block, or disable it, first"):
            enable_monarch(pipeline, "paper")
        assert processors(pipeline) == inside, "the first one goes on"
    assert processors(pipeline) == before
    with pytest.raises(ModelError, match="attention of this WanPipeline is its own: there is nothing to disable"):
        disable_monarch(pipeline)
    with pytest.raises(ModelError, match="WanTransformer3DModel is no diffusers pipeline with a transformer and a sch"):
        enable_monarch(pipeline.transformer)
    with pytest.raises(PresetError, match=r"there is no preset 'blanced' \(did you mean balanced\?\)"):
        enable_monarch(pipeline, "blanced")
    with pytest.raises(PresetError, match=r"there is no field 'dense_step' \(did you mean dense_steps"):
        enable_monarch(pipeline, dense_step=1)  # type: ignore[call-arg]
    with pytest.raises(PresetError, match=r"field 'band' takes a whole number from 0 to 4096"):
        enable_monarch(pipeline, band=-1)
    with pytest.raises(PresetError, match="preset takes a name, a path or a Preset, got int"):
        enable_monarch(pipeline, 7)  # type: ignore[arg-type]
    with pytest.raises(PresetError, match="dense_every takes a whole number from 0, got -1"):
        enable_monarch(pipeline, dense_every=-1)
    assert processors(pipeline) == before


def test_a_pipeline_of_an_unknown_family_is_refused_by_name() -> None:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    kinds = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (32,)}
    pipeline = DDPMPipeline(unet=UNet2DModel(sample_size=8, layers_per_block=1, **kinds), scheduler=DDPMScheduler())
    with pytest.raises(ModelError, match="DDPMPipeline has no transformer and scheduler to work with"):
        enable_monarch(pipeline)
    known = tiny_pipeline()
    known.transformer = torch.nn.Linear(2, 2)
    with pytest.raises(ModelError, match=r"attention of a Linear cannot be swapped; known are .*WanTransformer3DModel"):
        enable_monarch(known)


@pytest.mark.parametrize("when", ["before", "inside"])
@pytest.mark.parametrize("what", ["compile", "offload"])
def test_compiled_and_offloaded_pipelines_run_alike(pipeline: Any, what: str, when: str) -> None:
    def prepare() -> None:
        if what == "compile":
            pipeline.transformer.compile_repeated_blocks(backend="eager")
        else:
            pipeline.enable_model_cpu_offload(device="cpu")

    with monarch(pipeline, "paper"):
        expected = latents_of(pipeline)
    if when == "before":
        prepare()
    with monarch(pipeline, "paper") as session:
        if when == "inside":
            prepare()
        torch.testing.assert_close(latents_of(pipeline), expected, rtol=1e-4, atol=1e-4)
    assert session.coverage == Coverage(structured=CALLS)


SCRIPT = """
from diffusers import DiffusionPipeline
from my_pipeline import tiny_pipeline
from vmonarch_cli import monarch
from vmonarch_cli.models.demo import WEIGHTS

for pipe in (DiffusionPipeline.from_pretrained(WEIGHTS), tiny_pipeline()):
    with monarch(pipe, "paper") as session:
        frames = pipe("a red circle moving left", height=32, width=32, num_frames=9, num_inference_steps=2).frames
    print(frames.shape)
    print(session.table())
"""


def test_a_script_outside_of_the_repository(tmp_path: Path) -> None:
    """With the demo model, and with a pipeline made by hand."""
    shutil.copy(str(tiny_wan.__file__), tmp_path / "my_pipeline.py")
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines.count("(1, 9, 32, 32, 3)") == 2
    counts = [2 * 2 * layers for layers in (8, LAYERS)]
    said = [line for line in lines if line.endswith("structured")]
    assert said == [f"{count} of {count} self-attention calls structured" for count in counts]


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "vmonarch_cli/cli/README.md"])
def test_the_lines_of_the_pages_run(page: str) -> None:
    """As they stand, from the root of a checkout, in half a minute on two cores."""
    root = Path(__file__).parents[1]
    text = (root / page).read_text(encoding="utf-8")
    script = next(block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "monarch(pipe" in block)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False, timeout=400
    )
    assert done.returncode == 0, done.stderr
    assert "speedup" in done.stdout
