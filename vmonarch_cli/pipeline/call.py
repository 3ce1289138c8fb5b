"""What the pipelines of all families have in common for a run: text in, the denoising call, frames out."""

from __future__ import annotations

import inspect
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vmonarch_cli.errors import NonFiniteError
from vmonarch_cli.families.wan_vae import decode_raw, is_plain
from vmonarch_cli.models.base import PipelineFacts
from vmonarch_cli.models.catalogue import PIPELINES

Frames = npt.NDArray[np.uint8]
Embeddings = dict[str, Any]
"""Encoded text, by the names under which the pipeline's call takes it; the prompt itself where that call encodes it."""
Shape = tuple[int, int, int]
"""Height and width in pixels, frames."""


def facts_of(pipeline: Any) -> PipelineFacts:
    """The facts of a pipeline object's class; an image-to-video class of the same checkpoint has its sibling's."""
    name = type(pipeline).__name__
    if name in PIPELINES:
        return PIPELINES[name]
    return next(facts for facts in PIPELINES.values() if facts.image_pipeline == name)


@torch.no_grad()
def encode(pipeline: Any, prompt: str, negative_prompt: str, guidance_scale: float, max_tokens: int) -> Embeddings:
    """Text embeddings of the prompt and, where guidance uses one, of the negative prompt."""
    facts, guided = facts_of(pipeline), guidance_scale > 1.0
    if facts.text_with_image:
        return {"prompt": prompt, "max_sequence_length": max_tokens}

    def call(**given: Any) -> Embeddings:
        values = pipeline.encode_prompt(**_accepted(pipeline.encode_prompt, max_sequence_length=max_tokens, **given))
        return dict(zip(facts.text, values, strict=True))

    if facts.negative == "together":
        return call(prompt=prompt, negative_prompt=negative_prompt, do_classifier_free_guidance=guided)
    found = call(prompt=_listed(pipeline, prompt))
    if facts.negative == "apart" and guided:
        negative = call(prompt=_listed(pipeline, negative_prompt))
        found |= {f"negative_{name}": value for name, value in negative.items()}
    return found


def _listed(pipeline: Any, prompt: str) -> str | list[str]:
    """Kandinsky goes through the characters of a bare string."""
    return [prompt] if facts_of(pipeline).family == "kandinsky-5" else prompt


def call(pipeline: Any, embeddings: Embeddings, shape: Shape, **options: Any) -> torch.Tensor:
    """Latents of the pipeline's own denoising loop; options that its call does not know are left out.

    `fps` goes to the pipelines whose model wants to know it, and guidance to the guider of those that have one.
    """
    height, width, num_frames = shape
    if facts_of(pipeline).guider:
        pipeline.guider = pipeline.guider.new(guidance_scale=options["guidance_scale"])
    given = {**options, "frame_rate": options.get("fps"), "height": height, "width": width, "num_frames": num_frames}
    known = _accepted(type(pipeline).__call__, **given)
    if "image" in known and "image_crf" not in known and facts_of(pipeline).family == "ltx-2":
        from diffusers.pipelines.ltx2.utils import resolve_default_image_crf

        known["image"] = compressed(known["image"], resolve_default_image_crf(pipeline.text_encoder))
        known["image_crf"] = 0
    if "negative_prompt" in inspect.signature(type(pipeline).__call__).parameters:
        known["negative_prompt"] = None  # Allegro's default is a prompt, and it takes one of the two
    with _own_size(pipeline):
        # Motif's image pipeline has no default for the prompt, which the embeddings replace.
        latents: torch.Tensor = pipeline(**{"prompt": None, **embeddings}, **known, output_type="latent").frames
    return latents


@contextmanager
def _own_size(pipeline: Any) -> Iterator[None]:
    """HunyuanVideo-1.5 takes no size with an image, but one of its own near the image's; here it is the image's,
    which has the clip's size already.
    """
    if "height" in inspect.signature(type(pipeline).__call__).parameters:
        yield
        return
    processor = pipeline.video_processor
    processor.calculate_default_height_width = lambda height, width, target_size: (height, width)
    try:
        yield
    finally:
        del processor.calculate_default_height_width


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


def takes_callback(pipeline: Any) -> bool:
    """Whether the pipeline calls back after each step."""
    return "callback_on_step_end" in inspect.signature(type(pipeline).__call__).parameters


def _accepted(function: Callable[..., Any], **given: Any) -> dict[str, Any]:
    known = inspect.signature(function).parameters
    return {name: value for name, value in given.items() if name in known and value is not None}


@torch.no_grad()
def decode(pipeline: Any, latents: torch.Tensor, shape: Shape | None = None) -> Frames:
    """Latents of `call` -> frames (frames, height, width, 3), uint8; the end of the pipeline's own call.

    shape: of the clip; CogVideoX 1.5, LTX and Allegro cannot do without. Raises NonFiniteError when the decoder makes
    a value that is not finite.
    """
    vae = pipeline.vae
    # An offloaded VAE is elsewhere until it runs.
    device = pipeline._execution_device if _is_offloaded(vae) else vae.device
    clip = _DECODERS[facts_of(pipeline).family](pipeline, latents.to(device), shape)
    if not torch.isfinite(clip).all():
        raise NonFiniteError("decoded frames are not finite, after the last step, and no clip was written")
    values = pipeline.video_processor.postprocess_video(clip, output_type="np")[0]
    pipeline.maybe_free_model_hooks()
    frames: Frames = (values * 255).round().astype(np.uint8)
    return frames


