"""MiniMax-H3: every block attends over one packed sequence of text, given frames, sound and the video that is made.

The rows of that video run structured; all others are exact for it, and are exact themselves. Where they are is read off
the arguments of the forward. The token refiner attends over the text alone and stays stock.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from vmonarch_cli.attention.base import MonarchProcessor, heads_of, project
from vmonarch_cli.attention.joint import Packed
from vmonarch_cli.families.base import Family, ForwardInputs, LatentClip, Shape, at_once, layers, mean_and_std, run_vae
from vmonarch_cli.families.raster import raster_grid
from vmonarch_cli.families.rotary import turned_by_halves
from vmonarch_cli.models.base import ModelEntry

_VIDEO_TAG, _TEXT_TAG, _AUDIO_TAG = 0, 1, 2
"""What `token_tags` of the transformer's forward holds."""


class MiniMaxH3MonarchProcessor(MonarchProcessor):
    """MiniMaxH3AttnProcessor of the transformer's blocks."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """hidden_states (B, rows, channels) -> (B, rows, channels)."""
        self.refuse("MiniMaxH3MonarchProcessor", attention_mask)
        query, key, value = heads_of(attn, *project(attn, hidden_states))
        query, key = attn.norm_q(query), attn.norm_k(key)
        if rotary_emb is not None:
            query = _apply_rotary(query, *rotary_emb)
            key = _apply_rotary(key, *rotary_emb)

        out = self.attend(query, key, value).flatten(2, 3).type_as(query)
        result: torch.Tensor = attn.to_out[1](attn.to_out[0](out))
        return result


def _apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of the first channels of x (B, rows, heads, D); the tables are (rows, channels)."""
    turned, kept = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    turned = turned_by_halves(turned, cos.to(x.dtype), sin.to(x.dtype))
    return torch.cat((turned, kept), dim=-1).contiguous()


def find_video(
    video_indices: torch.Tensor,
    timestep: torch.Tensor,
    timestep_indices: torch.Tensor,
    token_tags: torch.Tensor,
    position_ids: torch.Tensor,
) -> Packed:
    """Where the video that is made is in a packed sequence, from arguments of the transformer's forward (their shapes
    are documented there).

    Of the video's rows those at the lowest timestep are made: given frames are held at 0.999 or above, and 1 is clean.
    They must lie together, in raster order of a whole grid by their positions. Where they do not, the grid is one
    frame of all of them without any other rows, which fits no call, so that it runs dense and is counted so.
    """
    rows, indices = video_indices.cpu(), timestep_indices.cpu()
    times = timestep.cpu()[indices[rows]]
    made = rows[times == times.min()]
    count = len(made)
    first = int(made[0])
    together = bool(torch.equal(made, torch.arange(first, first + count)))
    grid = None
    if together and bool((token_tags.cpu()[first : first + count] == _VIDEO_TAG).all()):
        grid = raster_grid(position_ids[first : first + count].cpu())
    if grid is None:
        return Packed((1, 1, count))
    return Packed(grid, before=first, others=len(indices) - count)


