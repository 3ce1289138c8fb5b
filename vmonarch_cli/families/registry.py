"""The transformer classes that vmonarch knows, and the family of each; each family is in the file of its name."""

from __future__ import annotations

from typing import Any

from vmonarch_cli.families.allegro import ALLEGRO
from vmonarch_cli.families.anyflow import ANYFLOW
from vmonarch_cli.families.base import Family, ForwardInputs
from vmonarch_cli.families.cogvideox import COGVIDEOX
from vmonarch_cli.families.cosmos import COSMOS_25
from vmonarch_cli.families.hunyuan import HUNYUAN_VIDEO, HUNYUAN_VIDEO_15
from vmonarch_cli.families.kandinsky import KANDINSKY_5, KANDINSKY_6
from vmonarch_cli.families.ltx import LTX, LTX2
from vmonarch_cli.families.minimax import MINIMAX_H3
from vmonarch_cli.families.mochi import MOCHI
from vmonarch_cli.families.motif import MOTIF_VIDEO
from vmonarch_cli.families.wan import SKYREELS_V2, WAN, WAN_VACE
from vmonarch_cli.models.base import ModelEntry, PipelineFacts
from vmonarch_cli.models.catalogue import PIPELINES
from vmonarch_cli.text import with_article

FAMILIES: dict[str, Family] = {
    "WanTransformer3DModel": WAN,
    "WanVACETransformer3DModel": WAN_VACE,
    "SkyReelsV2Transformer3DModel": SKYREELS_V2,
    "HunyuanVideoTransformer3DModel": HUNYUAN_VIDEO,
    "HunyuanVideo15Transformer3DModel": HUNYUAN_VIDEO_15,
    "CogVideoXTransformer3DModel": COGVIDEOX,
    "LTXVideoTransformer3DModel": LTX,
    "LTX2VideoTransformer3DModel": LTX2,
    "MochiTransformer3DModel": MOCHI,
    "AllegroTransformer3DModel": ALLEGRO,
    "Kandinsky5Transformer3DModel": KANDINSKY_5,
    "Kandinsky6Transformer3DModel": KANDINSKY_6,
    "MotifVideoTransformer3DModel": MOTIF_VIDEO,
    "MiniMaxH3Transformer3DModel": MINIMAX_H3,
    "CosmosTransformer3DModel": COSMOS_25,
    "AnyFlowTransformer3DModel": ANYFLOW,
}


def facts_of(pipeline: Any) -> PipelineFacts:
    """The facts of a pipeline object's class; an image-to-video class of the same checkpoint has its sibling's."""
    name = type(pipeline).__name__
    if name in PIPELINES:
        return PIPELINES[name]
    return next(facts for facts in PIPELINES.values() if facts.image_pipeline == name)


def family_of(pipeline: Any) -> Family:
    """The family of a pipeline object, also of one that was loaded without its transformer."""
    return FAMILIES[facts_of(pipeline).transformer]


def forward_inputs(entry: ModelEntry) -> ForwardInputs:
    """What one forward of an entry's transformer takes; ValueError for a family that does not say."""
    forward = FAMILIES[PIPELINES[entry.pipeline].transformer].forward
    if forward is None:
        raise ValueError(f"what a forward of {with_article(entry.pipeline)} takes is not known")
    return forward
