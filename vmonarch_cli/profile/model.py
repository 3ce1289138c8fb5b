"""Whole denoising steps of one model: dense, structured and skipped self-attention in turn, on the same inputs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vmonarch_cli.errors import ModelError
from vmonarch_cli.models.base import ModelEntry
from vmonarch_cli.models.catalogue import PIPELINES
from vmonarch_cli.pipeline.apply_setup import compile_blocks
from vmonarch_cli.pipeline.call import decode_whole, encode
from vmonarch_cli.pipeline.load import load_pipeline, quiet_libraries
from vmonarch_cli.pipeline.quantize import compute_in
from vmonarch_cli.plan.setup import Setup
from vmonarch_cli.profile.break_even import break_even
from vmonarch_cli.profile.kernel import KernelSettings, profile_shape
from vmonarch_cli.profile.model_settings import ModelSettings
from vmonarch_cli.profile.repeat import Budget, OnWork, reason, unheard, wall
from vmonarch_cli.profile.results import ChipPeak, KernelShape, ModelProfile, OutputCheck
from vmonarch_cli.profile.steps import StepsRun, first_inputs
from vmonarch_cli.text import with_article
from vmonarch_cli.timing import Pace


def run_model(
    settings: ModelSettings,
    chip: ChipPeak,
    budget: Budget,
    on_result: Callable[[ModelProfile, list[OutputCheck], list[KernelShape]], None],
    on_work: OnWork = unheard,
) -> tuple[ModelProfile, list[OutputCheck], list[KernelShape]]:
    """The profile, the checks of its figures, and the lengths that its break-even comes from.

    `on_result` gets the same three whenever something was added. What one kind of attention raises becomes its row's
    failure. Raises ModelError when the model cannot be loaded.
    """
    profile = ModelProfile(
        model=settings.entry.alias,
        random_weights=settings.random_weights,
        compiled=settings.compile,
        size=(settings.width, settings.height, settings.num_frames),
        grid=settings.grid,
        forwards=settings.forwards,
        clip_steps=settings.clip_steps,
    )
    checks: list[OutputCheck] = []
    shapes: list[KernelShape] = []
    if settings.quantize is not None:
        profile.notes.append(f"projections of the blocks compute in {settings.quantize}, in every row")
    on_work("loading the model")
    pipeline, transformer, contexts = _load(settings, profile)
    if settings.compile:
        compile_blocks(transformer)
    with torch.no_grad(), _no_graph_cache():
        report = functools.partial(on_result, profile, checks, shapes)
        StepsRun(settings, transformer, profile, checks, budget, report, on_work).measure(contexts)
        if pipeline is not None:
            on_work("decoding")
            _decode(settings, pipeline, profile, budget)
            on_result(profile, checks, shapes)
    del pipeline, transformer
    _break_even(settings, chip, profile, shapes, budget, on_work)
    checks += [row.check for shape in shapes for row in shape.rows if row.check is not None]
    on_result(profile, checks, shapes)
    return profile, checks, shapes


@contextmanager
def _no_graph_cache() -> Iterator[None]:
    """Two dense backends trace to the same graph, so a cache keyed by it would give one the other's kernels."""
    from torch._functorch import config

    before = config.enable_autograd_cache
    config.enable_autograd_cache = False
    try:
        yield
    finally:
        config.enable_autograd_cache = before


