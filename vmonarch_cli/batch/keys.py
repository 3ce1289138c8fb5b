"""The key of a batch's clip: a digest of everything that its content depends on, the same on every machine."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from vmonarch_cli.models.lora_facts import is_local
from vmonarch_cli.models.lora_files import lora_files, parse_lora
from vmonarch_cli.models.registry import DEMO_ALIAS
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.plan.seeds import RANDOM
from vmonarch_cli.plan.setup import AUTO, EARLIER_NAMES
from vmonarch_cli.plan.small_calls import FASTEST, dense_limit
from vmonarch_cli.untrusted.files import known_sha256

_LATER_IN_SETUP = ("vae_dtype", "dense_attention", "fuse", "dense_below")
_LATER = ("sampler", "sigmas", "quality", "strength", "last_image", "video")
"""Settings that came after the first batches: where nobody chooses, clips keep the keys that these gave them."""
# Neither where nor how a clip is computed changes what it is; every other field of the plan does.
_NOT_IDENTITY = {"outputs", "overwrite", "device", "dense_every", "num_videos", "origins", "notes", "warnings"}
_NOT_IDENTITY |= {"grid", "tokens", "flops", "model", "recipe", "noise_levels", "step_costs", "noise_levels_forced"}
_NOT_IDENTITY |= {"loras", "given_files", "preset_reason"}


def identity_of(plan: Plan, wanted: str | None) -> str:
    """Sixteen hexadecimal digits of everything that the clip's content depends on."""
    content = plan.model_dump(mode="json", exclude=_NOT_IDENTITY & set(Plan.model_fields))
    if plan.seed_was_drawn:  # the manifest keeps it
        content["seed"] = RANDOM
    for decided in ("offload", "fused_impl", "graphs"):  # by the machine, or the same to the bit
        content["setup"].pop(decided, None)
    stored = {now: earlier for earlier, now in EARLIER_NAMES.items()}  # keeps the key that it had under that name
    content["setup"]["quantize"] = stored.get(kind := plan.setup.quantize or "", kind and f"computed in {kind}") or None
    adapters = content["setup"].pop("tuned")
    if adapters:  # the same weights, from wherever they were read
        content["tuned"] = adapters[0]["sha256"]
    content["setup"]["loras"] = [_lora(text, plan.model.transformers) for text in plan.setup.loras]
    for name in ("transformer", "transformer_2"):
        del content["setup"][name]
    for name, file in plan.setup.single_files.items():  # weights that were replaced are other weights
        about = Path(file).stat()
        content[name] = [str(Path(file).resolve()), about.st_size, about.st_mtime_ns]
    if not plan.audio:  # clips that were planned before there was sound keep their keys
        del content["audio"]
    content["setup"] |= _resolved(plan)
    for part, names in ((content["setup"], _LATER_IN_SETUP), (content, _LATER)):
        for name in names:
            if part[name] is None or part[name] == Plan.default_of(name):
                del part[name]
    content["preset"] = plan.preset.computed_fields()
    if plan.image is not None:  # a picture that was painted over is another picture
        content["image"] = known_sha256(Path(plan.image))
    for name, given in (("last_image", plan.last_image), ("video", plan.video)):
        if given is not None:
            content[name] = known_sha256(Path(given))
    if plan.model.alias == DEMO_ALIAS:  # it comes with the program, wherever that is installed
        content["model_source"] = DEMO_ALIAS
    elif Path(plan.model_source).is_dir():  # the same folder, from wherever the command runs
        content["model_source"] = str(Path(plan.model_source).resolve())
    text = json.dumps([content, wanted], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _lora(text: str, transformers: int) -> Any:
    """What a LoRA is: of files on this disk content, scale and transformer, wherever they lie; of the hub its name.

    transformers: how many the model has.
    """
    lora = parse_lora(text)
    if not is_local(lora):
        return text
    return [
        {
            "sha256": known_sha256(file.path),
            "settings": None if file.settings is None else known_sha256(file.settings),
            "scale": lora.scale,
            "expert": file.expert,
        }
        for file in lora_files(lora, transformers)
    ]


def _resolved(plan: Plan) -> dict[str, Any]:
    """Settings whose default the plan decides, as their own default where they were given and change nothing.

    What they are in place of their default is the same on every machine: several may work at one folder, and take
    clips from each other by their keys. Fused blocks are a GPU's, so that its default counts.
    """
    setup, below = plan.setup, plan.setup.dense_below
    resolved: dict[str, Any] = {}
    if setup.fuse == plan.fuses_unasked:
        resolved["fuse"] = None
    if setup.vae_dtype == plan.vae_dtype_unasked:
        resolved["vae_dtype"] = AUTO
    if plan.preset.attention == "dense":
        resolved["dense_below"] = None
    elif below is not None and plan.tokens >= below:
        unasked = setup.model_copy(update={"dense_below": None})
        limit = dense_limit(unasked, plan.preset, FASTEST, plan.model.hidden_dim)
        resolved["dense_below"] = None if plan.tokens >= limit else 0
    elif below is not None:
        resolved["dense_below"] = plan.tokens + 1
    return resolved
