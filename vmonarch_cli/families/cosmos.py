"""Cosmos-Predict 2.5: ``attn1`` sees only video tokens; ``attn2``, for text, stays stock.

Frames that are given are the first of the grid, as in the frames that are made. The checks of its licence (the
package cosmos_guardrail) run as in the pipeline's own call: on the prompt before it is encoded, on the frames before
anyone gets them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from vmonarch_cli.attention.base import MonarchProcessor, heads_of
from vmonarch_cli.errors import InputError, NonFiniteError, RefusedError
from vmonarch_cli.families.base import Family, ForwardInputs, LatentClip, Shape, layers
from vmonarch_cli.families.rotary import turned_by_halves
from vmonarch_cli.families.wan import decode_wan
from vmonarch_cli.models.base import ModelEntry


class CosmosMonarchProcessor(MonarchProcessor):
    """CosmosAttnProcessor2_0 for ``attn1``."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """hidden_states (B, N, channels) -> (B, N, channels)."""
        self.refuse("CosmosMonarchProcessor", encoder_hidden_states, attention_mask)
        query, key, value = heads_of(attn, attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states))
        query, key = attn.norm_q(query), attn.norm_k(key)
        if image_rotary_emb is not None:
            query = _apply_rotary(query, *image_rotary_emb)
            key = _apply_rotary(key, *image_rotary_emb)

        out = self.attend(query, key, value).flatten(2, 3).type_as(query)
        result: torch.Tensor = attn.to_out[1](attn.to_out[0](out))
        return result


def _apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x (B, N, heads, D) by halves of the channels; the tables are (N, D), in float32."""
    return turned_by_halves(x.float(), cos, sin).to(x.dtype)


def _missing() -> str | None:
    """Which package is not there that the model cannot do without."""
    from diffusers.models.transformers import transformer_cosmos
    from diffusers.pipelines.cosmos import pipeline_cosmos2_5_predict as own

    if own.CosmosSafetyChecker.__module__ == own.__name__:  # diffusers has one in its place that only raises
        return "cosmos_guardrail, the safety checks that its licence asks for"
    return None if hasattr(transformer_cosmos, "transforms") else "torchvision"


def _check_prompt(pipeline: Any, text: str) -> None:
    """InputError when the safety checks refuse a prompt."""
    pipeline.safety_checker.to(pipeline._execution_device)
    if not pipeline.safety_checker.check_text_safety(text):
        raise InputError("the safety checks of this Cosmos model refuse the prompt: word it otherwise")


@contextmanager
def _adjusted(pipeline: Any, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A first frame is given as a video of one frame, which is the same to the model; it then needs no torchvision."""
    given = dict(arguments)
    image = given.pop("image", None)
    if image is not None:
        given |= {"video": [image], "num_latent_conditional_frames": 1}
    yield given


def _decode(pipeline: Any, latents: torch.Tensor, shape: Shape | None) -> Iterator[torch.Tensor]:
    """All frames together: the safety checks see the whole clip, and may change it (they blur faces)."""
    parts = (
        pipeline.video_processor.postprocess_video(part, output_type="np")[0]
        for part in decode_wan(pipeline, latents, shape)
    )
    frames = np.concatenate([_in_8_bits(part) for part in parts])
    pipeline.safety_checker.to(pipeline._execution_device)
    checked = pipeline.safety_checker.check_video_safety(frames)
    if checked is None:
        raise RefusedError("the safety checks of this Cosmos model refuse the frames, and no clip was written")
    found = torch.from_numpy(np.ascontiguousarray(checked)).to(latents.device)
    yield found.permute(3, 0, 1, 2)[None].float() / 255 * 2 - 1


def _in_8_bits(part: Any) -> Any:
    """Frames (f, height, width, 3) from 0 to 1 as the pipeline shows them to its checks."""
    if not np.isfinite(part).all():
        raise NonFiniteError("decoded frames are not finite, after the last step, and no clip was written")
    return (part * 255).astype(np.uint8)


# A forward from an entry alone


def _inputs(entry: ModelEntry, clip: LatentClip, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """No frame is given, and nothing is padding: see `transformer_config` of `vmonarch_cli/models/cosmos.py`."""
    return {"condition_mask": torch.zeros(1, 2, clip.frames, clip.height, clip.width, device=device, dtype=dtype)}


COSMOS_25 = Family(
    {"CosmosAttnProcessor2_0": CosmosMonarchProcessor},
    layers("transformer_blocks.N.attn1"),
    _decode,
    missing=_missing,
    check_prompt=_check_prompt,
    adjusted=_adjusted,
    plain_calls=True,
    forward=ForwardInputs(others=_inputs, timestep=lambda sigma: sigma, timed_frames=True),
)