def _packed(transformer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Packed:
    bound = inspect.signature(type(transformer).forward).bind_partial(transformer, *args, **kwargs).arguments
    return find_video(**{name: bound[name] for name in inspect.signature(find_video).parameters})


@contextmanager
def _adjusted(pipeline: Any, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A step is a forward here as everywhere: the pipeline counts the ends of its steps, of which there is one more."""
    yield {**arguments, "num_inference_steps": arguments["num_inference_steps"] + 1}


def _decode(pipeline: Any, latents: torch.Tensor, shape: Shape | None) -> torch.Tensor:
    """From 0 to 1, as this pipeline's own processor takes frames."""
    mean, std = mean_and_std(pipeline, latents)
    frames = run_vae(pipeline, latents * std + mean).float()
    mean = frames.new_tensor(pipeline.pixel_mean).view(1, -1, 1, 1, 1)
    std = frames.new_tensor(pipeline.pixel_std).view(1, -1, 1, 1, 1)
    return (frames * std + mean).clamp(0, 1)


def _decode_sound(pipeline: Any, latents: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Latents (1, channels, C, length): the decoder knows one channel, and takes two as two samples."""
    config = pipeline.audio_vae.config
    mean, std = (latents.new_tensor(values).view(1, -1, 1) for values in (config.latents_mean, config.latents_std))
    samples = pipeline.audio_vae.decode(latents[0] * std + mean, return_dict=False)[0]
    return samples.float().permute(1, 0, 2), config.sampling_rate


def read_processor(folder: Path) -> Any:
    """The processor of a model's folder. transformers has none without torchvision, which only reference videos need:
    there it is one of pictures alone, which gives the same tokens.
    """
    import transformers

    kind: Any = transformers.Qwen3VLProcessor if find_spec("torchvision") else pictures_alone()
    return kind.from_pretrained(str(folder), local_files_only=True)


def pictures_alone() -> Any:
    """The class of a Qwen3VLProcessor without the part for videos."""
    from transformers import ProcessorMixin

    class PictureProcessor(ProcessorMixin):  # type: ignore[misc]
        def __init__(self, image_processor: Any = None, tokenizer: Any = None, **settings: Any) -> None:
            self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
            self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids(
                [self.image_token, self.video_token]
            )
            super().__init__(image_processor, tokenizer, chat_template=settings.get("chat_template"))

    return PictureProcessor


# A forward from an entry alone


def _rows(entry: ModelEntry, clip: LatentClip) -> tuple[int, ...]:
    """Latents are given as the rows of the sequence."""
    p_t, p_h, p_w = entry.patch
    count = clip.frames // p_t * (clip.height // p_h) * (clip.width // p_w)
    return 1, count, entry.latent_channels * p_t * p_h * p_w


def _inputs(entry: ModelEntry, clip: LatentClip, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """A prompt of the length that a profile has, the clip's sound, and no given frame."""
    from diffusers.modular_pipelines.minimax_h3.before_denoise import MiniMaxH3PrepareLayoutStep

    chunks, packed = entry.chunks, entry.packed
    if chunks is None or packed is None:
        raise ValueError(f"{entry.alias} says nothing of its packed sequence")
    before = (clip.frames + chunks.dropped - chunks.latents) // chunks.latents
    sound = packed.sound_rows(before * chunks.frames + chunks.latents)
    positions, tags, video, audio, text, _, _ = MiniMaxH3PrepareLayoutStep.build_packed_sequence(
        torch.full((entry.max_sequence_length,), _TEXT_TAG),
        clip.frames,
        clip.height,
        clip.width,
        sound // packed.sound_channels,
        entry.patch,
        packed.sound_channels,
        _AUDIO_TAG,
        _VIDEO_TAG,
    )
    layout = {
        "position_ids": positions,
        "token_tags": tags,
        "video_indices": video,
        "audio_indices": audio,
        "text_indices": text,
        "timestep_indices": torch.zeros_like(tags),
    }
    found = {name: tensor.to(device) for name, tensor in layout.items()}
    return {**found, "audio_hidden_states": torch.zeros(1, sound, packed.sound_width, device=device, dtype=dtype)}


MINIMAX_H3 = Family(
    {"MiniMaxH3AttnProcessor": MiniMaxH3MonarchProcessor},
    layers("transformer_blocks.N.attn"),
    at_once(_decode),
    packed=_packed,
    adjusted=_adjusted,
    decode_sound=_decode_sound,
    readers={"processor": read_processor},
    parallel_obstacle="its sequence packs text and sound with the video, and diffusers would split all of it",
    forward=ForwardInputs(latents=_rows, others=_inputs, timestep=lambda sigma: 1 - sigma, towards_clip=True),
)
