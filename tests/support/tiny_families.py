"""One pipeline of random weights for every family, in its own diffusers format and small enough to run in a second."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from cosmos_checks import put_in_place

from vmonarch_cli.families.minimax import pictures_alone
from vmonarch_cli.pipeline.modular import hide_progress, is_modular

PROMPT = "a red circle moving left"
NEGATIVE = "a blue square"
_WORDS = [
    "<pad>",
    "</s>",
    "<unk>",
    "a",
    "red",
    "blue",
    "circle",
    "square",
    "moving",
    "left",
    "right",
    "Describe",
    "the",
]


@dataclass(frozen=True)
class Tiny:
    """A family's tiny pipeline and what a run of it must look like."""

    build: Callable[[], Any]
    transformer_class: str
    layers: int
    """Self-attention layers that must be swapped, of all transformers that a step uses."""
    forwards: int
    """Forwards of the transformer in a step with guidance: 1 where guidance is a batch of two, or embedded; 3 in LTX-2,
    which has two more kinds of guidance by default."""
    grid: tuple[int, int, int]
    height: int = 32
    width: int = 48
    num_frames: int = 17
    options: dict[str, Any] = field(default_factory=dict)
    """Of the pipeline's call, beside prompt, shape, steps and seed."""

    @property
    def guidance_by_batch(self) -> bool:
        """A step's forward has the samples of both prompts."""
        return self.forwards != 2 and "negative_prompt" in self.options


def latents_of(pipeline: Any, tiny: Tiny, *, steps: int = 2, seed: int = 0, **options: Any) -> torch.Tensor:
    """The pipeline's own call, up to the latents; HunyuanVideo-1.5 takes its size from the image, and a video has as
    many frames as the clip.

    A modular pipeline decodes in any case, and counts one step more than it makes.
    """
    if is_modular(pipeline):
        return latents_of_blocks(pipeline, tiny, steps, seed, **options)
    known = inspect.signature(type(pipeline).__call__).parameters
    shape = {"height": tiny.height, "width": tiny.width, "num_frames": tiny.num_frames}
    given = {"output_type": "latent", **tiny.options, **options}
    if "conditions" in known:
        given = as_conditions(pipeline, given)
    result: torch.Tensor = pipeline(
        prompt=PROMPT,
        **{name: value for name, value in shape.items() if name in known},
        num_inference_steps=steps,
        generator=torch.Generator("cpu").manual_seed(seed),
        **given,
    ).frames
    return result


def as_conditions(pipeline: Any, given: dict[str, Any]) -> dict[str, Any]:
    """An image or a video as LTX's pipelines of conditions take it: at the beginning of the clip."""
    from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition
    from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition

    image, video = given.pop("image", None), given.pop("video", None)
    if type(pipeline).__name__ == "LTXConditionPipeline":
        return {**given, "conditions": LTXVideoCondition(image=image, video=video)}
    return {**given, "conditions": LTX2VideoCondition(frames=video if image is None else image)}


def latents_of_blocks(pipeline: Any, tiny: Tiny, steps: int, seed: int, **options: Any) -> Any:
    """The same of a modular pipeline; with an output_type its frames."""
    return pipeline(
        prompt=PROMPT,
        height=tiny.height,
        width=tiny.width,
        num_frames=tiny.num_frames,
        num_inference_steps=steps + 1,
        generator=torch.Generator("cpu").manual_seed(seed),
        output="videos" if "output_type" in options else "latents",
        **{"output_type": "np", **tiny.options, **options},
    )


def sharpen(transformer: Any, factor: float = 2.0) -> Any:
    """Random q and k are nearly flat; wider ones make attention pick, so that structured differs from dense."""
    ends = ("to_q.weight", "to_k.weight", "to_query.weight", "to_key.weight", "norm_q.weight", "norm_k.weight")
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if name.endswith((*ends, "to_v.weight", "query_norm.weight", "key_norm.weight")):
                parameter.mul_(factor)
    return transformer.eval()


def words(start: str = "", **options: Any) -> Any:
    """A tokenizer of whole words that takes the place of every family's own; `start` is put before each text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    unknown, ends = {"unk_token": "<unk>"}, {"pad_token": "<pad>", "eos_token": "</s>"}
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(_WORDS)}, **unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A </s>".strip(), special_tokens=[("</s>", 1), ("<pad>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{"model_max_length": 512, **unknown, **ends, **options}
    )


def t5(kind: str = "T5", width: int = 32) -> Any:
    """A one-layer T5 or UMT5 encoder with embeddings wide enough for the prompt to matter."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=300, d_model=width, d_kv=16, d_ff=64, num_layers=1, num_heads=2
    )
    torch.manual_seed(1)
    encoder = getattr(transformers, f"{kind}EncoderModel")(config).eval()
    with torch.no_grad():
        encoder.shared.weight.normal_(std=3.0)
    return encoder


def clip_text(width: int = 32) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(2)
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=1,
        vocab_size=len(_WORDS),
        projection_dim=width,
        bos_token_id=0,
        eos_token_id=1,
    )
    return CLIPTextModel(config).eval()


