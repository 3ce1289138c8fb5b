"""Pipelines of diffusers that are not supported, each with the reason, from the code of diffusers 0.42."""

from __future__ import annotations

_FRAMEPACK = (
    "it makes a clip in sections of a few latent frames, and each attends to a history of earlier frames at three "
    "resolutions, which is no grid of frames"
)
_HELIOS = (
    "it makes a clip in chunks, and each attends to a history of earlier frames at three resolutions, whose keys it "
    "scales by head, which is no grid of frames"
)
_FAR = "its attention is causal in chunks of frames, with a block mask and a cache of earlier keys"
_ANIMATE = (
    "it makes a clip in segments from a pose video and a face video that other programs prepare, which no flag of "
    "this tool gives"
)
_ANIMATE_2 = "it attends through a block mask, and to a cache of the keys of its reference"

UNFIT: dict[str, str] = {
    "HunyuanVideoFramepackPipeline": _FRAMEPACK,
    "HeliosPipeline": _HELIOS,
    "HeliosPyramidPipeline": _HELIOS,
    "AnyFlowFARPipeline": _FAR,
    "WanAnimatePipeline": _ANIMATE,
    "WanAnimate2ModularPipeline": _ANIMATE_2,
}
"""Class of a pipeline -> why it is not supported, as the end of a sentence."""
