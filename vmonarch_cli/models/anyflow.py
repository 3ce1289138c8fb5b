"""AnyFlow on Wan 2.1, distilled to few steps, which attends over the whole clip; the causal one is another class."""

from __future__ import annotations

from typing import Any

from vmonarch_cli.models.base import PipelineFacts
from vmonarch_cli.models.config import Config
from vmonarch_cli.models.wan import WAN21_14B, figures

ANYFLOW_14B = WAN21_14B.model_copy(
    update={
        "alias": "anyflow-14b",
        "title": "AnyFlow Wan2.1-T2V-14B",
        "family": "anyflow",
        "pipeline": "AnyFlowPipeline",
        "video_pipeline": None,
        "hub_id": "nvidia/AnyFlow-Wan2.1-T2V-14B-Diffusers",
        "aliases": ("anyflow",),
        "licence": "unknown",
        "transformer_params": 14_316_026_944,
        "defaults": WAN21_14B.defaults.model_copy(
            update={"height": 480, "width": 832, "steps": 4, "guidance_scale": 1.0, "flow_shift": None}
        ),
    }
)

ENTRIES = (ANYFLOW_14B,)


def _figures(config: Config, vae: Config) -> dict[str, Any]:
    return {**figures(config, vae), "latent_channels": config.whole("out_channels", 16)}


PIPELINES = (
    PipelineFacts(
        "AnyFlowPipeline",
        "anyflow",
        "AnyFlowTransformer3DModel",
        ("prompt_embeds", "negative_prompt_embeds"),
        _figures,
        guidance_by_batch=True,
        caches=(),  # its transformer has none of diffusers' caches
    ),
)
