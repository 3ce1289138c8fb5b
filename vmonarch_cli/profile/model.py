"""Whole denoising steps of one model: dense, structured and skipped self-attention in turn, on the same inputs."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vmonarch_cli.attention.session import AttentionSession
from vmonarch_cli.errors import ModelError
from vmonarch_cli.families.base import LatentClip
from vmonarch_cli.families.registry import FAMILIES, forward_inputs
from vmonarch_cli.media.metrics import relative_error
from vmonarch_cli.models.base import ModelEntry
from vmonarch_cli.models.catalogue import PIPELINES
from vmonarch_cli.pipeline.apply_setup import compile_blocks
from vmonarch_cli.pipeline.call import decode, encode
from vmonarch_cli.pipeline.load import load_pipeline, quiet_libraries
from vmonarch_cli.presets import Preset, load_preset
from vmonarch_cli.profile.break_even import break_even
from vmonarch_cli.profile.contenders import Contender, structured
from vmonarch_cli.profile.contenders import contenders as make_contenders
from vmonarch_cli.profile.kernel import KernelSettings, OnWork, profile_shape
from vmonarch_cli.profile.repeat import Budget, call_memory, order_of_round, reason, timed, wall
from vmonarch_cli.profile.results import Check, ChipPeak, KernelShape, ModelProfile, Spread, StepRow

COLD_REPEATS = 3
TIMESTEPS = 1000
"""Transformers take sigma times this."""
# A model in which self-attention is exact may differ from the dense one by what rounding adds up to over its layers.
_EXACT_BUDGET = {torch.bfloat16: 8e-2, torch.float16: 2e-2, torch.float32: 1e-3}


@dataclass(frozen=True)
class ModelSettings:
    """What to measure on which model."""

    entry: ModelEntry
    source: str
    random_weights: bool
    device: torch.device
    dtype: torch.dtype
    height: int
    width: int
    num_frames: int
    guidance_scale: float
    flow_shift: float
    clip_steps: int
    """Denoising steps of a clip; the first `steps` of them are measured."""
    steps: int
    presets: Sequence[Preset]
    compile: bool
    prompt: str
    seed: int = 0
    backends: Sequence[str] = ()
    """Dense backends to measure; every one of the device when empty."""

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.entry.grid(self.height, self.width, self.num_frames)


@dataclass(frozen=True)
class _Inputs:
    """One denoising step's input; `contexts` holds one embedding per forward, `others` what else a forward takes."""

    latents: Tensor
    timestep: Tensor
    contexts: tuple[Tensor, ...]
    guidance_scale: float
    others: Mapping[str, Any] = field(default_factory=dict)


def run_model(
    settings: ModelSettings,
    chip: ChipPeak,
    budget: Budget,
    on_result: Callable[[ModelProfile, list[Check], list[KernelShape]], None],
    on_work: OnWork = lambda words: None,
) -> tuple[ModelProfile, list[Check], list[KernelShape]]:
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
        forwards=2 if settings.guidance_scale > 1 and not settings.entry.embedded_guidance else 1,
        clip_steps=settings.clip_steps,
    )
    checks: list[Check] = []
    shapes: list[KernelShape] = []
    on_work("loading the model")
    pipeline, transformer, contexts = _load(settings, profile)
    if settings.compile:
        compile_blocks(transformer)
    with torch.no_grad(), _no_graph_cache():
        report = functools.partial(on_result, profile, checks, shapes)
        _steps(settings, transformer, contexts, profile, checks, budget, report, on_work)
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
        raise ModelError(f"a {facts.transformer} cannot be made without its weights: profile it with them")
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
        generator = torch.Generator("cpu").manual_seed(settings.seed)
        shape = (profile.forwards, 1, entry.max_sequence_length, entry.text_dim)
        contexts = torch.randn(shape, generator=generator).to(device, dtype)
        profile.notes.append("random weights and prompt embeddings: times are those of the model, errors are not")
        return None, transformer, tuple(contexts)
    pipeline = load_pipeline(settings.source, device=device, dtype=dtype, flow_shift=settings.flow_shift)
    negative = entry.defaults.negative_prompt
    arguments = (pipeline, settings.prompt, negative, settings.guidance_scale, entry.max_sequence_length)
    encode(*arguments)  # the first call pays for more than text
    profile.text_encode_s, embeddings = wall(lambda: encode(*arguments), device)
    if entry.transformers > 1:
        profile.notes.append("of two transformers the first is measured; the second has the same shape")
    return pipeline, pipeline.transformer, tuple(e.to(dtype) for e in embeddings.values() if e is not None)


