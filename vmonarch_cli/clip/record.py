"""The JSON record beside a clip: what it says, how it is read back, and how the clip is made again. No torch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmonarch_cli.errors import InputError, PresetError
from vmonarch_cli.machine.versions import installed_versions
from vmonarch_cli.media.paths import ENDINGS, record_path
from vmonarch_cli.media.write import frames_hash
from vmonarch_cli.plan.costs import branches_of, count_flops
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve
from vmonarch_cli.presets import Preset
from vmonarch_cli.timing import ClipTiming

if TYPE_CHECKING:
    from vmonarch_cli.clip.latents import Denoised
    from vmonarch_cli.pipeline.call import Frames

RECORD_SCHEMA = 1
"""Version of the record's layout; raised when a reader of an older one would misread it."""

_MAX_BYTES = 64 << 20
_NEEDED = ("schema", "prompt", "seed", "clip", "settings", "preset", "model", "frames")
_REPEATED = "record"


def make_record(plan: Plan, denoised: Denoised, timing: ClipTiming, clip: Path, frames: Frames) -> dict[str, Any]:
    """What the JSON file beside a clip says: enough to repeat the clip and to trust its figures.

    `frames`: (F, H, W, 3), uint8, as decoded.
    """
    return {
        "schema": RECORD_SCHEMA,
        "prompt": plan.prompt,
        "seed": denoised.seed,
        "clip": clip.name,
        "frames": {
            "count": len(frames),
            "height": frames.shape[1],
            "width": frames.shape[2],
            "fps": plan.fps,
            "sha256": frames_hash(frames),
        },
        "settings": plan.settings(),
        "preset": plan.preset.model_dump(),
        "model": {"source": plan.model_source, **plan.model.model_dump(mode="json")},
        "grid": list(denoised.grid),
        "tokens": plan.tokens,
        "flops": plan.flops.model_dump(),
        "device": denoised.device,
        "dtype": denoised.dtype,
        "impl": denoised.impl,
        "coverage": denoised.coverage.to_json(),
        "timing": timing.to_json(),
        "versions": installed_versions(),
        "warnings": list(plan.warnings),
        "retries": list(denoised.retries),
        "setup": plan.setup.model_dump(),
        "skipped_calls": denoised.skipped_calls,
    }


def make_timing(denoised: Denoised, decode_s: float, write_s: float, peak: tuple[int, str]) -> ClipTiming:
    """Where a clip's time went: what its latents took, and the rest. `peak`: bytes, and what they count."""
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
    )


def read_record(path: Path) -> dict[str, Any]:
    """The record in a file, or beside a clip; InputError when it is none."""
    file = record_path(path) if path.suffix.lower() in ENDINGS else path
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise InputError(f"{file} is not the record of a clip: it is larger than any record")
        record = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"there is no record {file}: vmonarch writes one beside each clip, as in clip.json") from None
    except OSError as error:
        raise InputError(f"record {file} cannot be read: {error.strerror}") from None
    except ValueError:
        raise InputError(f"{file} is not the record of a clip: it is not valid JSON") from None
    missing = [name for name in _NEEDED if not isinstance(record, dict) or name not in record]
    if missing:
        raise InputError(f"{file} is not the record of a clip: it has no {missing[0]}")
    return dict(record)


def clip_of(record: dict[str, Any], file: Path) -> Path:
    """Where the clip of a record is: beside it, under the record's own name, also when both were renamed."""
    return file.with_suffix(Path(str(record["clip"])).suffix)


def settings_of(record: dict[str, Any]) -> dict[str, Any]:
    """Every resolved setting by name, and what it ran on: what two records can be compared by."""
    values = {name: entry["value"] for name, entry in record["settings"].items() if name != "output"}
    values["seed"] = record["seed"]  # of this clip, where a run made several
    values["num_videos"] = 1
    values["model.source"] = record["model"].get("source")
    values["device"] = (record.get("device") or {}).get("name")
    values["dtype"], values["impl"] = record.get("dtype"), record.get("impl")
    return values


def plan_again(file: Path, output: str | None, overwrite: bool = False, device: str | None = None) -> Plan:
    """A plan that makes the clip of a record again, every setting as it was resolved then.

    InputError or ModelError when the record asks for something that this version or this machine does not have.
    """
    record = read_record(file)
    fields = {field.name for field in dataclasses.fields(GenerateRequest)}
    try:
        given = {name: entry["value"] for name, entry in record["settings"].items() if name in fields}
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        model = str(given["model"])
        if record["model"]["alias"] != "demo" and record["model"].get("hub_id") is None:
            model = str(record["model"]["source"])  # a folder: its alias is only its name
        preset = Preset(**{**record["preset"], **_implementation(record)})
        given |= {
            "model": model,
            "preset": None,
            "seed": record["seed"],
            "num_videos": None,
            "dtype": record["dtype"],
            "device": device or str(record["device"]["type"]).partition(":")[0],
            "output": output or str(file.parent / f"{file.stem}-rerun{Path(str(record['clip'])).suffix}"),
            "overwrite": overwrite,
        }
        plan = resolve(GenerateRequest(**given))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"record {file} cannot be repeated: its settings do not parse ({error})") from None
    except PresetError as error:
        raise InputError(f"record {file} cannot be repeated: {error.message}") from None
    branches = branches_of(plan.model, plan.guidance_scale)
    flops = count_flops(plan.model, plan.grid, preset, plan.steps, branches)
    origins = dict.fromkeys(plan.origins, _REPEATED)
    return plan.model_copy(update={"preset": preset, "flops": flops, "origins": origins, "notes": (), "warnings": ()})


def _implementation(record: dict[str, Any]) -> dict[str, str]:
    """The implementation that ran, in place of "auto": another one may round otherwise."""
    impl = record.get("impl")
    return {} if impl in (None, "dense") else {"impl": impl}