def random_transformer(entry: ModelEntry, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Any:
    """The entry's transformer with random weights, made in `dtype` on the device; nothing is downloaded.

    Parts that diffusers keeps in float32 when it loads the real weights are float32 here, too.
    """
    quiet_libraries()
    import diffusers

    facts = PIPELINES[entry.pipeline]
    if facts.transformer_config is None:
        raise ModelError(f"{with_article(facts.transformer)} cannot be made without its weights: profile it with them")
    default = torch.get_default_dtype()
    torch.manual_seed(seed)
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            transformer = getattr(diffusers, facts.transformer)(**facts.transformer_config(entry)).eval()
    except torch.cuda.OutOfMemoryError:
        raise ModelError(f"{entry.alias} does not fit the memory of this GPU: choose a smaller model") from None
    finally:
        torch.set_default_dtype(default)
    wide = set(transformer._keep_in_fp32_modules or ())
    for name, tensor in [*transformer.named_parameters(), *transformer.named_buffers()]:
        if tensor.is_floating_point() and wide & set(name.split(".")):
            tensor.data = tensor.data.float()
    return transformer.requires_grad_(False)


def _load(settings: ModelSettings, profile: ModelProfile) -> tuple[Any, Any, tuple[Tensor, ...]]:
    """(pipeline or None, transformer, one text embedding per forward)."""
    entry, device, dtype = settings.entry, settings.device, settings.dtype
    if settings.random_weights:
        transformer = random_transformer(entry, device, dtype, settings.seed)
        if settings.quantize is not None:
            compute_in(transformer, settings.quantize, device)
        generator = torch.Generator("cpu").manual_seed(settings.seed)
        shape = (profile.forwards, 1, entry.max_sequence_length, entry.text_dim)
        contexts = torch.randn(shape, generator=generator).to(device, dtype)
        profile.notes.append("random weights and prompt embeddings: times are those of the model, errors are not")
        if settings.of_layers not in (None, entry.layers):
            profile.notes.append(
                f"{entry.layers} of the model's {settings.of_layers} layers: all times are theirs alone"
            )
        return None, transformer, tuple(contexts)
    setup = Setup(offload="none", quantize=settings.quantize, tuned=tuple(settings.tuned))
    pipeline = load_pipeline(settings.source, device=device, dtype=dtype, flow_shift=settings.flow_shift, setup=setup)
    negative = entry.defaults.negative_prompt
    arguments = (pipeline, settings.prompt, negative, settings.guidance_scale, entry.max_sequence_length)
    encode(*arguments)  # the first call pays for more than text
    profile.text_encode_s, embeddings = wall(lambda: encode(*arguments), device)
    if entry.transformers > 1:
        profile.notes.append("of two transformers the first is measured; the second has the same shape")
    return pipeline, pipeline.transformer, tuple(e.to(dtype) for e in embeddings.values() if e is not None)


def _decode(settings: ModelSettings, pipeline: Any, profile: ModelProfile, budget: Budget) -> None:
    """Decoding of one clip: pixels do not depend on the attention, so noise does."""
    inputs = first_inputs(settings, (torch.zeros(1, device=settings.device),))
    step = next((r.step.median for r in profile.rows if r.step is not None), 0.0)
    if not budget.allows(step):
        profile.notes.append("--seconds left no time for decoding")
        return
    try:
        profile.decode_s, _ = wall(lambda: decode_whole(pipeline, inputs.latents), settings.device)
    except Exception as error:
        profile.notes.append(f"decoding was not measured: {reason(error)}")


def _break_even(
    settings: ModelSettings,
    chip: ChipPeak,
    profile: ModelProfile,
    shapes: list[KernelShape],
    budget: Budget,
    on_work: OnWork,
) -> None:
    """Attention alone with this model's heads at up to three lengths of this frame size, and where the lines cross."""
    frames, positions = settings.grid[0], settings.grid[1] * settings.grid[2]
    presets = [preset for preset in settings.presets if preset.attention != "dense"]
    kernel = KernelSettings(
        settings.device, settings.dtype, settings.entry.heads, settings.entry.head_dim, 1, presets, repeats=7
    )
    lengths = sorted({max(2, frames // 4), max(2, frames // 2), frames})
    pace = Pace(sum(lengths))
    for index, length in enumerate(lengths):
        if not budget.allows(0.0):
            profile.notes.append("--seconds left no time to look for the break-even length")
            return
        on_work(f"attention alone at {length} frames", pace.left(sum(lengths[:index])))
        try:
            shapes.append(
                profile_shape(kernel, chip, length, positions, 0.3 * budget.left, lambda words, share: None)[0]
            )
        except Exception as error:
            profile.notes.append(f"attention alone at {length} frames was not measured: {reason(error)}")
    profile.break_even = [b for preset in presets if (b := break_even(preset.name, shapes)) is not None]