def _steps(
    settings: ModelSettings,
    transformer: Any,
    contexts: tuple[Tensor, ...],
    profile: ModelProfile,
    checks: list[Check],
    budget: Budget,
    on_result: Callable[[], None],
    on_work: OnWork,
) -> None:
    inputs = _first_inputs(settings, contexts)
    masked = "encoder_attention_mask" in inputs.others
    contenders = make_contenders(
        transformer, settings.presets, settings.device, settings.dtype, settings.backends, masked
    )
    if masked:
        profile.notes.append("dense: preset dense, which leaves the text's padding out; the stock model masks it")
    ready: list[Contender] = []
    expected: Tensor | None = None
    for contender in contenders:
        if expected is not None and not budget.allows(0.0):
            contender.row = replace(contender.row, failure=f"--seconds {budget.seconds:g} left no time for it")
            continue
        on_work(f"{contender.row.name}: first steps")
        try:
            prediction = _warm_up(contender, transformer, inputs, settings.device)
        except Exception as error:
            contender.row = replace(contender.row, failure=reason(error))
            if contender.session is not None:
                contender.session.begin_clip()
        else:
            ready.append(contender)
            if contender.row.kind == "dense":
                if expected is not None:
                    checks.append(_exact_check(settings, prediction, expected, f"{contender.row.name} against dense"))
                expected = prediction if expected is None else expected
        _update(settings, profile, contenders)
        on_result()
    if expected is None:
        profile.notes.append("no dense attention ran, so nothing here can be compared with it")
    else:
        on_work("checking the plumbing")
        checks.append(_plumbing_check(settings, transformer, inputs, expected))
    sigmas = _sigmas(settings)
    round_s = 0.0
    for index in range(settings.steps):
        if index and not budget.allows(1.5 * round_s):
            profile.notes.append(f"--seconds ended the measurement after {index} of {settings.steps} steps")
            break
        on_work(f"step {index + 1} of {settings.steps}")
        inputs = replace(inputs, timestep=_timestep(sigmas[index], settings.device))
        round_s, velocity = wall(lambda: _round(ready, transformer, inputs, index, settings.device), settings.device)  # noqa: B023
        _update(settings, profile, contenders)
        on_result()
        if velocity is not None:  # Euler's method along dense attention's prediction
            inputs = replace(inputs, latents=inputs.latents + (sigmas[index + 1] - sigmas[index]) * velocity.float())
    on_work("first steps of warm presets")
    _cold_rows(settings, transformer, inputs, ready, profile, budget)
    on_result()


def _predict(contender: Contender, transformer: Any, inputs: _Inputs) -> Tensor:
    """The guided prediction of one denoising step."""
    with contender.enter():
        if contender.session is not None:
            contender.session.begin_step()
        latents = inputs.latents.to(inputs.contexts[0].dtype)
        parts = [
            transformer(
                hidden_states=latents,
                timestep=inputs.timestep,
                encoder_hidden_states=context,
                return_dict=False,
                **inputs.others,
            )[0]
            for context in inputs.contexts
        ]
        if len(parts) == 2:
            parts[0] = parts[1] + inputs.guidance_scale * (parts[0] - parts[1])
        if contender.session is not None:
            contender.session.end_step()
    prediction: Tensor = parts[0]
    return prediction


def _warm_up(contender: Contender, transformer: Any, inputs: _Inputs, device: torch.device) -> Tensor:
    """Cold step, and a second one, which is warm where the preset is, so that no later step compiles anything."""
    first_s, prediction = wall(lambda: _predict(contender, transformer, inputs), device)
    result: Tensor = prediction
    if not torch.isfinite(result).all():
        raise ValueError("the prediction is not finite")
    peak = call_memory(lambda: _predict(contender, transformer, inputs), device)
    if peak is None and contender.session is not None and contender.row.note == "warm":
        _predict(contender, transformer, inputs)
    contender.row = replace(contender.row, first_call_s=first_s, peak_bytes=peak)
    return result


def _round(
    ready: list[Contender], transformer: Any, inputs: _Inputs, index: int, device: torch.device
) -> Tensor | None:
    """One step of every contender, in the round's own order; returns dense attention's prediction."""
    predictions: dict[int, Tensor] = {}
    for contender in order_of_round(ready, index):
        try:
            predictions[id(contender)] = _timed_step(contender, transformer, inputs, device)
        except Exception as error:
            contender.row = replace(contender.row, failure=reason(error))
            ready.remove(contender)
    dense = next((c for c in ready if c.row.kind == "dense"), None)
    if dense is None:
        return None
    expected = predictions[id(dense)]
    for contender in ready:
        if contender.row.kind == "structured":
            contender.errors.append(relative_error(predictions[id(contender)], expected))
    return expected


def _timed_step(contender: Contender, transformer: Any, inputs: _Inputs, device: torch.device) -> Tensor:
    """The step's prediction; its times are added to the contender's."""
    found: list[Tensor] = []
    seconds = timed({"step": lambda: found.append(_predict(contender, transformer, inputs))}, device, repeats=1)
    contender.seconds += seconds["step"]
    if contender.session is not None:
        contender.attention.append(contender.session.steps[-1].attention_s)
    return found[0]


