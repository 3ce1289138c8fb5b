"""Latents of a clip on disk: saved before decoding, so that no failure after denoising costs the denoising.

One safetensors file holds the latents of the frames, those of the sound where there is one, and, as metadata, the plan
and all that the record says of how they were made. Whoever has the file can decode it, in this process or in another
one after a reboot. A checksum tells latents that changed on the disk.
"""

from __future__ import annotations

import hashlib
import json
import math
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from vmonarch_cli.errors import InputError
from vmonarch_cli.media.publish import atomic
from vmonarch_cli.models.base import Grid
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.timing import Coverage, StepAttention
from vmonarch_cli.untrusted.files import require_regular

_SCHEMA = "2"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Denoised:
    """Latents (1, C, F, h, w) of one clip and what making them cost; sizes in bytes, times in seconds."""

    latents: torch.Tensor
    seed: int
    impl: str
    grid: Grid
    coverage: Coverage
    steps: list[StepAttention]
    text_encode_s: float
    denoise_s: float
    excluded_s: float
    total_s: float
    """Wall clock of encoding and denoising, sampling and compilation included."""
    peak_memory_bytes: int
    warm_state_bytes: int
    device: dict[str, Any]
    dtype: str
    retries: tuple[dict[str, str], ...] = ()
    """What went wrong on the way and what was done instead."""
    warnings: tuple[str, ...] = ()
    """What the model could not follow."""
    save_s: float = 0.0
    preview_s: float = 0.0
    """Pictures of the steps, with the fit of their colours; in no time of a step or of denoising."""
    skipped_calls: int = 0
    """Self-attention calls that a step cache left out: its gain, and none of the attention's."""
    fused: str | None = None
    """What the fused blocks ran with; None for stock blocks."""
    linear_dtype: str | None = None
    """What the blocks' projections computed in, by its torch name, where that is another than `dtype`."""
    replayed_calls: int = 0
    """Structured calls that were replayed from CUDA graphs."""
    dense_below: int = 0
    """Structured calls of fewer tokens ran dense."""
    weights: tuple[dict[str, str], ...] = ()
    """Single files that transformers came from: "part", "file" and "sha256" of each."""
    dense_attention: str | None = None
    """What computed the calls that ran dense."""
    sound: torch.Tensor | None = None
    """Latents (1, C, length, mel bins) of the clip's sound; None for a silent one."""
    steps_beside_decoding: tuple[int, ...] = ()
    """0-based steps during which another clip was decoded or written on the same machine: their times are longer."""


@dataclass(frozen=True)
class SavedLatents:
    """A latents file that was read: what to decode, and the plan that it belongs to."""

    plan: Plan
    index: int
    """0-based number of the clip within the plan."""
    denoised: Denoised
    key: str
    """The clip's key in a batch's manifest, empty for a clip of no batch."""


def save_latents(
    path: Path,
    plan: Plan,
    index: int,
    denoised: Denoised,
    *,
    key: str = "",
    overwrite: bool = True,
    work: Path | None = None,
) -> None:
    """Write the file atomically, synced to the disk; OutputError when that cannot be done.

    Without `overwrite` a file that is there already is an OutputError, too.
    """
    tensors = {"latents": denoised.latents} | ({} if denoised.sound is None else {"sound": denoised.sound})
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    names = {field.name for field in fields(Denoised)} - {"latents", "sound"}
    facts = {name: getattr(denoised, name) for name in sorted(names)}
    facts |= {"coverage": asdict(denoised.coverage), "steps": [asdict(step) for step in denoised.steps]}
    metadata = {
        "vmonarch_latents": _SCHEMA,
        "key": key,
        "index": str(index),
        "plan": plan.model_dump_json(),
        "denoised": json.dumps(facts),
        "sha256": _checksum(tensors["latents"]),
    }
    if "sound" in tensors:
        metadata["sound_sha256"] = _checksum(tensors["sound"])
    content = save(tensors, metadata)
    with atomic(path, overwrite=overwrite, work=work) as temporary:
        temporary.write_bytes(content)


