"""From raw flags to a `Plan`: every setting resolved, with its origin, before any weight loads and without torch.

Precedence is flag > recipe > the user's own defaults > preset > model default > default of the tool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from vmonarch_cli.errors import PresetError, VmonarchError
from vmonarch_cli.media.paths import DEFAULT_QUALITY, check_format, resolve_targets
from vmonarch_cli.models.base import CACHES, ModelEntry, PipelineFacts
from vmonarch_cli.models.catalogue import PIPELINES
from vmonarch_cli.models.lora_facts import LoraFacts, describe, describe_local, is_local
from vmonarch_cli.models.lora_files import parse_lora
from vmonarch_cli.models.registry import DEMO_ALIAS, HOW_TO_GET_A_REAL_MODEL, find_model
from vmonarch_cli.plan import checks, warnings
from vmonarch_cli.plan.auto import AUTO, MARK, choose_preset
from vmonarch_cli.plan.costs import Work, branches_of
from vmonarch_cli.plan.defaults import Filled, fill, without
from vmonarch_cli.plan.noise_levels import OWN, check_sampler, check_sigmas, resolve_noise_levels, usual_sampling
from vmonarch_cli.plan.plan import GivenFile, Plan
from vmonarch_cli.plan.recipes import load_recipe, with_recipe
from vmonarch_cli.plan.request import GenerateRequest, flag_name
from vmonarch_cli.plan.seeds import DRAWN, RANDOM, check_last_seed, check_seed, draw_seed
from vmonarch_cli.plan.setup import DENSE_ATTENTION, OFFLOAD_MODES, QUANTIZATIONS, AdapterFile, Setup, check_additions
from vmonarch_cli.plan.small_calls import all_dense
from vmonarch_cli.plan.small_calls_here import limit_on
from vmonarch_cli.plan.tuned import Use, choose
from vmonarch_cli.presets import LABELS, Preset, apply_overrides, at_steps, few_steps_of, load_preset, parse_assignment
from vmonarch_cli.untrusted.files import known_sha256

FLAG, PRESET, MODEL_DEFAULT, DEFAULT = "flag", "preset", "model default", "default"
RECIPE, FEW_STEPS = "recipe", "few steps of the preset"
DEMO_NOTE = f"no --model given: using the small demo model that comes with vmonarch; {HOW_TO_GET_A_REAL_MODEL}"
Value = TypeVar("Value")


class CommandNeeds(NamedTuple):
    """What a command takes beside a request's settings, see `resolve`."""

    needs_prompt: bool = True
    needs_source: bool = True
    takes_dense: bool = True


def resolve(
    request: GenerateRequest, *, needs_prompt: bool = True, needs_source: bool = True, takes_dense: bool = True
) -> Plan:
    """Resolve and check a request; VmonarchError in one sentence for anything that cannot be done.

    needs_prompt: a plan that nothing runs can do without, and has an empty one. needs_source: a picture or a video must
    be given to a model that starts from one. takes_dense: dense attention is a way out, where structured attention
    cannot be had; a command that measures against it is told of others.
    """
    filled, needs = fill(request), CommandNeeds(needs_prompt, needs_source, takes_dense)
    try:
        with filled.blamed():
            plan = _with_preset(filled.request, needs)
    except VmonarchError as error:
        raise _with_place(error, request, filled, needs) from None
    return plan.model_copy(update={"origins": _with_origins(plan.origins, filled.origins())})


def _with_place(error: VmonarchError, request: GenerateRequest, filled: Filled, needs: CommandNeeds) -> VmonarchError:
    """The error, opened with the place of the user's own default that it is about: without that one there would be
    none or, where no flag has to do with it, another.
    """
    if any(level.source in error.message for level in filled.levels.values()):
        return error
    alone = refusal(GenerateRequest(defaults=request.defaults), CommandNeeds(False, False, needs.takes_dense))
    able = []
    for name in filled.levels:
        other = refusal(replace(request, defaults=without(request.defaults, {name})), needs)
        if other is None or (alone == error.message != other):
            able.append(name)
    named = the_one_named(able, error.message)
    return error if named is None else type(error)(f"{filled.levels[named].source}: {error.message}", error.exit_code)