def wan_vae(channels: int = 4) -> Any:
    from diffusers import AutoencoderKLWan

    torch.manual_seed(3)
    return AutoencoderKLWan(
        base_dim=3,
        z_dim=channels,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1] * channels,
        latents_std=[1.1] * channels,
    ).eval()


def hunyuan_vae() -> Any:
    from diffusers import AutoencoderKLHunyuanVideo

    torch.manual_seed(3)
    return AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    ).eval()


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _wan_transformer(kind: str = "WanTransformer3DModel", seed: int = 0, **options: Any) -> Any:
    import diffusers

    torch.manual_seed(seed)
    config: dict[str, Any] = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 32,
        "freq_dim": 32,
        "ffn_dim": 64,
        "num_layers": 2,
        "rope_max_seq_len": 64,
    }
    return sharpen(getattr(diffusers, kind)(**{**config, **options}))


def _unipc() -> Any:
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def _euler(**options: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **options})


_LTX_SCHEDULE: dict[str, Any] = {
    "shift": 1.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.95,
    "max_shift": 2.05,
    "base_image_seq_len": 1024,
    "max_image_seq_len": 4096,
    "shift_terminal": 0.1,
}
"""As published for LTX-Video and LTX-2."""


def _wan_parts(**options: Any) -> dict[str, Any]:
    return {"tokenizer": words(), "text_encoder": t5("UMT5"), "vae": wan_vae(), "scheduler": _unipc(), **options}


def wan() -> Any:
    from diffusers import WanPipeline

    return quiet(WanPipeline(transformer=_wan_transformer(), **_wan_parts()))


def wan_video() -> Any:
    from diffusers import WanVideoToVideoPipeline

    return quiet(WanVideoToVideoPipeline(transformer=_wan_transformer(), **_wan_parts()))


def wan_two_stage() -> Any:
    from diffusers import WanPipeline

    parts = _wan_parts(transformer_2=_wan_transformer(seed=7), boundary_ratio=0.9)
    return quiet(WanPipeline(transformer=_wan_transformer(), **parts))


def wan_ti2v() -> Any:
    from diffusers import WanPipeline

    return quiet(WanPipeline(transformer=_wan_transformer(), expand_timesteps=True, **_wan_parts()))


