"""The name under which a clip's latents are saved, where several runs may want the same one."""

from __future__ import annotations

from collections.abc import Callable

from vmonarch_cli.clip.latents import Denoised, save_latents
from vmonarch_cli.media.paths import is_taken, latents_path, names_like, record_path
from vmonarch_cli.media.publish import NameTaken
from vmonarch_cli.plan.plan import Plan


def save_as_free(plan: Plan, index: int, denoised: Denoised, on_renamed: Callable[[str], None]) -> Plan:
    """Save latents under the plan's name of clip `index`, or under the next one that is free by now; the plan with that
    name. With the plan's `overwrite` its own name is always free.

    Another run may have planned the same name: of those that save latents under it, one succeeds, and it owns the name
    until its clip is there. `on_renamed` gets a sentence when another one owns it. OutputError when nothing can be
    written.
    """
    wanted = plan.outputs[index]
    if plan.overwrite:
        save_latents(latents_path(wanted), plan, index, denoised)
        return plan
    for path in names_like(wanted):
        if is_taken(path, with_sound=bool(plan.audio)):
            continue
        outputs = (*plan.outputs[:index], path, *plan.outputs[index + 1 :])
        renamed = plan.model_copy(update={"outputs": outputs})
        try:
            save_latents(latents_path(path), renamed, index, denoised, overwrite=False)
        except NameTaken:
            continue
        if path.exists() or record_path(path).exists():  # of a run that ended just now
            latents_path(path).unlink(missing_ok=True)
            continue
        if path != wanted:
            on_renamed(f"{wanted.name} is the name of another run's clip by now: this clip is {path.name}")
        return renamed
    raise AssertionError("names never end")