def remove_latents(path: Path) -> None:
    """Remove latents whose clip is written; where that is refused they stay, and do no harm."""
    with suppress(OSError):
        path.unlink()


def load_latents(path: Path) -> SavedLatents:
    """Read a file of `save_latents`; InputError in one sentence when it is not one, is damaged, or does not fit its
    own plan.
    """
    try:
        require_regular(path, f"latents file {path}", missing=f"there is no latents file {path}")
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("vmonarch_latents") != _SCHEMA:
                raise InputError(f"{path} holds no latents that this version of vmonarch saved")
            latents = file.get_tensor("latents")
            sound = file.get_tensor("sound") if "sound" in file.keys() else None  # noqa: SIM118 - it is no dict
        facts = json.loads(metadata["denoised"])
        facts["coverage"] = Coverage(**facts["coverage"])
        facts["steps"] = [StepAttention(**step) for step in facts["steps"]]
        facts["grid"] = tuple(facts["grid"])
        facts["retries"] = tuple(facts["retries"])
        facts["warnings"] = tuple(facts.get("warnings", ()))
        facts["weights"] = tuple(facts.get("weights", ()))
        facts["steps_beside_decoding"] = tuple(facts.get("steps_beside_decoding", ()))
        plan = Plan.model_validate_json(metadata["plan"])
        denoised = Denoised(latents=latents, sound=sound, **facts)
        found = SavedLatents(plan, int(metadata["index"]), denoised, metadata["key"])
        whole = _checksum(latents) == metadata["sha256"]
        if not whole or (sound is not None and _checksum(sound) != metadata["sound_sha256"]):
            raise InputError(f"latents file {path} is damaged: its checksum is another")
        fault = misfit(latents, plan) or _sound_misfit(sound, plan)
        if fault is not None or not 0 <= found.index < len(plan.outputs):
            raise InputError(f"latents file {path} is damaged: {fault or 'it is of no clip of its plan'}")
        return found
    except ValidationError:
        raise InputError(f"{path} was saved by another version of vmonarch, whose settings differ") from None
    except (SafetensorError, OSError, KeyError, TypeError, AttributeError, ValueError, RecursionError):
        raise InputError(f"latents file {path} is damaged: it does not read back") from None


def misfit(latents: torch.Tensor, plan: Plan) -> str | None:
    """Why a tensor cannot be the latents of a clip of the plan, as half a sentence; None for one that can.

    Families order the sizes differently, and LTX packs them to (1, tokens, channels): the sizes count, not their order.
    """
    model = plan.model
    sizes = (
        model.latent_channels,
        plan.grid[0] * model.patch[0],
        plan.height // model.vae_spatial,
        plan.width // model.vae_spatial,
    )
    shape = tuple(latents.shape)
    if latents.dtype not in _FLOATS:
        return f"it holds {str(latents.dtype).removeprefix('torch.')}, and latents are floating-point numbers"
    fits = sorted(shape[1:]) == sorted(sizes) if len(shape) == 5 else len(shape) == 3
    if not fits or shape[0] != 1 or latents.numel() != math.prod(sizes):
        return f"its shape is {shape}, and the plan's latents have the sizes {sizes}"
    if not torch.isfinite(latents).all():
        return "it holds values that are not finite"
    return None


def _sound_misfit(sound: torch.Tensor | None, plan: Plan) -> str | None:
    """The same of a clip's sound, of whose size the plan does not know."""
    if (sound is not None) != bool(plan.audio):
        return "it holds no sound, and its clip has one" if plan.audio else "it holds a sound, and its clip has none"
    if sound is None:
        return None
    if sound.dtype not in _FLOATS or sound.ndim != 4 or sound.shape[0] != 1 or not sound.numel():
        return f"its sound is {str(sound.dtype).removeprefix('torch.')} of shape {tuple(sound.shape)}"
    return None if torch.isfinite(sound).all() else "its sound holds values that are not finite"


def _checksum(latents: torch.Tensor) -> str:
    """SHA-256 of a tensor's type, shape and bytes."""
    about = f"{latents.dtype} {tuple(latents.shape)}\n".encode()
    content = latents.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(about + content.numpy().tobytes()).hexdigest()
