"""The demo model that comes with the package; `vmonarch_cli/demo` trains it and holds its weights."""

from __future__ import annotations

from pathlib import Path

from vmonarch_cli.models.base import Defaults, LongClips, ModelEntry

WEIGHTS = Path(__file__).parent.parent / "demo" / "weights"

# Figures that the weights folder's own configs replace when it is there (see registry.find_model).
DEMO = ModelEntry(
    alias="demo",
    title="vmonarch demo",
    licence="Apache-2.0",
    video_pipeline="WanVideoToVideoPipeline",
    vae_spatial=4,
    heads=4,
    head_dim=64,
    layers=8,
    ffn_dim=1024,
    text_dim=128,
    max_sequence_length=32,
    transformer_params=9_000_000,
    text_encoder_params=500_000,
    vae_params=4_200_000,
    trained_sizes=((96, 96), (128, 128)),
    trained_frames=(17, 193),
    defaults=Defaults(
        height=96,
        width=96,
        num_frames=49,
        fps=16,
        steps=20,
        guidance_scale=4.0,
        flow_shift=6.0,
        dense_every=1,
        preset="fast",  # with its adapter nearer to dense than paper, for less work
    ),
    # Noise in every step corrects motions that an early step got wrong: of 128 prompts 95 % move as asked at 97 frames
    # and 88 % at 193 (dense), by the defaults 80 % at 193. Fewer steps leave that noise in the clip.
    long_clips=LongClips(num_frames=97, steps=20, sampler="dpm++sde", guidance_scale=2.5),
)