def _cold_rows(
    settings: ModelSettings,
    transformer: Any,
    inputs: _Inputs,
    ready: list[Contender],
    profile: ModelProfile,
    budget: Budget,
) -> None:
    """First steps of a clip for presets that start warm later on."""
    for contender in ready:
        session = contender.session
        if contender.row.note != "warm" or session is None or not contender.seconds:
            continue
        cold = replace(contender, seconds=[], attention=[], errors=[])
        try:
            for _ in range(min(COLD_REPEATS, settings.steps)):
                if cold.seconds and not budget.allows(2 * cold.seconds[0]):
                    break
                session.begin_clip()
                _timed_step(cold, transformer, inputs, settings.device)
        except Exception as error:
            profile.notes.append(f"first steps of {contender.row.name} were not measured: {reason(error)}")
            continue
        row = StepRow(
            contender.row.name, "structured", "cold", Spread.of(cold.seconds), statistics.median(cold.attention)
        )
        place = profile.rows.index(next(r for r in profile.rows if r.name == contender.row.name))
        profile.rows.insert(place, row)
    _clip_times(settings, profile)


def _update(settings: ModelSettings, profile: ModelProfile, contenders: list[Contender]) -> None:
    profile.rows = []
    for contender in contenders:
        row = contender.row
        if contender.seconds:
            period = contender.period
            row = replace(
                row,
                step=Spread.over(contender.seconds, period),
                attention_s=Spread.over(contender.attention, period).median if row.kind == "structured" else None,
                error=statistics.median(contender.errors) if contender.errors and not settings.random_weights else None,
            )
        profile.rows.append(row)
    _clip_times(settings, profile)


def _clip_times(settings: ModelSettings, profile: ModelProfile) -> None:
    """Denoising of a whole clip: dense first steps as the preset has them, one cold step, the rest as measured."""
    presets = {preset.name: preset for preset in settings.presets}
    dense = profile.fastest_dense
    for place, row in enumerate(profile.rows):
        if row.step is None or row.note == "cold" or row.kind == "skipped":
            continue
        preset = presets.get(row.name)
        steps = settings.clip_steps
        first = min(steps, preset.dense_steps) if preset and row.kind == "structured" else 0
        total = first * (dense.step.median if dense and dense.step else row.step.median)
        cold = profile.row(row.name, "cold")
        if cold is not None and cold.step is not None and steps > first:
            total += cold.step.median
            first += 1
        profile.rows[place] = replace(row, clip_s=total + (steps - first) * row.step.median)


def _first_inputs(settings: ModelSettings, contexts: tuple[Tensor, ...]) -> _Inputs:
    entry = settings.entry
    clip = LatentClip.of(entry, settings.height, settings.width, settings.num_frames)
    forward = forward_inputs(entry)
    noise = torch.randn(forward.latents(entry, clip), generator=torch.Generator("cpu").manual_seed(settings.seed))
    others = forward.others(entry, clip, settings.device, settings.dtype)
    return _Inputs(
        noise.to(settings.device), _timestep(1.0, settings.device), contexts, settings.guidance_scale, others
    )


def _sigmas(settings: ModelSettings) -> list[float]:
    """Noise levels of a clip's steps under the flow shift, from 1 to 0."""
    steps, shift = max(settings.clip_steps, settings.steps), settings.flow_shift
    even = [1 - index / steps for index in range(steps + 1)]
    return [shift * s / (1 + (shift - 1) * s) for s in even]


def _timestep(sigma: float, device: torch.device) -> Tensor:
    return torch.tensor([TIMESTEPS * sigma], device=device)


def _exact_check(settings: ModelSettings, prediction: Tensor, expected: Tensor, against: str) -> Check:
    return Check(relative_error(prediction, expected), _EXACT_BUDGET[settings.dtype], against)


def _plumbing_check(settings: ModelSettings, transformer: Any, inputs: _Inputs, expected: Tensor) -> Check:
    """A step with a band over all frames, which is dense attention by way of the structured code."""
    preset = load_preset("exact")
    layers = FAMILIES[type(transformer).__name__].self_attentions(transformer)
    session = AttentionSession(preset, [len(layers)])
    contender = structured(transformer, StepRow("exact", "structured"), session)
    against = "preset exact against dense, one whole step"
    try:
        return _exact_check(settings, _predict(contender, transformer, inputs), expected, against)
    except Exception as error:
        return Check(math.inf, _EXACT_BUDGET[settings.dtype], f"{against}: {reason(error)}")


def _decode(settings: ModelSettings, pipeline: Any, profile: ModelProfile, budget: Budget) -> None:
    """Decoding of one clip: pixels do not depend on the attention, so noise does."""
    inputs = _first_inputs(settings, (torch.zeros(1, device=settings.device),))
    step = next((r.step.median for r in profile.rows if r.step is not None), 0.0)
    if not budget.allows(step):
        profile.notes.append("--seconds left no time for decoding")
        return
    try:
        profile.decode_s, _ = wall(lambda: decode(pipeline, inputs.latents), settings.device)
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
    for length in lengths:
        if not budget.allows(0.0):
            profile.notes.append("--seconds left no time to look for the break-even length")
            return
        on_work(f"attention alone at {length} frames")
        try:
            shapes.append(profile_shape(kernel, chip, length, positions, 0.3 * budget.left, lambda words: None)[0])
        except Exception as error:
            profile.notes.append(f"attention alone at {length} frames was not measured: {reason(error)}")
    profile.break_even = [b for preset in presets if (b := break_even(preset.name, shapes)) is not None]
