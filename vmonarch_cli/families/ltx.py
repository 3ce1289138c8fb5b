"""LTX-Video and LTX-2: ``attn1`` sees only video tokens. LTX-2's sound and cross-attentions stay stock."""

from __future__ import annotations

import inspect
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from vmonarch_cli.attention.base import MonarchProcessor, heads_of
from vmonarch_cli.attention.joint import Packed
from vmonarch_cli.families.base import Family, Shape, at_once, layers, patch_of, run_vae, stock_plan
from vmonarch_cli.families.fusing import impl_of, normed_and_rotated
from vmonarch_cli.families.ltx_blocks import LTX_BLOCKS
from vmonarch_cli.families.raster import raster_grid

Rotary = tuple[torch.Tensor, torch.Tensor]


class LTXMonarchProcessor(MonarchProcessor):
    """LTXVideoAttnProcessor for ``attn1``."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> torch.Tensor:
        """hidden_states (B, N, channels) -> (B, N, channels)."""
        self.refuse("LTXMonarchProcessor", encoder_hidden_states, attention_mask)
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        if impl_of(attn) is not None:
            tables = None if image_rotary_emb is None else heads_of(attn, *image_rotary_emb)
            query, key = normed_and_rotated(attn, query, key, tables)
            (value,) = heads_of(attn, value)
        else:
            query, key = attn.norm_q(query), attn.norm_k(key)
            if image_rotary_emb is not None:
                from diffusers.models.transformers.transformer_ltx import apply_rotary_emb

                query = apply_rotary_emb(query, image_rotary_emb)
                key = apply_rotary_emb(key, image_rotary_emb)
            query, key, value = heads_of(attn, query, key, value)

        out = self.attend(query, key, value).flatten(2, 3).to(query.dtype)
        result: torch.Tensor = attn.to_out[1](attn.to_out[0](out))
        return result


class LTX2MonarchProcessor(MonarchProcessor):
    """LTX2AudioVideoAttnProcessor for the video's ``attn1``."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        query_rotary_emb: Rotary | None = None,
        key_rotary_emb: Rotary | None = None,
    ) -> torch.Tensor:
        """hidden_states (B, N, channels) -> (B, N, channels)."""
        self.refuse("LTX2MonarchProcessor", encoder_hidden_states, attention_mask)
        out = self._attend(attn, hidden_states, attn.to_v(hidden_states), query_rotary_emb, key_rotary_emb)
        return _gate_and_project(attn, hidden_states, out)

    def _attend(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        value: torch.Tensor,
        query_rotary_emb: Rotary | None,
        key_rotary_emb: Rotary | None,
    ) -> torch.Tensor:
        query = attn.norm_q(attn.to_q(hidden_states))
        key = attn.norm_k(attn.to_k(hidden_states))
        if query_rotary_emb is not None:
            query = _rotate(attn, query, query_rotary_emb)
            key = _rotate(attn, key, query_rotary_emb if key_rotary_emb is None else key_rotary_emb)
        query, key, value = heads_of(attn, query, key, value)
        return self.attend(query, key, value).flatten(2, 3).to(query.dtype)


class LTX2PerturbedMonarchProcessor(LTX2MonarchProcessor):
    """LTX2PerturbedAttnProcessor (LTX-2.3): some calls or samples skip the attention and keep the values."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        query_rotary_emb: Rotary | None = None,
        key_rotary_emb: Rotary | None = None,
        perturbation_mask: torch.Tensor | None = None,
        all_perturbed: bool | None = None,
    ) -> torch.Tensor:
        """hidden_states (B, N, channels) -> (B, N, channels)."""
        self.refuse("LTX2PerturbedMonarchProcessor", encoder_hidden_states, attention_mask)
        value = attn.to_v(hidden_states)
        if all_perturbed is None:
            all_perturbed = perturbation_mask is not None and bool(torch.all(perturbation_mask == 0))
        if all_perturbed:
            return _gate_and_project(attn, hidden_states, value)
        out = self._attend(attn, hidden_states, value, query_rotary_emb, key_rotary_emb)
        if perturbation_mask is not None:
            out = torch.lerp(value, out, perturbation_mask)
        return _gate_and_project(attn, hidden_states, out)


def _rotate(attn: Any, x: torch.Tensor, freqs: Rotary) -> torch.Tensor:
    from diffusers.models.transformers import transformer_ltx2

    if attn.rope_type == "interleaved":
        rotated: torch.Tensor = transformer_ltx2.apply_interleaved_rotary_emb(x, freqs)
    else:
        rotated = transformer_ltx2.apply_split_rotary_emb(x, freqs)
    return rotated


def _gate_and_project(attn: Any, hidden_states: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Per-head gates, from the layer's input, and the output projection of out (B, N, channels)."""
    if attn.to_gate_logits is not None:
        gates = 2.0 * torch.sigmoid(attn.to_gate_logits(hidden_states))  # (B, N, heads); 1 where the logits are 0
        out = (out.unflatten(2, (attn.heads, -1)) * gates.unsqueeze(-1)).flatten(2, 3)
    result: torch.Tensor = attn.to_out[1](attn.to_out[0](out))
    return result


