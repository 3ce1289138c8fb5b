"""The JSON record beside a clip: what it says, and how the clip is made again (`record_model` reads it). No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pydantic.dataclasses
from pydantic import ConfigDict, ValidationError

from vmonarch_cli import __version__
from vmonarch_cli.clip.record_model import RECORD_SCHEMA, Record, read_record
from vmonarch_cli.clip.record_parts import TunedFacts
from vmonarch_cli.errors import InputError
from vmonarch_cli.machine.versions import installed_versions
from vmonarch_cli.media.paths import sound_path
from vmonarch_cli.media.sound import Sound
from vmonarch_cli.media.tags import RECORD
from vmonarch_cli.media.write import Pixels, record_text
from vmonarch_cli.models.catalogue import PIPELINES
from vmonarch_cli.models.lora_files import parse_lora
from vmonarch_cli.models.registry import DEMO_ALIAS
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve
from vmonarch_cli.plan.setup import AdapterFile
from vmonarch_cli.plan.small_calls import DENSE_BELOW
from vmonarch_cli.plan.tuned import NONE, Use, check, read
from vmonarch_cli.presets import Preset
from vmonarch_cli.timing import ClipTiming
from vmonarch_cli.untrusted.files import known_sha256
from vmonarch_cli.untrusted.shapes import fault_of

if TYPE_CHECKING:
    from vmonarch_cli.clip.latents import Denoised
    from vmonarch_cli.clip.stream import Tags
    from vmonarch_cli.pipeline.decode_retry import Retries
    from vmonarch_cli.pipeline.preflight import Machine

_REPEATED = "record"
_TITLE = 1000
"""Characters of a prompt in a file's title; the record has all."""
_StrictRequest = pydantic.dataclasses.dataclass(
    GenerateRequest, frozen=True, config=ConfigDict(strict=True, allow_inf_nan=False)
)
"""A request whose fields are checked against their types as they stand: a record is a stranger's file."""


def make_record(
    plan: Plan,
    denoised: Denoised,
    timing: ClipTiming | None,
    clip: Path,
    pixels: Pixels,
    written: dict[str, Any] | None,
    vae_dtype: str | None = None,
    sound: Sound | None = None,
) -> dict[str, Any]:
    """What the JSON file beside a clip says: enough to repeat the clip and to trust its figures.

    `pixels`: the frames as decoded. `written`: size and hash of the clip's file, see
    `whole.file_facts`; None where there is none. `vae_dtype`: what the frames were decoded in.
    """
    plan = _as_it_ran(plan, denoised)
    return {
        "schema": RECORD_SCHEMA,
        "prompt": plan.prompt,
        "seed": denoised.seed,
        "clip": clip.name,
        "frames": {
            "count": pixels.count,
            "height": pixels.height,
            "width": pixels.width,
            "fps": plan.fps,
            "sha256": pixels.sha256,
        },
        "file": written,
        "settings": plan.settings(),
        "preset": plan.preset.model_dump(exclude={"evidence"}),
        **({} if plan.preset_reason is None else {"preset_reason": plan.preset_reason}),
        "model": {"source": plan.model_source, **plan.model.model_dump(mode="json")},
        "grid": list(denoised.grid),
        "tokens": plan.tokens,
        "flops": plan.flops.model_dump(),
        "schedule": [row.model_dump() for row in plan.step_costs],
        "device": denoised.device,
        "dtype": denoised.dtype,
        "vae_dtype": vae_dtype,
        "impl": denoised.impl,
        "fused": denoised.fused,
        **({} if denoised.linear_dtype is None else {"linear_dtype": denoised.linear_dtype}),
        **({"dense_below": denoised.dense_below} if denoised.dense_below else {}),
        **({"replayed_calls": denoised.replayed_calls} if denoised.replayed_calls else {}),
        "dense_attention": denoised.dense_attention,
        "coverage": denoised.coverage.to_json(),
        **({} if timing is None else {"timing": timing.to_json()}),
        "versions": installed_versions(),
        "warnings": [*plan.warnings, *denoised.warnings],
        "retries": list(denoised.retries),
        # Files beside the model have hashes: "tuned", "weights", "loras" and "given".
        "setup": plan.setup.model_dump(exclude={"tuned", "transformer", "transformer_2", "fused_impl"}),
        "tuned": None if plan.tuned is None else plan.tuned.facts(),
        "sigmas": [step.sigma for step in denoised.steps],
        "loras": [facts.model_dump() for facts in plan.loras],
        **({"given": [file.model_dump() for file in plan.given_files]} if plan.given_files else {}),
        "skipped_calls": denoised.skipped_calls,
        **({"stopped_after": len(denoised.steps)} if len(denoised.steps) < plan.steps else {}),
        **({"weights": list(denoised.weights)} if denoised.weights else {}),
        **({} if sound is None else {"audio": _sound_facts(sound, clip)}),
    }


