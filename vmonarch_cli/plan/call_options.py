"""What one structured call computes, from a preset. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vmonarch_cli.presets import Preset
from vmonarch_kernels.cost import band_with_refresh, is_exact
from vmonarch_kernels.spec import Options


@dataclass(frozen=True)
class CallOptions:
    """What one structured call computes; ``options_for`` makes it from a preset."""

    kernel: Options
    """For the kernels. With ``refresh`` the band covers every frame where every frame would be recomputed anyway."""
    exact: bool
    """The band covers every frame: the call is dense attention, has no L and keeps nothing."""
    warm: bool
    """The call starts from the L of an earlier one."""
    keeps_l: bool
    refresh: float
    shared_refresh: bool

    def cost(self) -> dict[str, Any]:
        """Keyword arguments of ``monarch_flops`` and ``monarch_bytes``."""
        return {"options": self.kernel, "warm": self.warm, "refresh": self.refresh}


def options_for(preset: Preset, frames: int, *, warm: bool = False) -> CallOptions:
    """What a structured call of ``frames`` latent frames computes under a preset.

    ``warm``: the L of an earlier call is at hand. The session, the profile and the cost count all ask here, so that
    what is measured and counted is what runs.
    """
    band = band_with_refresh(frames, preset.band, preset.refresh, first_frame=preset.first_frame)
    exact = is_exact(frames, band)
    keeps_l = preset.warm_start and not exact
    warm = warm and keeps_l
    return CallOptions(
        kernel=Options(1 if warm else preset.num_steps, preset.c_floor, preset.first_frame, band),
        exact=exact,
        warm=warm,
        keeps_l=keeps_l,
        refresh=0 if exact else preset.refresh,
        shared_refresh=preset.shared_refresh,
    )