def _packed(transformer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Packed:
    """Latents come packed as tokens. Their shape comes beside them, and keyframes that are given stand behind the clip
    (LTX-2); or the place of every token comes beside them, and keyframes stand before the clip (LTX-Video).
    """
    bound = inspect.signature(type(transformer).forward).bind_partial(transformer, *args, **kwargs).arguments
    tokens: int = bound["hidden_states"].shape[1]
    if bound.get("num_frames") is None:
        return _placed(bound["video_coords"][0].T.cpu())
    p_t, p_h, p_w = patch_of(transformer.config)
    grid = bound["num_frames"] // p_t, bound["height"] // p_h, bound["width"] // p_w
    return Packed(grid, before=0, others=max(0, tokens - grid[0] * grid[1] * grid[2]))


def _placed(places: torch.Tensor) -> Packed:
    """The same of places (tokens, 3), in seconds and pixels: the clip is the one that begins at 0 in all three.

    Where it is no grid, the grid is of one token, which fits no call, so that it runs dense and is counted so.
    """
    begins = (places == 0).all(dim=1).nonzero()
    first = int(begins[0]) if len(begins) else 0
    grid = raster_grid(places[first:])
    return Packed((1, 1, 1)) if grid is None else Packed(grid, before=first, others=first)


def _decode(pipeline: Any, latents: torch.Tensor, shape: Shape | None) -> torch.Tensor:
    if shape is None:
        raise ValueError("LTX latents are packed as tokens: their shape must be given")
    height, width, num_frames = shape
    if latents.ndim == 3:  # LTXConditionPipeline unpacks them itself
        latents = pipeline._unpack_latents(
            latents,
            (num_frames - 1) // pipeline.vae_temporal_compression_ratio + 1,
            height // pipeline.vae_spatial_compression_ratio,
            width // pipeline.vae_spatial_compression_ratio,
            pipeline.transformer_spatial_patch_size,
            pipeline.transformer_temporal_patch_size,
        )
    vae = pipeline.vae
    latents = pipeline._denormalize_latents(latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)
    # The pipeline rounds to the transformer's dtype; one that was loaded only to decode has no transformer to ask.
    dtype = pipeline.loaded_for_decoding if pipeline.transformer is None else pipeline.transformer.dtype
    latents = latents.to(dtype).to(vae.dtype)
    return run_vae(pipeline, latents, _decode_timestep(pipeline, latents))


def _decode_2(pipeline: Any, latents: torch.Tensor, shape: Shape | None) -> torch.Tensor:
    """The pipeline gives these latents unpacked and denormalised."""
    latents = latents.to(pipeline.vae.dtype)
    return run_vae(pipeline, latents, _decode_timestep(pipeline, latents))


def _decode_sound(pipeline: Any, latents: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The pipeline gives these latents unpacked and denormalised, too."""
    spectrogram = pipeline.audio_vae.decode(latents.to(pipeline.audio_vae.dtype), return_dict=False)[0]
    return pipeline.vocoder(spectrogram), pipeline.vocoder.config.output_sampling_rate


def _decode_timestep(pipeline: Any, latents: torch.Tensor) -> torch.Tensor | None:
    """The pipelines' default, 0, at which a decoder that knows noise gets none."""
    return latents.new_zeros(latents.shape[0]) if pipeline.vae.config.timestep_conditioning else None


def _parallel_plan(transformer: Any) -> dict[str, Any]:
    """The plan of diffusers without the text.

    In diffusers 0.42 the plan splits the text, too, and fails: the mask of the text has all heads where each process
    has a part of them. The timesteps are one for each token when a clip continues a first frame.
    """
    plan = stock_plan(transformer)
    of_video = plan[""]["hidden_states"]  # (B, tokens, channels)
    plan[""] = {"hidden_states": of_video, "timestep": replace(of_video, expected_dims=2)}
    return plan


_WITHOUT_GUIDANCE: dict[str, float] = {
    "stg_scale": 0.0,
    "audio_stg_scale": 0.0,
    "modality_scale": 1.0,
    "audio_modality_scale": 1.0,
    "audio_guidance_scale": 1.0,
}


@contextmanager
def _adjusted_2(pipeline: Any, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Compress a first frame as the pipeline would, without the PyAV that it needs for that; guidance that is off is
    off for sound, too, and so are the other two kinds, which the pipeline has on by default.
    """
    if arguments.get("guidance_scale", 2) <= 1:
        arguments = {**_WITHOUT_GUIDANCE, **arguments}
    if "image" in arguments and "image_crf" not in arguments:
        from diffusers.pipelines.ltx2.utils import resolve_default_image_crf

        image = compressed(arguments["image"], resolve_default_image_crf(pipeline.text_encoder))
        arguments = {**arguments, "image": image, "image_crf": 0}
    yield arguments


def compressed(image: Any, quality: int) -> Any:
    """The image as a frame of an H.264 video of this CRF, such as LTX-2 was trained to continue.

    Its pipeline does the same with PyAV; the ffmpeg that clips are written with does not need another package.
    """
    import imageio_ffmpeg
    from PIL import Image

    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24"]
    encode = ["-c:v", "libx264", "-crf", str(quality), "-preset", "veryfast", "-pix_fmt", "yuv420p", "-f", "h264"]
    size = f"{image.width}x{image.height}"

    def ffmpeg(content: bytes, *arguments: str) -> bytes:
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", *arguments, "-"]
        return subprocess.run(command, input=content, capture_output=True, check=True).stdout  # noqa: S603 - fixed

    video = ffmpeg(image.convert("RGB").tobytes(), *raw, "-s", size, "-i", "-", *encode)
    return Image.frombytes("RGB", image.size, ffmpeg(video, "-f", "h264", "-i", "-", *raw))


def _conditions(pipeline: Any, options: dict[str, Any]) -> dict[str, Any]:
    """A first frame or the beginning of the clip for LTXConditionPipeline."""
    given = _of_conditions(pipeline, options)
    if given is None:
        return options
    from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition

    rest, image, video = given
    return {**rest, "conditions": [LTXVideoCondition(image=image, video=video)]}


def _conditions_2(pipeline: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The same for LTX2ConditionPipeline; a single frame is compressed as for LTX2ImageToVideoPipeline."""
    given = _of_conditions(pipeline, options)
    if given is None:
        return options
    from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
    from diffusers.pipelines.ltx2.utils import resolve_default_image_crf

    rest, image, video = given
    if image is not None:
        image = compressed(image, resolve_default_image_crf(pipeline.text_encoder))
    return {**rest, "conditions": [LTX2VideoCondition(frames=video if image is None else image, crf=0)]}


def _of_conditions(pipeline: Any, options: dict[str, Any]) -> tuple[dict[str, Any], Any, Any] | None:
    """(other options, image, video) where one of the two is given to a pipeline that takes conditions, else None."""
    image, video = options.get("image"), options.get("video")
    takes = "conditions" in inspect.signature(type(pipeline).__call__).parameters
    if not takes or (image is None and video is None):
        return None
    rest = {name: value for name, value in options.items() if name not in ("image", "video", "strength")}
    return rest, image, video


LTX = Family(
    {"LTXVideoAttnProcessor": LTXMonarchProcessor},
    layers("transformer_blocks.N.attn1"),
    at_once(_decode),
    packed=_packed,
    conditions=_conditions,
    parallel_plan=_parallel_plan,
    fused=LTX_BLOCKS,
)
LTX2 = Family(
    {
        "LTX2AudioVideoAttnProcessor": LTX2MonarchProcessor,
        "LTX2PerturbedAttnProcessor": LTX2PerturbedMonarchProcessor,
    },
    layers("transformer_blocks.N.attn1"),
    at_once(_decode_2),
    packed=_packed,
    conditions=_conditions_2,
    adjusted=_adjusted_2,
    decode_sound=_decode_sound,
    parallel_obstacle="its sound attends to all of the video, of which diffusers' plan gives each process a part",
)