def _as_it_ran(plan: Plan, denoised: Denoised) -> Plan:
    """The plan, with the costs of dense attention where all its calls ran dense because they are small."""
    if denoised.coverage.structured or DENSE_BELOW not in denoised.coverage.dense:
        return plan
    return plan.with_dense_costs()


def decoding_facts(machine: Machine) -> dict[str, Any]:
    """What the record says of how frames were decoded, where nobody asked for it."""
    return {"decoded_in_tiles": True} if machine.tiles else {}


def tags_of(plan: Plan, machine: Machine, denoised: Denoised, clip: Path, vae_dtype: str) -> Tags:
    """What a clip's own file says: prompt, seed, and as its comment the record, as far as it is the same for the same
    clip wherever and whenever it is made: without its times, the file's facts and its place.
    """

    def tags(sound: Sound | None, retries: Retries, pixels: Pixels) -> dict[str, str]:
        whole = dataclasses.replace(denoised, retries=(*denoised.retries, *retries))
        record = make_record(plan, whole, None, clip, pixels, None, vae_dtype, sound) | decoding_facts(machine)
        record["settings"].pop("output", None)
        about = f"seed {denoised.seed}, {plan.model.title}, preset {plan.preset.name}; vmonarch {__version__}"
        return {"title": plan.prompt[:_TITLE], "description": about, RECORD: record_text(record, indent=None)}

    return tags


def _sound_facts(sound: Sound, clip: Path) -> dict[str, Any]:
    """What the record says of a clip's sound: samples of each channel, samples a second, the file that holds them, and
    the hash of all as they were before a lossy file.
    """
    return {
        "file": sound_path(clip).name,
        "rate": sound.rate,
        "samples": len(sound.samples),
        "channels": sound.channels,
        "sha256": sound.sha256(),
    }


def make_timing(
    denoised: Denoised,
    decode_s: float,
    write_s: float,
    peak: tuple[int, str],
    *,
    load_s: float | None = None,
    hidden_write_s: float = 0.0,
    hidden_compile_s: float = 0.0,
) -> ClipTiming:
    """Where a clip's time went: what its latents took, and the rest, in seconds as `ClipTiming` names them. `peak`:
    bytes, and what they count.
    """
    first_calls = [step.first_call_s for step in denoised.steps if step.first_call_s is not None]
    return ClipTiming(
        steps=denoised.steps,
        text_encode_s=denoised.text_encode_s,
        denoise_s=denoised.denoise_s,
        decode_s=decode_s,
        write_s=denoised.save_s + write_s,
        total_s=denoised.total_s + denoised.save_s + decode_s + write_s,
        excluded_s=denoised.excluded_s,
        first_call_s=sum(first_calls) if first_calls else None,
        peak_memory_bytes=max(peak[0], denoised.peak_memory_bytes),
        peak_memory_kind=peak[1],
        warm_state_bytes=denoised.warm_state_bytes,
        preview_s=denoised.preview_s,
        load_s=load_s,
        hidden_write_s=hidden_write_s,
        hidden_compile_s=hidden_compile_s,
    )


def overlap_facts(denoised: Denoised, decoded_beside: bool) -> dict[str, Any]:
    """What the record says of a clip whose times were measured beside another clip's work; nothing of one that was
    alone. `decoded_beside`: another one was denoised while it was decoded and written.
    """
    steps = list(denoised.steps_beside_decoding)
    if not steps and not decoded_beside:
        return {}
    return {"overlap": {"steps_beside_decoding": steps, "decoded_beside_denoising": decoded_beside}}