def refusal(request: GenerateRequest, needs: CommandNeeds) -> str | None:
    """What a request is refused for, None where it is not: as `resolve` says it, before the place of a default is
    looked for whose flag the sentence does not name.
    """
    try:
        filled = fill(request)
        with filled.blamed():
            _with_preset(filled.request, needs)
    except VmonarchError as error:
        return error.message
    return None


def the_one_named(able: Sequence[str], sentence: str) -> str | None:
    """Of fields that a sentence may be about the one that it names, else the first; None of none."""
    return next((name for name in able if flag_name(name) in sentence), able[0] if able else None)


def _with_preset(request: GenerateRequest, needs: CommandNeeds) -> Plan:
    """The plan of a request, whose preset may be "auto"."""
    if request.preset != AUTO:
        return _resolve(request, needs)
    changes = ("dense_steps", "dense_layers", "impl", "tuned")
    plain: dict[str, Any] = {"preset": "dense", "overrides": (), **dict.fromkeys(changes)}
    name, why = choose_preset(_resolve(replace(request, **plain), needs))
    plan = _resolve(replace(request, preset=name), needs)
    origins = {**plan.origins, "preset": plan.origins["preset"] + MARK}
    return plan.model_copy(update={"preset_reason": why, "origins": origins})


def _with_origins(origins: dict[str, str], own: dict[str, str]) -> dict[str, str]:
    """The origins with those of the user's own defaults; a recipe's stay."""
    changed = {name: origin for name, origin in own.items() if origins.get(name, "").startswith(FLAG)}
    for name, mark in (("seed", DRAWN), ("preset", MARK)):
        if origins[name].endswith(mark) and name in changed:
            changed[name] += mark
    return {**origins, **changed}


