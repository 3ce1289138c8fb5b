"""What decoding a clip takes at its peak, by VAE: families share them. No torch.

Figures of `tests/bench/decoder_memory.py`; the unit is one channel of a full-size frame. A decoder that works in chunks
of frames grows with the clip by little more than its frames; one that takes the whole clip at once grows in proportion.

How they grow is that of tensors alone: the decoders of diffusers 0.42 run at their true sizes without computing
anything. How much it is was measured on an H200 (bfloat16, torch 2.11, 33 frames, 31 of Mochi), where workspaces of
convolutions come on top: 10 to 22 % for Wan's two, 14 to 47 % for LTX-Video's and LTX-2's, 39 % for Mochi's tiles, none
for CogVideoX's and for Mochi's full frames. HunyuanVideo's two are without them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vmonarch_cli.models.base import ClipShape, ModelEntry

_FRAME = 4
"""Channels that a decoded frame takes: three in float32, and the frame in 8 bits."""


@dataclass(frozen=True)
class DecoderPeak:
    """The peak of one VAE in channels: a part that is always there, and one for each frame of the clip."""

    whole: tuple[float, float]
    """Decoding full frames."""
    tiled: tuple[float, float]
    """Decoding tiles, of a clip of frames of `pixels`. Tiles do not grow with the frames' size."""
    pixels: int
    vae_params: int
    """Of the VAE that was measured; its channels go with the square root."""

    def bytes(self, model: ModelEntry, shape: ClipShape, width: int) -> tuple[int, int]:
        """Peak bytes (full frames, tiles) of a clip of (height, width, frames); `width`: bytes of a value."""
        height, columns, frames = shape
        pixels, scale = height * columns, width * math.sqrt(model.vae_params / self.vae_params)
        whole = scale * pixels * _at(self.whole, frames)
        once, each = self.tiled
        tiles = scale * self.pixels * _at((once, max(0.0, each - _FRAME)), frames)
        return round(whole), round(min(whole, tiles + width * pixels * min(_FRAME, each) * frames))


def _at(line: tuple[float, float], frames: int) -> float:
    return line[0] + line[1] * frames


_WAN21 = DecoderPeak((5638, 3.1), (928, 4.35), 480 * 832, 126_892_531)
_WAN22 = DecoderPeak((5908, 3.05), (110, 14.0), 704 * 1280, 704_688_668)
_HUNYUAN = DecoderPeak((19_617, 4.05), (1414, 4.05), 720 * 1280, 246_478_803)  # 16 frames at a time
_HUNYUAN15 = DecoderPeak((1, 768.0), (22, 129.5), 480 * 832, 1_260_634_115)
_COGVIDEOX = DecoderPeak((22_893, 0.0), (5722, 2.65), 480 * 720, 215_583_907)  # two latent frames at a time
_MOCHI = DecoderPeak((3075, 903.9), (823, 148.6), 480 * 848, 459_748_611)
_LTX = DecoderPeak((63, 50.0), (45, 36.3), 512 * 704, 419_193_649)
_LTX2 = DecoderPeak((80, 58.1), (1, 13.0), 512 * 768, 1_222_479_601)

_BY_FAMILY = {
    "wan": (_WAN21, _WAN22),
    "skyreels-v2": (_WAN21,),
    "motif-video": (_WAN21,),
    "cosmos-2.5": (_WAN21,),
    "anyflow": (_WAN21,),
    "hunyuan-video": (_HUNYUAN,),
    "hunyuan-video-1.5": (_HUNYUAN15,),
    "kandinsky-5": (_HUNYUAN,),
    "cogvideox": (_COGVIDEOX,),
    "mochi": (_MOCHI,),
    "ltx-video": (_LTX,),
    "ltx-2": (_LTX2,),
}


def decoder_of(model: ModelEntry, family: str) -> DecoderPeak | None:
    """The measured VAE of a family (see `PipelineFacts.family`) that is nearest to a model's in size; None where none
    was measured, as of Allegro, which decodes in tiles of its own.
    """
    found = _BY_FAMILY.get(family)
    return None if found is None else min(found, key=lambda peak: abs(math.log(peak.vae_params / model.vae_params)))
