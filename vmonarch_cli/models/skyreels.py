"""SkyReels-V2 (not its diffusion-forcing variants): Wan 2.1's architecture with weights of its own."""

from __future__ import annotations

from vmonarch_cli.models import wan
from vmonarch_cli.models.base import Defaults, ModelEntry, PipelineFacts

_DEFAULTS = Defaults(
    height=720,
    width=1280,
    num_frames=121,
    fps=24,
    steps=50,
    guidance_scale=6.0,
    flow_shift=8.0,
    negative_prompt=wan.NEGATIVE_PROMPT,
)

T2V_14B = wan.WAN21_14B.model_copy(
    update={
        "video_pipeline": None,
        "alias": "skyreels-v2-t2v",
        "title": "SkyReels-V2-T2V-14B-720P",
        "family": "skyreels-v2",
        "pipeline": "SkyReelsV2Pipeline",
        "hub_id": "Skywork/SkyReels-V2-T2V-14B-720P-Diffusers",
        "aliases": ("skyreels-v2-t2v-14b-720p",),
        "licence": "Skywork",
        "defaults": _DEFAULTS,
    }
)

I2V_14B = wan.WAN21_I2V_720P.model_copy(
    update={
        "alias": "skyreels-v2-i2v",
        "title": "SkyReels-V2-I2V-14B-720P",
        "family": "skyreels-v2",
        "pipeline": "SkyReelsV2ImageToVideoPipeline",
        "hub_id": "Skywork/SkyReels-V2-I2V-14B-720P-Diffusers",
        "aliases": ("skyreels-v2-i2v-14b-720p",),
        "licence": "Skywork",
        "defaults": _DEFAULTS.model_copy(update={"guidance_scale": 5.0, "flow_shift": 5.0}),
    }
)

ENTRIES: tuple[ModelEntry, ...] = (T2V_14B, I2V_14B)

_TEXT = ("prompt_embeds", "negative_prompt_embeds")
_CLASS = "SkyReelsV2Transformer3DModel"

_CACHES = ("pab", "taylorseer")  # first-block does not know what these blocks return

PIPELINES = (
    PipelineFacts("SkyReelsV2Pipeline", "skyreels-v2", _CLASS, _TEXT, wan.figures, caches=_CACHES, fuses=True),
    PipelineFacts(
        "SkyReelsV2ImageToVideoPipeline",
        "skyreels-v2",
        _CLASS,
        _TEXT,
        wan.figures,
        takes_image=True,
        caches=_CACHES,
        fuses=True,
    ),
)