def _is_offloaded(module: Any) -> bool:
    from diffusers.hooks.group_offloading import _is_group_offload_enabled

    return hasattr(module, "_hf_hook") or _is_group_offload_enabled(module)


# A clip of so few pixels in all is decoded whole: chunk by chunk, as long clips must be, takes twice as long.
_WHOLE_PIXELS = 1 << 20

Decoder = Callable[[Any, torch.Tensor, Shape | None], torch.Tensor]


def _mean_and_std(pipeline: Any, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    config = pipeline.vae.config
    mean = latents.new_tensor(config.latents_mean).view(1, -1, 1, 1, 1)
    return mean, latents.new_tensor(config.latents_std).view(1, -1, 1, 1, 1)


def _run_vae(pipeline: Any, latents: torch.Tensor, *more: Any) -> torch.Tensor:
    clip: torch.Tensor = pipeline.vae.decode(latents, *more, return_dict=False)[0]
    return clip


def _wan(pipeline: Any, latents: torch.Tensor, shape: Shape | None) -> torch.Tensor:
    latents = latents.to(pipeline.vae.dtype)
    mean, std = _mean_and_std(pipeline, latents)
    # The pipeline divides by the reciprocal; so that frames are the same to the bit, so does this.
    latents = latents / (1.0 / std) + mean
    if shape is not None and shape[0] * shape[1] * shape[2] <= _WHOLE_PIXELS and is_plain(pipeline.vae):
        return decode_raw(pipeline.vae, latents).clamp(-1, 1)
    return _run_vae(pipeline, latents)


def _motif(pipeline: Any, latents: torch.Tensor, shape: Shape | None) -> torch.Tensor:
    latents = latents.to(pipeline.vae.dtype)
    mean, std = _mean_and_std(pipeline, latents)
    return _run_vae(pipeline, latents * std + mean)


def _scaled(pipeline: Any, latents: torch.Tensor, shape: Shape | None) -> torch.Tensor:
    return _run_vae(pipeline, latents.to(pipeline.vae.dtype) / pipeline.vae.config.scaling_factor)


def _kandinsky(pipeline: Any, latents: torch.Tensor, shape: Shape | None) -> torch.Tensor:
    return _scaled(pipeline, latents.permute(0, 4, 1, 2, 3), shape)


def _mochi(pipeline: Any, latents: torch.Tensor, shape: Shape | None) -> torch.Tensor:
    config = pipeline.vae.config
    if config.get("latents_mean") is None or config.get("latents_std") is None:
        return _run_vae(pipeline, (latents / config.scaling_factor).to(pipeline.vae.dtype))
    mean, std = _mean_and_std(pipeline, latents)
    return _run_vae(pipeline, (latents * std / config.scaling_factor + mean).to(pipeline.vae.dtype))


def _cogvideox(pipeline: Any, latents: torch.Tensor, shape: Shape | None) -> torch.Tensor:
    if shape is not None:  # 1.5 fills up its last temporal patch in front
        latents = latents[:, latents.shape[1] - ((shape[2] - 1) // pipeline.vae_scale_factor_temporal + 1) :]
    clip: torch.Tensor = pipeline.decode_latents(latents.to(pipeline.vae.dtype))
    return clip


def _allegro(pipeline: Any, latents: torch.Tensor, shape: Shape | None) -> torch.Tensor:
    clip: torch.Tensor = pipeline.decode_latents(latents.to(pipeline.vae.dtype))
    if shape is not None:
        height, width, num_frames = shape
        clip = clip[:, :, :num_frames, :height, :width]
    return clip


def _ltx(pipeline: Any, latents: torch.Tensor, shape: Shape | None) -> torch.Tensor:
    if shape is None:
        raise ValueError("LTX latents are packed as tokens: their shape must be given")
    height, width, num_frames = shape
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
    # Rounded as the transformer's own pipeline rounds; loaded to decode alone, it has no transformer to ask.
    dtype = pipeline.loaded_for_decoding if pipeline.transformer is None else pipeline.transformer.dtype
    latents = latents.to(dtype).to(vae.dtype)
    return _run_vae(pipeline, latents, _decode_timestep(pipeline, latents))


def _ltx2(pipeline: Any, latents: torch.Tensor, shape: Shape | None) -> torch.Tensor:
    """The pipeline gives these latents unpacked and denormalised."""
    latents = latents.to(pipeline.vae.dtype)
    return _run_vae(pipeline, latents, _decode_timestep(pipeline, latents))


def _decode_timestep(pipeline: Any, latents: torch.Tensor) -> torch.Tensor | None:
    """The pipelines' default, 0, at which a decoder that knows noise gets none."""
    return latents.new_zeros(latents.shape[0]) if pipeline.vae.config.timestep_conditioning else None


_DECODERS: dict[str, Decoder] = {
    "wan": _wan,
    "skyreels-v2": _wan,
    "hunyuan-video": _scaled,
    "hunyuan-video-1.5": _scaled,
    "cogvideox": _cogvideox,
    "ltx-video": _ltx,
    "ltx-2": _ltx2,
    "mochi": _mochi,
    "allegro": _allegro,
    "kandinsky-5": _kandinsky,
    "motif-video": _motif,
}