def _resolve(request: GenerateRequest, needs: CommandNeeds) -> Plan:
    checks.texts(request)
    without = request.prompt is None and not needs.needs_prompt
    prompt = "" if without else checks.prompt(request.prompt)
    origins: dict[str, str] = {}

    def take(name: str, given: Value | None, default: Value, otherwise: str = MODEL_DEFAULT) -> Value:
        origins[name] = otherwise if given is None else FLAG
        return default if given is None else given

    revision = take("revision", request.revision, None, DEFAULT)
    model, source = find_model(take("model", request.model, DEMO_ALIAS, DEFAULT), revision)
    if revision is None and model.revision is not None:
        revision, origins["revision"] = model.revision, MODEL_DEFAULT
    defaults = model.defaults
    recipe = None if request.recipe is None else load_recipe(request.recipe)
    of_recipe: set[str] = set()
    if recipe is not None:
        recipe.check_model(model)
        request, of_recipe = with_recipe(request, recipe)
    preset = _resolve_preset(request, defaults.preset, origins)

    height, width = checks.size(request.size, request.height, request.width)
    height = take("height", height, defaults.height)
    width = take("width", width, defaults.width)
    num_frames = take("num_frames", request.num_frames, defaults.num_frames)
    model.check_shape(height, width, num_frames)

    image = checks.image(model, request.image, needed=needs.needs_source)
    video = checks.video(model, request.video, num_frames, image, needed=needs.needs_source)
    given_class = model.video_pipeline if video else model.image_pipeline if image else None
    facts = PIPELINES[given_class or model.pipeline]
    last_image = checks.last_image(model, facts, request.last_image)
    audio = checks.audio(model, facts, request.audio)
    take("audio", request.audio, audio)
    files = checks.transformer_files(model, facts, request)
    origins |= {name: FLAG if name in files else DEFAULT for name in ("transformer", "transformer_2")}

    checks.second_guidance(model, request.guidance_scale_2)
    seed = take("seed", check_seed(request.seed), 0, DEFAULT)
    if seed == RANDOM:
        seed, origins["seed"] = draw_seed(), origins["seed"] + DRAWN
    num_videos = take("num_videos", checks.whole("--num-videos", request.num_videos, 1, 1000), 1, DEFAULT)
    check_last_seed(seed, num_videos)
    sigmas = check_sigmas(request.sigmas) if request.sigmas else ()
    given_steps = checks.whole("--steps", request.steps, 1, 1000)
    steps = take("steps", given_steps if given_steps or not sigmas else len(sigmas), defaults.steps)
    checks.steps(model, steps)
    strength = checks.strength(facts, video, request.strength, sigmas)
    origins["strength"] = DEFAULT if request.strength is None else FLAG
    checks.flow_shift(model, request.flow_shift, sigmas)
    grid = model.grid(height, width, num_frames)
    checks.latent_frames(preset, model, grid[0], num_frames, or_dense=needs.takes_dense)
    origins |= dict.fromkeys((f"preset.{name}" for name in few_steps_of(preset, steps)), FEW_STEPS)
    chosen, preset = preset, at_steps(preset, steps)
    # A recipe, noise levels of the user's own and a given video say themselves how a clip is sampled.
    usual = OWN, defaults.guidance_scale
    if recipe is None and not sigmas and video is None:
        usual = usual_sampling(model, num_frames, steps)
    guidance = take("guidance_scale", checks.guidance(model, request.guidance_scale), usual[1])
    fps = take("fps", checks.fps(model, request.fps, sound=bool(audio)), defaults.fps)
    checks.sound_length(model, num_frames, fps)
    outputs = resolve_targets(
        take("output", request.output, None, DEFAULT),
        prompt,
        seed,
        num_videos,
        request.overwrite,
        with_sound=bool(audio),
    )
    check_format(outputs, fps, height, width)
    flow_shift = take(
        "flow_shift",
        checks.number("--flow-shift", request.flow_shift, 0.01, 100),
        None if sigmas else defaults.flow_shift,
    )
    given = sum(path is not None for path in (image, last_image))
    others = model.other_tokens(height, width, num_frames, given)
    otherwise = DEFAULT if usual[0] == OWN else MODEL_DEFAULT
    sampler = take("sampler", check_sampler(request.sampler), usual[0], otherwise)
    levels = resolve_noise_levels(model, sampler, sigmas, steps, flow_shift, strength)
    work = Work(model, grid, steps, branches_of(model, guidance), flow_shift, others, levels.sigmas)
    step_costs = tuple(work.step_costs(preset))
    flops = work.flops(preset, step_costs)
    use = Use(source, revision, facts, chosen, steps, guidance, height, width, num_frames, replaced=bool(files))
    choice = choose(request.tuned, use)
    origins["tuned"] = DEFAULT if request.tuned is None else FLAG
    if choice.is_shipped:
        origins["tuned"] = MODEL_DEFAULT
    tokens = grid[0] * grid[1] * grid[2]
    return Plan(
        model=model,
        model_source=source,
        prompt=prompt,
        negative_prompt=take("negative_prompt", request.negative_prompt, defaults.negative_prompt),
        height=height,
        width=width,
        num_frames=num_frames,
        fps=fps,
        steps=steps,
        guidance_scale=guidance,
        guidance_scale_2=take(
            "guidance_scale_2",
            checks.number("--guidance-scale-2", request.guidance_scale_2, 0, 100),
            defaults.guidance_scale_2,
        ),
        flow_shift=flow_shift,
        recipe=take("recipe", request.recipe, None, DEFAULT),
        sampler=sampler,
        sigmas=take("sigmas", sigmas or None, (), DEFAULT),
        noise_levels=levels.sigmas,
        noise_levels_forced=levels.forced,
        seed=seed,
        num_videos=num_videos,
        quality=take("quality", checks.whole("--quality", request.quality, 1, 10), DEFAULT_QUALITY, DEFAULT),
        preset=preset,
        device=(device := take("device", checks.device(request.device), "auto", DEFAULT)),
        dtype=take("dtype", checks.dtype(request.dtype), "auto", DEFAULT),
        dense_every=take(
            "dense_every", checks.whole("--dense-every", request.dense_every, 0, 1000), defaults.dense_every
        ),
        outputs=outputs,
        overwrite=request.overwrite,
        grid=grid,
        tokens=tokens,
        flops=flops,
        step_costs=step_costs,
        revision=revision,
        image=take("image", image, None, DEFAULT),
        last_image=take("last_image", last_image, None, DEFAULT),
        video=take("video", video, None, DEFAULT),
        given_files=_given_files({"image": image, "last image": last_image, "video": video}),
        strength=strength,
        audio=audio,
        setup=(setup := _resolve_setup(request, facts, origins, choice.tuned).model_copy(update=files)),
        loras=(loras := _describe_loras(setup.loras, model)),
        tuned_note=choice.note,
        origins={"prompt": DEFAULT if without else FLAG, **origins, **dict.fromkeys(of_recipe, RECIPE)},
        notes=(DEMO_NOTE,) if model.alias == DEMO_ALIAS and request.model is None else (),
        warnings=(
            *warnings.of_demo(model, prompt, (height, width, num_frames)),
            *warnings.of_flags(request, model, facts, guidance),
            *warnings.of_video(video, facts, levels.sigmas),
            *warnings.without_effect(request, preset, outputs, source),
            *warnings.of_schedule(
                preset,
                step_costs,
                flops,
                small=all_dense(tokens, preset, limit_on(device, setup, preset, model.hidden_dim)),
                or_dense=needs.takes_dense,
            ),
            *warnings.of_cache(request.cache, steps),
            *warnings.of_quantize(setup, facts),
            *warnings.of_loras(setup.loras, loras, model, guidance),
            *choice.warnings,
        ),
    )