def clip_vision() -> dict[str, Any]:
    """An image encoder and its processor."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(4)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16
    )
    size = {"height": 32, "width": 32}
    return {
        "image_encoder": CLIPVisionModel(config).eval(),
        "image_processor": CLIPImageProcessor(size=size, crop_size=size),
    }


def wan_i2v() -> Any:
    from diffusers import WanImageToVideoPipeline

    transformer = _wan_transformer(in_channels=12, image_dim=32, added_kv_proj_dim=32)  # latents, mask, image
    return quiet(WanImageToVideoPipeline(transformer=transformer, **_wan_parts(**clip_vision())))


def wan_i2v_two_stage() -> Any:
    from diffusers import WanImageToVideoPipeline

    parts = _wan_parts(transformer_2=_wan_transformer(seed=7, in_channels=12), boundary_ratio=0.9)
    parts |= {"image_encoder": None, "image_processor": None}
    return quiet(WanImageToVideoPipeline(transformer=_wan_transformer(in_channels=12), **parts))


def wan_vace() -> Any:
    from diffusers import WanVACEPipeline

    vace = {"vace_layers": [0, 2], "vace_in_channels": 2 * 4 + 64, "num_layers": 3}
    return quiet(WanVACEPipeline(transformer=_wan_transformer("WanVACETransformer3DModel", **vace), **_wan_parts()))


def skyreels() -> Any:
    from diffusers import SkyReelsV2Pipeline

    transformer = _wan_transformer("SkyReelsV2Transformer3DModel")
    return quiet(SkyReelsV2Pipeline(transformer=transformer, **_wan_parts()))


def skyreels_i2v() -> Any:
    from diffusers import SkyReelsV2ImageToVideoPipeline

    transformer = _wan_transformer("SkyReelsV2Transformer3DModel", in_channels=12, image_dim=32, added_kv_proj_dim=32)
    return quiet(SkyReelsV2ImageToVideoPipeline(transformer=transformer, **_wan_parts(**clip_vision())))


_LLAMA: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": len(_WORDS),
    "pad_token_id": 0,
}


def _hunyuan_transformer(**options: Any) -> Any:
    from diffusers import HunyuanVideoTransformer3DModel

    torch.manual_seed(0)
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
        **options,
    )
    return sharpen(transformer)


def _hunyuan_parts() -> dict[str, Any]:
    return {
        "vae": hunyuan_vae(),
        "scheduler": _euler(),
        "text_encoder_2": clip_text(8),
        "tokenizer_2": words(model_max_length=77),
    }


def hunyuan_video() -> Any:
    from diffusers import HunyuanVideoPipeline
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(1)
    llama = LlamaModel(LlamaConfig(**_LLAMA)).eval()
    transformer = _hunyuan_transformer()
    return quiet(
        HunyuanVideoPipeline(text_encoder=llama, tokenizer=words(), transformer=transformer, **_hunyuan_parts())
    )


def hunyuan_video_i2v() -> Any:
    """The pipeline counts on the real tokenizer: the image's token is the sixth, and 103 tokens are cut off in front,
    which here takes words of the prompt along.
    """
    from diffusers import HunyuanVideoImageToVideoPipeline
    from transformers import CLIPImageProcessor, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    markers = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>"]
    tokenizer = words(start="<pad> <pad>", additional_special_tokens=markers)
    marked = {"vocab_size": len(tokenizer)}
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 48,
        "patch_size": 2,  # 576 patches, which the pipeline counts on, too
    }
    torch.manual_seed(1)
    config = LlavaConfig(
        text_config=LlamaConfig(**{**_LLAMA, **marked}),
        vision_config=vision,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=0,
    )
    size = {"height": 48, "width": 48}
    return quiet(
        HunyuanVideoImageToVideoPipeline(
            text_encoder=LlavaForConditionalGeneration(config).eval(),
            tokenizer=tokenizer,
            transformer=_hunyuan_transformer(image_condition_type="token_replace"),
            image_processor=CLIPImageProcessor(size=size, crop_size=size),
            **_hunyuan_parts(),
        )
    )


def _qwen_text() -> dict[str, Any]:
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6}
    return {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": len(_WORDS),
        "rope_scaling": rope,
        "rope_parameters": rope,
    }


def hunyuan_video_15(kind: str = "HunyuanVideo15Pipeline", **more: Any) -> Any:
    import diffusers
    from diffusers import AutoencoderKLHunyuanVideo15, ClassifierFreeGuidance, HunyuanVideo15Transformer3DModel
    from transformers import ByT5Tokenizer, Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

    torch.manual_seed(1)
    text_encoder = Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**_qwen_text())).eval()
    torch.manual_seed(0)
    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=16,
        text_embed_2_dim=32,
        image_embed_dim=12,
        rope_axes_dim=(4, 6, 6),
        target_size=23,  # 16x32 is one of the sizes of about so many pixels squared
        task_type="i2v" if more else "t2v",
    )
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(16, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
        downsample_match_channel=False,
        upsample_match_channel=False,
    ).eval()
    # The pipeline cuts off the 108 tokens that its system prompt has in the real tokenizer.
    template = "{% for i in range(108) %}the {% endfor %}{{ messages[-1]['content'] }}"
    return quiet(
        getattr(diffusers, kind)(
            text_encoder=text_encoder,
            tokenizer=words(model_max_length=2000, chat_template=template),
            transformer=sharpen(transformer),
            vae=vae,
            scheduler=_euler(),
            text_encoder_2=t5(),
            tokenizer_2=ByT5Tokenizer(),
            guider=ClassifierFreeGuidance(guidance_scale=4.0),
            **more,
        )
    )


def hunyuan_video_15_i2v() -> Any:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(4)
    vision = SiglipVisionConfig(
        hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    return hunyuan_video_15(
        "HunyuanVideo15ImageToVideoPipeline",
        image_encoder=SiglipVisionModel(vision).eval(),
        feature_extractor=_siglip_processor(),
    )


def cogvideox(kind: str = "CogVideoXPipeline", **options: Any) -> Any:
    import diffusers
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel

    torch.manual_seed(0)
    config: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 8,
        "text_embed_dim": 32,
        "num_layers": 2,
        "sample_width": 8,
        "sample_height": 8,
        "sample_frames": 9,
        "patch_size": 2,
        "temporal_compression_ratio": 4,
        "max_text_seq_length": 16,
    }
    transformer = CogVideoXTransformer3DModel(**{**config, **options})
    torch.manual_seed(3)
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    ).eval()
    return quiet(
        getattr(diffusers, kind)(
            tokenizer=words(),
            text_encoder=t5(),
            vae=vae,
            transformer=sharpen(transformer),
            scheduler=CogVideoXDDIMScheduler(),
        )
    )


def cogvideox_5b() -> Any:
    return cogvideox(use_rotary_positional_embeddings=True)


def cogvideox_15() -> Any:
    return cogvideox(use_rotary_positional_embeddings=True, patch_size_t=2, patch_bias=False)


def cogvideox_i2v() -> Any:
    learned = {"use_learned_positional_embeddings": True, "sample_height": 4, "sample_width": 6, "sample_frames": 17}
    return cogvideox("CogVideoXImageToVideoPipeline", in_channels=8, use_rotary_positional_embeddings=True, **learned)


def cogvideox_15_i2v() -> Any:
    new = {"patch_size_t": 2, "patch_bias": False, "ofs_embed_dim": 8}
    return cogvideox("CogVideoXImageToVideoPipeline", in_channels=8, use_rotary_positional_embeddings=True, **new)


def ltx_video(kind: str = "LTXPipeline") -> Any:
    import diffusers
    from diffusers import AutoencoderKLLTXVideo, LTXVideoTransformer3DModel

    torch.manual_seed(0)
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=32,
    )
    torch.manual_seed(3)
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False, False, False, False, False),
        upsample_residual=(False, False, False, False),
        upsample_factor=(1, 1, 1, 1),
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    ).eval()
    return quiet(
        getattr(diffusers, kind)(
            scheduler=_euler(**_LTX_SCHEDULE),
            vae=vae,
            text_encoder=t5(),
            tokenizer=words(),
            transformer=sharpen(transformer),
        )
    )


def ltx_i2v() -> Any:
    return ltx_video("LTXImageToVideoPipeline")


def ltx_condition() -> Any:
    pipeline = ltx_video("LTXConditionPipeline")
    pipeline.scheduler = _euler(shift=1.0)  # as published: its noise levels are the pipeline's own
    return pipeline


def ltx2_condition() -> Any:
    return ltx2("LTX2ConditionPipeline")


def ltx2(kind: str = "LTX2Pipeline") -> Any:
    import diffusers
    from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video, LTX2VideoTransformer3DModel
    from diffusers.pipelines.ltx2 import LTX2TextConnectors
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    torch.manual_seed(1)
    config = Gemma3Config(
        text_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "vocab_size": 300,
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
    )
    text_encoder = Gemma3ForConditionalGeneration(config).eval()
    torch.manual_seed(0)
    transformer = LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=2,
        caption_channels=16,
        rope_double_precision=False,
        rope_type="split",
    )
    connectors = LTX2TextConnectors(
        caption_channels=16,
        text_proj_in_factor=3,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=8,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=8,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
        connector_rope_base_seq_len=32,
        rope_theta=10000.0,
        rope_double_precision=False,
        causal_temporal_positioning=False,
        rope_type="split",
    ).eval()
    torch.manual_seed(3)
    vae = AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatiotemporal",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    ).eval()
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    audio_vae = AutoencoderKLLTX2Audio(
        base_channels=4,
        output_channels=2,
        ch_mult=(1,),
        num_res_blocks=1,
        attn_resolutions=None,
        in_channels=2,
        resolution=32,
        latent_channels=2,
        norm_type="pixel",
        causality_axis="height",
        mid_block_add_attention=False,
        sample_rate=16000,
        mel_hop_length=160,
        is_causal=True,
        mel_bins=8,
    ).eval()
    vocoder = LTX2Vocoder(
        in_channels=16,
        hidden_channels=16,
        out_channels=2,
        upsample_kernel_sizes=[20, 32],
        upsample_factors=[10, 16],  # the hop of the spectrogram
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
        leaky_relu_negative_slope=0.1,
        output_sampling_rate=16000,
    ).eval()
    with torch.no_grad():  # so that the spectrogram is heard, and not only the biases
        vocoder.conv_in.weight.mul_(30)
    return quiet(
        getattr(diffusers, kind)(
            scheduler=_euler(**_LTX_SCHEDULE),
            vae=vae,
            audio_vae=audio_vae,
            text_encoder=text_encoder,
            tokenizer=words(),
            connectors=connectors,
            transformer=sharpen(transformer),
            vocoder=vocoder,
        )
    )


def ltx2_i2v() -> Any:
    return ltx2("LTX2ImageToVideoPipeline")


def mochi() -> Any:
    from diffusers import AutoencoderKLMochi, MochiPipeline, MochiTransformer3DModel

    torch.manual_seed(0)
    transformer = MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        qk_norm="rms_norm",
        text_embed_dim=32,
        time_embed_dim=4,
        activation_fn="swiglu",
        max_sequence_length=16,
    )
    torch.manual_seed(3)
    vae = AutoencoderKLMochi(
        latent_channels=12,
        out_channels=3,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    ).eval()
    return quiet(
        MochiPipeline(
            scheduler=_euler(shift=1.0, invert_sigmas=True),
            vae=vae,
            text_encoder=t5(),
            tokenizer=words(),
            transformer=sharpen(transformer),
        )
    )


def allegro() -> Any:
    from diffusers import (
        AllegroPipeline,
        AllegroTransformer3DModel,
        AutoencoderKLAllegro,
        EulerAncestralDiscreteScheduler,
    )

    torch.manual_seed(0)
    transformer = AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=48,
        sample_width=8,
        sample_height=8,
        sample_frames=8,
        caption_channels=32,
    )
    torch.manual_seed(3)
    vae = AutoencoderKLAllegro(
        in_channels=3,
        out_channels=3,
        down_block_types=("AllegroDownBlock3D",) * 4,
        up_block_types=("AllegroUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
        sample_size=128,  # of the decoder's tiles: what they do not fill stays grey
    ).eval()
    return quiet(
        AllegroPipeline(
            tokenizer=words(),
            text_encoder=t5(),
            vae=vae,
            transformer=sharpen(transformer),
            scheduler=EulerAncestralDiscreteScheduler(),
        )
    )


def kandinsky_5(kind: str = "Kandinsky5T2VPipeline", visual_cond: bool = False) -> Any:
    import diffusers
    from diffusers import Kandinsky5Transformer3DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(1)
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    text_encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=_qwen_text(), vision_config=vision)
    ).eval()
    torch.manual_seed(0)
    transformer = Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=32,
        time_dim=32,
        out_visual_dim=4,
        patch_size=(1, 2, 2),
        model_dim=48,
        ff_dim=64,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(8, 8, 8),
        visual_cond=visual_cond,
    )
    with torch.no_grad():  # modulations start at zero, and the blocks as the identity
        for name, parameter in transformer.named_parameters():
            if "modulation" in name:
                parameter.normal_(std=0.2)
    return quiet(
        getattr(diffusers, kind)(
            transformer=sharpen(transformer),
            vae=hunyuan_vae(),
            text_encoder=text_encoder,
            tokenizer=words(),
            text_encoder_2=clip_text(32),
            tokenizer_2=words(model_max_length=77),
            scheduler=_euler(),
        )
    )


def kandinsky_5_i2v() -> Any:
    return kandinsky_5("Kandinsky5I2VPipeline", visual_cond=True)


def kandinsky_6(velocities: int = 1) -> Any:
    """velocities: of each latent channel; a distilled checkpoint has several, and the scheduler that takes them."""
    import diffusers
    from diffusers import Kandinsky6Transformer3DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(1)
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    text_encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=_qwen_text(), vision_config=vision)
    ).eval()
    torch.manual_seed(0)
    transformer = Kandinsky6Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4 * velocities,
        in_text_dim=16,
        in_text_dim2=32,
        time_dim=32,
        model_dim=48,
        ff_dim=64,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(8, 8, 8),
        in_audio_dim=4,
        out_audio_dim=4 * velocities,
        model_dim_a=24,
        ff_dim_a=32,
        text_token_padding=True,
        ca_rope=True,
        cross_gates=True,
        fix_modulation=True,
        visual_token_type_num_embeddings=2,
    )
    audio_vae = diffusers.MMAudioVAE(
        mel_bins=8,
        latent_channels=4,
        hidden_channels=8,
        channel_multipliers=(1, 1),
        layers_per_block=1,
        sample_rate=16000,
        n_fft=256,
        hop_length=160,
    ).eval()
    vocoder = diffusers.MMAudioVocoder(
        num_mels=8,
        upsample_initial_channel=16,
        upsample_rates=(16, 10),  # the hop of the spectrogram
        upsample_kernel_sizes=(32, 20),
        resblock_kernel_sizes=(3,),
        resblock_dilation_sizes=((1, 3),),
    ).eval()
    return quiet(
        diffusers.Kandinsky6TI2VAPipeline(
            transformer=sharpen(transformer),
            vae=hunyuan_vae(),
            text_encoder=text_encoder,
            tokenizer=words(),
            text_encoder_2=clip_text(32),
            tokenizer_2=words(model_max_length=77),
            scheduler=_euler() if velocities == 1 else diffusers.PiflowScheduler(n_grid=velocities),
            audio_vae=audio_vae,
            vocoder=vocoder,
        )
    )


def anyflow() -> Any:
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.AnyFlowTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        rope_max_seq_len=64,
    )
    return quiet(
        diffusers.AnyFlowPipeline(
            transformer=sharpen(transformer),
            **_wan_parts(scheduler=diffusers.FlowMapEulerDiscreteScheduler(shift=3.0)),
        )
    )


def cosmos() -> Any:
    """As published: a mask of given frames and one of padding beside the latents, Karras noise levels."""
    import diffusers
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    put_in_place()
    torch.manual_seed(1)
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    text_encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=_qwen_text(), vision_config=vision)
    ).eval()
    torch.manual_seed(0)
    transformer = diffusers.CosmosTransformer3DModel(
        in_channels=5,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        mlp_ratio=2.0,
        text_embed_dim=32,
        adaln_lora_dim=8,
        max_size=(32, 32, 32),
        rope_scale=(1.0, 3.0, 3.0),
        extra_pos_embed_type=None,
        use_crossattn_projection=True,
        crossattn_proj_in_channels=3 * 16,
        encoder_hidden_states_channels=32,
    )
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        use_karras_sigmas=True,
        sigma_max=200.0,
        sigma_min=0.01,
    )
    return quiet(
        diffusers.Cosmos2_5_PredictBasePipeline(
            text_encoder=text_encoder,
            tokenizer=words(chat_template="{{ messages[-1]['content'][0]['text'] }}"),
            transformer=sharpen(transformer),
            vae=wan_vae(),
            scheduler=scheduler,
        )
    )


def motif_video(kind: str = "MotifVideoPipeline", **more: Any) -> Any:
    import diffusers
    from diffusers import AdaptiveProjectedGuidance, MotifVideoTransformer3DModel
    from transformers import T5Gemma2Encoder, T5Gemma2EncoderConfig, T5Gemma2TextConfig

    text = T5Gemma2TextConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=300,
        max_position_embeddings=128,
        head_dim=16,
        num_key_value_heads=2,
        dropout_rate=0.0,
        layer_norm_epsilon=1e-6,
        dense_act_fn="gelu",
    )
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    torch.manual_seed(1)
    text_encoder = T5Gemma2Encoder(T5Gemma2EncoderConfig(text_config=text, vision_config=vision)).eval()
    torch.manual_seed(0)
    transformer = MotifVideoTransformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=2,
        num_decoder_layers=1,
        patch_size=2,
        patch_size_t=1,
        text_embed_dim=32,
        image_embed_dim=16,
        rope_axes_dim=(4, 6, 6),
        enable_text_cross_attention_dual=True,
    )
    return quiet(
        getattr(diffusers, kind)(
            scheduler=_euler(),
            vae=wan_vae(),
            text_encoder=text_encoder,
            tokenizer=words(),
            transformer=sharpen(transformer),
            guider=AdaptiveProjectedGuidance(guidance_scale=4.0),
            **more,
        )
    )


def _siglip_processor() -> Any:
    from transformers import SiglipImageProcessor

    return SiglipImageProcessor(size={"height": 28, "width": 28})


def motif_both() -> Any:
    """As published: text to video, with what a first frame needs."""
    return motif_video(feature_extractor=_siglip_processor())


def motif_i2v() -> Any:
    return motif_video("MotifVideoImage2VideoPipeline", feature_extractor=_siglip_processor())


_VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def qwen3_vl() -> dict[str, Any]:
    """A text encoder of 51 layers, of which MiniMax-H3 reads the fiftieth, with its tokenizer and processor."""
    from transformers import Qwen2VLImageProcessor, Qwen3VLConfig, Qwen3VLForConditionalGeneration

    tokenizer = words(additional_special_tokens=list(_VISION_TOKENS), chat_template="{{ messages }}")
    start, end, picture, video = tokenizer.convert_tokens_to_ids(list(_VISION_TOKENS))
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    torch.manual_seed(1)
    config = Qwen3VLConfig(
        text_config={
            **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 51, "head_dim": 8},
            **{"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": len(tokenizer)},
            "rope_parameters": rope,
            "rope_scaling": rope,
        },
        vision_config={
            **{"hidden_size": 16, "intermediate_size": 16, "depth": 1, "num_heads": 2, "out_hidden_size": 16},
            **{
                "patch_size": 16,
                "spatial_merge_size": 2,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
        },
        vision_start_token_id=start,
        vision_end_token_id=end,
        image_token_id=picture,
        video_token_id=video,
    )
    encoder = Qwen3VLForConditionalGeneration(config).eval()
    with torch.no_grad():  # so that words and pictures differ after fifty layers
        encoder.model.language_model.embed_tokens.weight.normal_(std=3.0)
        for parameter in encoder.model.visual.merger.parameters():
            parameter.mul_(20)
    size = {"shortest_edge": 32 * 32, "longest_edge": 256 * 256}
    kind = pictures_alone()
    kind.__module__, kind.__qualname__ = "transformers.models.qwen3_vl", "Qwen3VLProcessor"  # as it is saved
    kind.__name__ = kind.__qualname__
    processor = kind(Qwen2VLImageProcessor(size=size, patch_size=16, merge_size=2), tokenizer)
    return {"text_encoder": encoder, "tokenizer": tokenizer, "processor": processor}


def minimax_h3() -> Any:
    import diffusers
    from diffusers import AutoencoderKLMiniMaxH3, AutoencoderKLMiniMaxH3Audio, MiniMaxH3Transformer3DModel

    torch.manual_seed(0)
    transformer = MiniMaxH3Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        ffn_dim=32,
        in_channels=4,
        audio_in_channels=4,
        text_dim=16,
        freq_dim=16,
        time_embed_hidden_dim=24,
        time_embed_dim=16,
        rope_freq_dim=2,
    )
    torch.manual_seed(3)
    vae = AutoencoderKLMiniMaxH3(
        latent_channels=4,
        block_out_channels=(8, 8),
        layers_per_block=1,
        spatial_downsample_factors=(4, 4),
        temporal_downsample_factors=(2, 2),
        norm_num_groups=4,
        decoder_num_layers=1,
        decoder_num_attention_heads=2,
        decoder_attention_head_dim=16,
        decoder_ffn_mult=2,
        latents_mean=(0.1,) * 4,
        latents_std=(1.1,) * 4,
    ).eval()
    audio_vae = AutoencoderKLMiniMaxH3Audio(
        encoder_dim=2,
        encoder_rates=(20, 40),
        latent_dim=16,
        latent_channels=4,
        num_attention_heads=2,
        decoder_dim=8,
        decoder_rates=(20, 40),
        decoder_kernel_sizes=(40, 80),
        resblock_kernel_sizes=(3,),
        resblock_dilation_sizes=((1,),),
        latents_mean=[0.1] * 4,
        latents_std=[1.1] * 4,
    ).eval()
    with torch.no_grad():
        for block in vae.decoder.transformer_blocks:  # they start as the identity
            block.scale1.fill_(1.0)
            block.scale2.fill_(1.0)
        audio_vae.decoder.conv_post.weight_g.mul_(3)  # so that there is something to hear
    pipeline = diffusers.MiniMaxH3ModularPipeline(blocks=diffusers.MiniMaxH3Blocks())
    pipeline.register_components(
        **qwen3_vl(),
        transformer=sharpen(transformer),
        vae=vae,
        audio_vae=audio_vae,
        scheduler=diffusers.MiniMaxH3Scheduler(shift=12.0),
        audio_scheduler=diffusers.MiniMaxH3Scheduler(shift=3.0),
    )
    pipeline.save_pretrained = functools.partial(_save_blocks, pipeline.save_pretrained)
    hide_progress(pipeline)
    return pipeline


def _save_blocks(save: Callable[..., None], folder: Path, **options: Any) -> None:
    """A modular pipeline's own, which takes a text for the folder; the processor's file has a part for videos."""
    save(str(folder), overwrite_modular_index=True, **options)
    path = folder / "processor" / "processor_config.json"
    settings = json.loads(path.read_text())
    videos = {"video_processor_type": "Qwen3VLVideoProcessor", "patch_size": 16, "merge_size": 2, "fps": 2}
    path.write_text(json.dumps({**settings, "video_processor": videos}))


def image(width: int = 48, height: int = 32) -> Any:
    """A first frame: a red square on blue."""
    from PIL import Image

    picture = Image.new("RGB", (width, height), "blue")
    picture.paste("red", (8, 8, 24, 24))
    return picture


def video(frames: int = 17, width: int = 48, height: int = 32) -> list[Any]:
    """A red square that moves to the right on blue."""
    from PIL import Image

    pictures = [Image.new("RGB", (width, height), "blue") for _ in range(frames)]
    for number, picture in enumerate(pictures):
        picture.paste("red", (number, 8, number + 16, 24))
    return pictures


def save_video(path: Path, pictures: list[Any]) -> Path:
    """A GIF of 25 frames a second, which keeps these few colours exactly."""
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=40)
    return path


_WAN: dict[str, Any] = {"guidance_scale": 4.0, "negative_prompt": NEGATIVE, "max_sequence_length": 16}
_I2V = {**_WAN, "max_sequence_length": 512}
_GUIDED = {"guidance_scale": 4.0, "negative_prompt": NEGATIVE, "max_sequence_length": 16}

TINY: dict[str, Tiny] = {
    "wan": Tiny(wan, "WanTransformer3DModel", 2, 2, (5, 2, 3), options=_WAN),
    "wan-two-stage": Tiny(wan_two_stage, "WanTransformer3DModel", 2, 2, (5, 2, 3), options=_WAN),
    "wan-ti2v": Tiny(wan_ti2v, "WanTransformer3DModel", 2, 2, (5, 2, 3), options=_WAN),
    "wan-i2v": Tiny(wan_i2v, "WanTransformer3DModel", 2, 2, (5, 2, 3), options={**_I2V, "image": image()}),
    "wan-i2v-two-stage": Tiny(
        wan_i2v_two_stage, "WanTransformer3DModel", 2, 2, (5, 2, 3), options={**_WAN, "image": image()}
    ),
    "wan-video": Tiny(
        wan_video,
        "WanTransformer3DModel",
        2,
        2,
        (5, 2, 3),
        options={**_WAN, "video": video(), "strength": 1.0},  # all steps run
    ),
    "wan-vace-video": Tiny(wan_vace, "WanVACETransformer3DModel", 5, 2, (5, 2, 3), options={**_WAN, "video": video()}),
    "wan-vace": Tiny(wan_vace, "WanVACETransformer3DModel", 5, 2, (5, 2, 3), options=_WAN),
    "skyreels-v2": Tiny(skyreels, "SkyReelsV2Transformer3DModel", 2, 2, (5, 2, 3), options=_WAN),
    "skyreels-v2-i2v": Tiny(
        skyreels_i2v, "SkyReelsV2Transformer3DModel", 2, 2, (5, 2, 3), options={**_I2V, "image": image()}
    ),
    "hunyuan-video": Tiny(
        hunyuan_video,
        "HunyuanVideoTransformer3DModel",
        3,
        1,
        (5, 2, 3),
        options={"guidance_scale": 4.0, "max_sequence_length": 16},
    ),
    "hunyuan-video-i2v": Tiny(
        hunyuan_video_i2v,
        "HunyuanVideoTransformer3DModel",
        3,
        1,
        (5, 2, 3),
        options={"guidance_scale": 4.0, "max_sequence_length": 16, "image": image()},
    ),
    "hunyuan-video-1.5": Tiny(
        hunyuan_video_15,
        "HunyuanVideo15Transformer3DModel",
        2,
        2,
        (5, 4, 8),
        height=16,
        width=32,
        num_frames=9,
        options={"negative_prompt": NEGATIVE},
    ),
    "hunyuan-video-1.5-i2v": Tiny(
        hunyuan_video_15_i2v,
        "HunyuanVideo15Transformer3DModel",
        2,
        2,
        (5, 4, 8),
        height=16,
        width=32,
        num_frames=9,
        options={"negative_prompt": NEGATIVE, "image": image(32, 16)},
    ),
    "cogvideox-2b": Tiny(cogvideox, "CogVideoXTransformer3DModel", 2, 1, (5, 2, 3), options=_GUIDED),
    "cogvideox-5b": Tiny(cogvideox_5b, "CogVideoXTransformer3DModel", 2, 1, (5, 2, 3), options=_GUIDED),
    "cogvideox-1.5": Tiny(cogvideox_15, "CogVideoXTransformer3DModel", 2, 1, (3, 2, 3), options=_GUIDED),
    "cogvideox-5b-i2v": Tiny(
        cogvideox_i2v, "CogVideoXTransformer3DModel", 2, 1, (5, 2, 3), options={**_GUIDED, "image": image()}
    ),
    "cogvideox-1.5-i2v": Tiny(
        cogvideox_15_i2v, "CogVideoXTransformer3DModel", 2, 1, (3, 2, 3), options={**_GUIDED, "image": image()}
    ),
    "ltx-video": Tiny(
        ltx_video, "LTXVideoTransformer3DModel", 2, 1, (5, 8, 8), height=32, width=32, num_frames=17, options=_GUIDED
    ),
    "ltx-video-i2v": Tiny(
        ltx_i2v,
        "LTXVideoTransformer3DModel",
        2,
        1,
        (5, 8, 8),
        height=32,
        width=32,
        num_frames=17,
        options={**_GUIDED, "image": image(32)},
    ),
    "ltx-2": Tiny(
        ltx2, "LTX2VideoTransformer3DModel", 2, 3, (5, 16, 16), height=32, width=32, num_frames=9, options=_GUIDED
    ),
    "ltx-2-i2v": Tiny(
        ltx2_i2v,
        "LTX2VideoTransformer3DModel",
        2,
        3,
        (5, 16, 16),
        height=32,
        width=32,
        num_frames=9,
        options={**_GUIDED, "image": image(32), "image_crf": 0},
    ),
    "ltx-video-condition": Tiny(
        ltx_condition,
        "LTXVideoTransformer3DModel",
        2,
        1,
        (5, 8, 8),
        height=32,
        width=32,
        options={**_GUIDED, "image": image(32)},
    ),
    "ltx-video-continued": Tiny(
        ltx_condition,
        "LTXVideoTransformer3DModel",
        2,
        1,
        (5, 8, 8),
        height=32,
        width=32,
        options={**_GUIDED, "video": video(9, 32, 32)},
    ),
    "ltx-2-continued": Tiny(
        ltx2_condition,
        "LTX2VideoTransformer3DModel",
        2,
        3,
        (6, 16, 16),
        height=32,
        width=32,
        num_frames=11,
        options={**_GUIDED, "video": video(9, 32, 32)},
    ),
    "mochi-1": Tiny(mochi, "MochiTransformer3DModel", 2, 1, (4, 2, 3), num_frames=19, options=_GUIDED),
    "allegro": Tiny(
        allegro,
        "AllegroTransformer3DModel",
        2,
        1,
        (6, 8, 8),
        height=128,
        width=128,
        num_frames=24,
        options=_GUIDED,
    ),
    "kandinsky-5": Tiny(kandinsky_5, "Kandinsky5Transformer3DModel", 2, 2, (5, 2, 3), options=_GUIDED),
    "kandinsky-5-i2v": Tiny(
        kandinsky_5_i2v,
        "Kandinsky5Transformer3DModel",
        2,
        2,
        (6, 2, 3),
        num_frames=21,
        options={**_GUIDED, "image": image()},
    ),
    "kandinsky-6": Tiny(kandinsky_6, "Kandinsky6Transformer3DModel", 2, 2, (5, 2, 3), options=_GUIDED),
    "kandinsky-6-image": Tiny(
        kandinsky_6, "Kandinsky6Transformer3DModel", 2, 2, (5, 2, 3), options={**_GUIDED, "image": image()}
    ),
    "motif-video": Tiny(
        motif_both,
        "MotifVideoTransformer3DModel",
        3,
        2,
        (5, 2, 3),
        options={"negative_prompt": NEGATIVE, "max_sequence_length": 16},
    ),
    "motif-video-i2v": Tiny(
        motif_i2v,
        "MotifVideoTransformer3DModel",
        3,
        2,
        (5, 2, 3),
        options={"negative_prompt": NEGATIVE, "max_sequence_length": 16, "image": image()},
    ),
    "anyflow": Tiny(anyflow, "AnyFlowTransformer3DModel", 2, 1, (5, 2, 3), options=_GUIDED),
    "cosmos-2.5": Tiny(cosmos, "CosmosTransformer3DModel", 2, 2, (5, 2, 3), options=_GUIDED),
    "cosmos-2.5-image": Tiny(
        cosmos, "CosmosTransformer3DModel", 2, 2, (5, 2, 3), options={**_GUIDED, "image": image()}
    ),
    "cosmos-2.5-video": Tiny(
        cosmos, "CosmosTransformer3DModel", 2, 2, (5, 2, 3), options={**_GUIDED, "video": video()}
    ),
    "minimax-h3": Tiny(
        minimax_h3, "MiniMaxH3Transformer3DModel", 2, 1, (37, 2, 3), height=64, width=96, num_frames=124
    ),
    "minimax-h3-image": Tiny(
        minimax_h3,
        "MiniMaxH3Transformer3DModel",
        2,
        1,
        (37, 2, 3),
        height=64,
        width=96,
        num_frames=124,
        options={"image": image(96, 64), "last_image": image(96, 64).rotate(180)},
    ),
}
