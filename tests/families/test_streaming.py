"""Frames of Wan's decoder as they come: the pixels of the stock pipeline, part by part, in every memory mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batches import request, tree
from tiny_wan import tiny_pipeline

from vmonarch_cli.clip import make
from vmonarch_cli.families import wan
from vmonarch_cli.families.wan_vae import decode_chunks, decode_raw
from vmonarch_cli.families.wan_vae_lean import by_channels, lean
from vmonarch_cli.media.read import read_clip
from vmonarch_cli.pipeline.call import decode, decode_whole
from vmonarch_cli.pipeline.preflight import check_machine
from vmonarch_cli.plan.resolve import resolve

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = (32, 48, 17)


@pytest.fixture
def in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode clips as small as those of a test as long ones are decoded."""
    monkeypatch.setattr(wan, "_WHOLE_PIXELS", 0)


def latents(seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 4, 5, 4, 6, generator=torch.Generator().manual_seed(seed))


def stock_frames(pipeline: Any, clip: torch.Tensor) -> Any:
    """The end of WanPipeline's own call, in 8 bits as this program rounds."""
    config = pipeline.vae.config
    mean = torch.tensor(config.latents_mean).view(1, -1, 1, 1, 1)
    std = 1.0 / torch.tensor(config.latents_std).view(1, -1, 1, 1, 1)
    with torch.no_grad():
        given = (clip / std + mean).to(pipeline.vae.device, pipeline.vae.dtype)
        video = pipeline.vae.decode(given, return_dict=False)[0]
    return (pipeline.video_processor.postprocess_video(video, output_type="np")[0] * 255).round().astype(np.uint8)


@pytest.mark.usefixtures("in_chunks")
@pytest.mark.parametrize("tiled", [False, True])
def test_parts_are_the_pixels_of_the_stock_pipeline(tiled: bool) -> None:
    pipeline = tiny_pipeline()
    if tiled:
        pipeline.vae.enable_tiling(16, 16, 12, 12)
    parts = list(decode(pipeline, latents(), SHAPE))
    assert [len(part) for part in parts] == ([17] if tiled else [1, 4, 4, 4, 4])
    assert np.array_equal(np.concatenate(parts), stock_frames(pipeline, latents()))


def test_small_clips_are_decoded_at_once_and_differ_by_rounding() -> None:
    pipeline = tiny_pipeline()
    (frames,) = decode(pipeline, latents(), SHAPE)
    assert np.abs(frames.astype(int) - stock_frames(pipeline, latents())).max() <= 1


def test_small_frames_of_a_long_clip_are_decoded_several_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = tiny_pipeline()
    monkeypatch.setattr(wan, "_WHOLE_PIXELS", 32 * 48 * 16)  # half of it: eight frames
    parts = list(decode(pipeline, latents(), SHAPE))
    assert [len(part) for part in parts] == [1, 8, 8]
    assert np.abs(np.concatenate(parts).astype(int) - stock_frames(pipeline, latents())).max() <= 1
    (one,) = decode(pipeline, latents()[:, :, :1], (32, 48, 1000))
    assert len(one) == 1


def test_the_decoder_is_as_it_was_after_a_clip_that_a_cpu_decodes_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = tiny_pipeline()
    stock = stock_frames(pipeline, latents())
    monkeypatch.setattr(wan, "_WHOLE_PIXELS", 32 * 48 * 16)
    parts = decode(pipeline, latents(), SHAPE)
    next(parts)
    convolution = pipeline.vae.decoder.conv_in
    assert convolution.weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert "forward" in vars(convolution)
    with lean(pipeline.vae):
        pass
    assert len(list(parts)) == 2
    for module in pipeline.vae.decoder.modules():
        assert "forward" not in vars(module)
        assert not getattr(module, "inplace", False)
        assert all(parameter.is_contiguous() for parameter in module.parameters())
    assert np.array_equal(stock_frames(pipeline, latents()), stock)