def plan_again(
    file: Path,
    output: str | None,
    overwrite: bool = False,
    device: str | None = None,
    vae_dtype: str | None = None,
) -> Plan:
    """A plan that makes the clip of a record again, every setting as it was resolved then; its notes say what it loads.

    A GPU's clip on a CPU: what nobody chose and a CPU has not (Triton, fused blocks, backends of dense attention) is
    chosen anew.
    InputError or ModelError when the record asks for something that this version or this machine does not have.
    """
    record = read_record(file)
    name = f"record {file} cannot be repeated"
    if record.device is None or record.dtype is None or "model" not in record.settings:
        absent = "device" if record.device is None else "dtype" if record.dtype is None else "settings.model"
        raise InputError(f"{name}: it has no {absent}")
    fields = {field.name for field in dataclasses.fields(GenerateRequest)}
    given: dict[str, Any] = {key: entry.value for key, entry in record.settings.items() if key in fields}
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    if record.model.alias != DEMO_ALIAS and record.model.hub_id is None:
        given["model"] = record.model.source  # a folder: its alias is only its name
    given |= {
        "preset": None,
        "recipe": None,  # what it gave is among the settings
        "seed": record.seed,
        "num_videos": None,
        "dtype": record.dtype,
        "vae_dtype": vae_dtype,
        "device": device or record.device.type.partition(":")[0],
        "output": output if output is not None else str(file.parent / f"{file.stem}-rerun{Path(record.clip).suffix}"),
        "overwrite": overwrite,
        "tuned": NONE,  # the record's own is chosen below, where the preset is known
    }
    elsewhere = record.device.type.startswith("cuda") and not given["device"].startswith("cuda")
    given |= {"fuse": None if elsewhere else record.fused is not None, "dense_below": record.dense_below}
    try:
        _StrictRequest(**given)
        ran = {} if elsewhere else _implementation(record)
        preset = Preset.model_validate({**record.preset.model_dump(), **ran})
    except ValidationError as error:
        raise InputError(f"{name}: {fault_of(error)}") from None
    plan = resolve(GenerateRequest(**given))
    origins = dict.fromkeys(plan.origins, _REPEATED)
    work = plan.work
    step_costs = tuple(work.step_costs(preset))
    costs = {"flops": work.flops(preset, step_costs), "step_costs": step_costs}
    setup = plan.setup
    if vae_dtype is None and (then := _decoded_in(record)) is not None:
        setup = setup.model_copy(update={"vae_dtype": then})
    if record.decoded_in_tiles:
        setup = setup.model_copy(update={"vae_tiling": True})
    if record.dense_attention is not None and record.coverage.dense and not elsewhere:
        setup = setup.model_copy(update={"dense_attention": record.dense_attention})
    if record.tuned is not None:
        setup = setup.model_copy(update={"tuned": (_adapter(record.tuned, plan, preset, name),)})
    again = {"preset": preset, "setup": setup, **costs, "origins": origins, "warnings": ()}
    plan = plan.model_copy(update=again)
    return plan.model_copy(update={"notes": tuple(_loads(plan))})


def _adapter(then: TunedFacts, plan: Plan, preset: Preset, name: str) -> AdapterFile:
    """The adapter of a record, if it is the same file still; the model's own may lie elsewhere by now."""
    facts = PIPELINES[plan.pipeline]
    shape = (plan.height, plan.width, plan.num_frames)
    use = Use(plan.model_source, plan.revision, facts, preset, plan.steps, plan.guidance_scale, *shape)
    path = Path(then.path)
    if not path.is_file():
        path = next((own for own in use.shipped() if known_sha256(own) == then.sha256), path)
    tuned = read(path)
    if tuned.sha256 != then.sha256:
        raise InputError(
            f"{name}: adapter {path} is another one by now (SHA-256 {then.sha256[:12]} then, {tuned.sha256[:12]} now)"
        )
    check(tuned, use)
    return tuned


def _decoded_in(record: Record) -> str | None:
    """What the frames were decoded in, in place of "auto"; None where it is what the rest runs in."""
    if record.vae_dtype is not None:
        return record.vae_dtype
    return "float32" if record.model.vae_float32 else None  # of a version that had no choice


def _implementation(record: Record) -> dict[str, str]:
    """The implementation that ran, in place of "auto": another one may round otherwise."""
    return {} if record.impl in (None, "", "dense") else {"impl": str(record.impl)}


def _loads(plan: Plan) -> Iterator[str]:
    """What a plan reads besides the program's own files: whoever repeats a stranger's record should know."""
    if plan.model.alias != DEMO_ALIAS:
        yield f"the record loads the model {_place(plan.model_source)}"
    for text in plan.setup.loras:
        yield f"the record loads the LoRA {_place(parse_lora(text).source)}"
    if plan.tuned is not None:
        yield f"the record loads the tuned adapter {plan.tuned.path}"
    for file in plan.setup.single_files.values():
        yield f"the record loads the transformer {_place(file)}"
    for path in plan.given_frames:
        yield f"the record reads the image {path}"
    if plan.video is not None:
        yield f"the record reads the video {plan.video}"


def _place(source: str) -> str:
    path = Path(source)
    return f"folder {source}" if path.is_dir() else f"file {source}" if path.exists() else f"{source} of the hub"
