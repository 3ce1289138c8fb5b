"""Flags of `vmonarch profile`, checked before torch is imported."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vmonarch_cli.cli.profile.flags import ShapeFlags
from vmonarch_cli.demo.captions import plain_caption
from vmonarch_cli.demo.score import held_out_specs
from vmonarch_cli.errors import InputError, ModelError
from vmonarch_cli.models.base import ModelEntry
from vmonarch_cli.models.catalogue import ENTRIES, PIPELINES
from vmonarch_cli.models.registry import DEMO_ALIAS, find_model
from vmonarch_cli.plan import checks
from vmonarch_cli.plan.setup import DENSE_ATTENTION, AdapterFile
from vmonarch_cli.plan.tuned import NONE, Use, choose, read
from vmonarch_cli.presets import Preset, load_preset, shipped_names
from vmonarch_cli.profile.variants import GENERIC_PROMPTS
from vmonarch_cli.text import shown, with_article
from vmonarch_cli.untrusted.files import user_path

WAN = "WanPipeline"
BACKENDS = tuple(name for name in DENSE_ATTENTION if name not in ("auto", "sdpa"))
MAX_TOKENS = 2_000_000
MAX_FRAMES = 256


@dataclass(frozen=True)
class ModelShape:
    """A model, where its weights are ("" where they are not needed), and a shape that it can make."""

    entry: ModelEntry
    source: str
    height: int
    width: int
    num_frames: int


def shapes(texts: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """(frames, positions) of `--shape TxP` values."""
    found = []
    for text in texts:
        match = re.fullmatch(r"\s*(\d{1,4})\s*[xX*×]\s*(\d{1,7})\s*", text)
        if match is None:
            raise InputError(
                f"--shape takes latent frames x positions per frame, as in 21x1560 or 20x1456, got {shown(text)}"
            )
        frames, positions = int(match[1]), int(match[2])
        if not 1 <= frames <= MAX_FRAMES:
            raise InputError(f"--shape takes 1 to {MAX_FRAMES} latent frames, got {frames}")
        if not 1 <= frames * positions <= MAX_TOKENS:
            raise InputError(f"--shape takes shapes of 1 to {MAX_TOKENS:,} tokens, got {frames * positions:,}")
        found.append((frames, positions))
    return tuple(dict.fromkeys(found))


def presets(names: Sequence[str] | None, default: Sequence[str], impl: str | None = None) -> tuple[Preset, ...]:
    """The structured presets of `--preset` (all of `default` when none is given), each name once."""
    found = [load_preset(name) for name in (names or default)]
    for name, preset in zip(names or (), found, strict=False):
        if preset.attention == "dense":
            raise InputError(f"--preset {name} is dense attention, which is measured anyway: name a structured preset")
    if impl is not None:
        if impl not in ("auto", "reference", "torch", "triton"):
            raise InputError(f"--impl takes auto, reference, torch or triton, got {shown(impl)}")
        found = [preset.model_copy(update={"impl": impl}) for preset in found]
    kept = {preset.name: preset for preset in found if preset.attention != "dense"}
    return tuple(kept.values())


def adapters(
    given: Sequence[str] | None, clip: ModelShape, chosen: Sequence[Preset], steps: int, guidance_scale: float
) -> tuple[list[AdapterFile], list[str]]:
    """The adapters of `--tuned`, each with the preset that it was made for, or those that the model brings for the
    chosen presets; and what the user should know of them. InputError for one that does not belong to the model.
    """
    shape = (clip.height, clip.width, clip.num_frames)
    facts = PIPELINES[clip.entry.pipeline]

    def use(preset: Preset) -> Use:
        return Use(clip.source, None, facts, preset, steps, guidance_scale, *shape)

    if given and NONE in given:
        if len(given) > 1:
            raise InputError("--tuned none goes without adapters: leave out the others")
        return [], []
    if given:
        presets = [read(user_path(text, "--tuned")).adapter.made_for for text in given]
        choices = [choose(text, use(preset)) for text, preset in zip(given, presets, strict=True)]
    else:
        choices = [choose(None, use(preset)) for preset in chosen]
    found = {choice.tuned.sha256: choice.tuned for choice in choices if choice.tuned is not None}
    said = [(*choice.warnings, *([] if choice.note is None else [choice.note])) for choice in choices]
    return list(found.values()), [sentence for sentences in said for sentence in sentences]


def backends(names: Sequence[str] | None) -> tuple[str, ...]:
    """Dense backends of `--backend`, each once; none means every one that the device has."""
    for name in names or ():
        if name not in BACKENDS:
            raise InputError(f"--backend takes {', '.join(BACKENDS)}, got {shown(name)}")
    return tuple(dict.fromkeys(names or ()))


def all_structured() -> tuple[str, ...]:
    """Names of the shipped presets that are not dense."""
    return tuple(name for name in shipped_names() if load_preset(name).attention != "dense")


def model_shape(flags: ShapeFlags, *, random: bool) -> ModelShape:
    """The model (the demo by default) and a shape; with random weights an alias needs no weights to be there."""
    name = flags.model
    try:
        entry, source = find_model(DEMO_ALIAS if name is None else name)
    except ModelError:
        known = next((e for e in ENTRIES if e.alias == (name or DEMO_ALIAS)), None)
        if not random or known is None:
            raise
        entry, source = known, ""
    profiled = sorted((name for name, facts in PIPELINES.items() if facts.transformer_config is not None), key=len)
    if entry.pipeline not in profiled:
        raise InputError(
            f"whole models are profiled for {', '.join(profiled)}, and {entry.alias} is "
            f"{with_article(entry.pipeline)}: `vmonarch profile kernel --shape TxP --heads H --head-dim D` measures "
            "its attention"
        )
    if entry.pipeline != WAN and not random:
        raise InputError(
            f"with its own weights only a {WAN} is profiled, and {entry.alias} is {with_article(entry.pipeline)}: "
            "add --random-weights, which takes the same time"
        )
    given_height, given_width = checks.size(flags.size, flags.height, flags.width)
    defaults = entry.defaults
    found = ModelShape(
        entry,
        source,
        given_height or defaults.height,
        given_width or defaults.width,
        defaults.num_frames if flags.num_frames is None else flags.num_frames,
    )
    entry.check_shape(found.height, found.width, found.num_frames)
    return found


def fewer_layers(clip: ModelShape, layers: int | None, *, random: bool) -> ModelShape:
    """The same with so many layers of its transformer; InputError for more than it has, or for its own weights."""
    if layers is None:
        return clip
    if not random:
        raise InputError("--layers leaves out layers of random weights: add --random-weights")
    checks.whole("--layers", layers, 1, clip.entry.layers)
    return replace(clip, entry=clip.entry.model_copy(update={"layers": layers}))


def check_frames(clip: ModelShape, presets: Sequence[Preset]) -> None:
    """InputError for more frames than a structured preset takes of the model."""
    frames = clip.entry.grid(clip.height, clip.width, clip.num_frames)[0]
    for preset in presets:
        checks.latent_frames(preset, clip.entry, frames, clip.num_frames, or_dense=False)


def check_sampling(
    entry: ModelEntry, steps: int | None, guidance_scale: float | None, flow_shift: float | None
) -> None:
    """InputError when one of these flags is out of its range, or of what the model can have."""
    checks.whole("--steps", steps, 1, 1000)
    checks.guidance(entry, guidance_scale)
    checks.flow_shift(entry, flow_shift)
    checks.number("--flow-shift", flow_shift, 0.01, 100)


def prompts(clip: ModelShape, given: Sequence[str] | None, count: int) -> tuple[str, ...]:
    """The prompts given, or `count` of the demo's held-out prompts of clips so long, or of a short list for others."""
    entry = clip.entry
    if given:
        return tuple(checks.prompt(text) for text in given)
    if entry.alias == DEMO_ALIAS:
        return tuple(plain_caption(spec) for spec in held_out_specs(count, clip.num_frames))
    if count > len(GENERIC_PROMPTS):
        raise InputError(
            f"--prompts takes at most {len(GENERIC_PROMPTS)} for {entry.alias}, got {count}: give more with --prompt"
        )
    return GENERIC_PROMPTS[:count]