@pytest.mark.parametrize("chunked", [False, True])
def test_in_bfloat16_fewer_passes_round_as_much_as_the_stock_blocks(chunked: bool) -> None:
    pipeline = tiny_pipeline()

    def run(clip: torch.Tensor) -> torch.Tensor:
        return torch.cat([*decode_chunks(pipeline.vae, clip)], 2) if chunked else decode_raw(pipeline.vae, clip)

    with torch.no_grad():
        exact = run(latents())
        pipeline.vae.bfloat16()
        stock = run(latents().bfloat16()).float()
        with lean(pipeline.vae):
            found = run(by_channels(latents().bfloat16())).float()
    assert not torch.equal(found, stock)
    assert float((found - exact).norm()) < 1.2 * float((stock - exact).norm())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="of a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("in_chunks")
def test_a_gpu_decodes_in_chunks_with_fewer_passes(dtype: torch.dtype) -> None:
    pipeline = tiny_pipeline()
    exact = stock_frames(pipeline, latents()).astype(float)
    pipeline.vae.to("cuda", dtype)
    stock = stock_frames(pipeline, latents())
    parts = decode(pipeline, latents().to("cuda"), SHAPE)
    frames = [next(parts)]
    assert "forward" in vars(pipeline.vae.decoder.conv_in)
    frames += parts
    assert "forward" not in vars(pipeline.vae.decoder.conv_in)
    # Random weights make much of what TF32 and bfloat16 round: a pixel in hundreds is 79 of 255 away with TF32 alone.
    assert np.linalg.norm(np.concatenate(frames) - exact) < 1.3 * np.linalg.norm(stock - exact)


@pytest.mark.usefixtures("in_chunks")
def test_a_residual_decoder_gives_parts_too() -> None:
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    pipeline = tiny_pipeline()
    pipeline.register_modules(
        vae=AutoencoderKLWan(
            base_dim=4, decoder_base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, in_channels=12,
            out_channels=12, patch_size=2, is_residual=True, temperal_downsample=[False, True, True],
            latents_mean=[0.1] * 4, latents_std=[2.0] * 4, scale_factor_spatial=16,
        ).eval()
    )  # fmt: skip
    parts = list(decode(pipeline, latents(), (64, 96, 17)))
    assert [len(part) for part in parts] == [1, 4, 4, 4, 4]
    assert np.array_equal(np.concatenate(parts), stock_frames(pipeline, latents()))


@pytest.mark.parametrize("whole", [False, True])
def test_an_offloaded_decoder_is_fetched_first(monkeypatch: pytest.MonkeyPatch, whole: bool) -> None:
    """As `enable_model_cpu_offload` leaves it: elsewhere, until its hook is called."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    monkeypatch.setattr(wan, "_WHOLE_PIXELS", SHAPE[0] * SHAPE[1] * SHAPE[2] if whole else 0)
    pipeline = tiny_pipeline()
    expected = decode_whole(pipeline, latents(), SHAPE)
    away = {name: parameter.data for name, parameter in pipeline.vae.named_parameters()}
    for parameter in pipeline.vae.parameters():
        parameter.data = torch.zeros_like(parameter)

    class Fetch(ModelHook):
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            for name, parameter in module.named_parameters():
                parameter.data = away[name]
            return args, kwargs

    add_hook_to_module(pipeline.vae, Fetch())
    assert np.array_equal(decode_whole(pipeline, latents(), SHAPE), expected)


@pytest.mark.usefixtures("in_chunks")
def test_memory_that_runs_out_between_parts_begins_the_file_anew(
    tiny_wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = resolve(request(tiny_wan_folder, tmp_path / "good.mp4", prompt="red", vae_tiling=True))
    make.generate(plan, check_machine(plan))
    real, calls = make.decode, [0]

    def fails_after_a_part(*args: Any) -> Any:
        calls[0] += 1
        parts = real(*args)
        yield next(parts)
        if calls[0] == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        yield from parts

    monkeypatch.setattr(make, "decode", fails_after_a_part)
    plan = resolve(request(tiny_wan_folder, tmp_path / "x.mp4", prompt="red"))
    (result,) = make.generate(plan, check_machine(plan))
    assert result.record["retries"] == [{"stage": "decode", "reason": "out of memory", "with": "tiling"}]
    assert np.array_equal(read_clip(tmp_path / "x.mp4"), read_clip(tmp_path / "good.mp4"))
    assert tree(tmp_path) == ["good.json", "good.mp4", "x.json", "x.mp4"]