def _resolve_setup(
    request: GenerateRequest, facts: PipelineFacts, origins: dict[str, str], tuned: AdapterFile | None
) -> Setup:
    """What is done to the pipeline beside its attention; InputError for what it cannot have."""
    given = {
        "offload": checks.one_of("--offload", request.offload, OFFLOAD_MODES),
        "vae_tiling": request.vae_tiling or None,
        "vae_dtype": checks.dtype(request.vae_dtype, "--vae-dtype"),
        "quantize": checks.one_of("--quantize", request.quantize, QUANTIZATIONS),
        "loras": request.loras or None,
        "cache": checks.one_of("--cache", request.cache, CACHES),
        "compile": request.compile or None,
        "fuse": request.fuse,
        "graphs": request.graphs,
        "dense_below": checks.whole("--dense-below", request.dense_below, 0, 1_000_000),
        "dense_attention": checks.one_of("--dense-attention", request.dense_attention, DENSE_ATTENTION),
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    origins |= {name: FLAG if name in chosen else DEFAULT for name in given}
    setup = Setup(**chosen, tuned=() if tuned is None else (tuned,))
    check_additions(setup, facts)
    return setup


def _given_files(files: dict[str, str | None]) -> tuple[GivenFile, ...]:
    """Pictures and videos with the hashes of their contents, of paths that were looked at."""
    found = {part: file for part, file in files.items() if file is not None}
    return tuple(GivenFile(part=part, file=file, sha256=known_sha256(Path(file))) for part, file in found.items())


def _describe_loras(texts: tuple[str, ...], model: ModelEntry) -> tuple[LoraFacts, ...]:
    """What the LoRA files on this disk are; InputError or ModelError for one that cannot be for the model."""
    return tuple(facts for text in texts for facts in describe_local(parse_lora(text), model))


def with_hub_loras(plan: Plan) -> Plan:
    """The plan with what its LoRAs of the hub are, too, which are downloaded for it; ModelError where they are not."""
    loras = [parse_lora(text) for text in plan.setup.loras]
    if all(is_local(lora) for lora in loras):
        return plan
    return plan.model_copy(update={"loras": tuple(facts for lora in loras for facts in describe(lora, plan.model))})


def _resolve_preset(request: GenerateRequest, default: str, origins: dict[str, str]) -> Preset:
    """The preset with `--set`, `--dense-steps`, `--dense-layers` and `--impl` applied, and the origin of each field."""
    preset = load_preset(default if request.preset is None else request.preset, or_auto=True)
    origins["preset"] = MODEL_DEFAULT if request.preset is None else FLAG
    overrides: dict[str, tuple[str, Any]] = {}
    for text in request.overrides:
        name, value = parse_assignment(text)
        if name in overrides:
            raise PresetError(f"--set: field '{name}' is given twice")
        overrides[name] = ("--set", value)
    for name in ("dense_steps", "dense_layers", "impl"):
        value = getattr(request, name)
        if value is not None:
            if name in overrides:
                raise PresetError(f"field '{name}' is given twice, by --set and by --{name.replace('_', '-')}")
            overrides[name] = (f"--{name.replace('_', '-')}", value)
    resolved = apply_overrides(preset, overrides)
    for name in Preset.model_fields:
        if name not in LABELS:
            written = PRESET if name in preset.model_fields_set else DEFAULT
            origins[f"preset.{name}"] = FLAG if name in overrides else written
    return resolved
