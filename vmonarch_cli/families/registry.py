"""The transformer classes that can be swapped; each family's processors are in the file of its name."""

from __future__ import annotations

from vmonarch_cli.attention.base import Family, MonarchProcessor
from vmonarch_cli.families.allegro import ALLEGRO
from vmonarch_cli.families.cogvideox import COGVIDEOX
from vmonarch_cli.families.hunyuan import HUNYUAN_VIDEO, HUNYUAN_VIDEO_15
from vmonarch_cli.families.kandinsky import KANDINSKY_5
from vmonarch_cli.families.ltx import LTX, LTX2
from vmonarch_cli.families.mochi import MOCHI
from vmonarch_cli.families.motif import MOTIF_VIDEO
from vmonarch_cli.families.wan import SKYREELS_V2, WAN, WAN_VACE

__all__ = ["FAMILIES", "Family", "MonarchProcessor"]

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
    "MotifVideoTransformer3DModel": MOTIF_VIDEO,
}
