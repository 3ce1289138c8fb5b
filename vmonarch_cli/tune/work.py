"""The work folder: what it was begun for, and that it is gone when the adapter is there."""

from __future__ import annotations

import json
import shutil

from vmonarch_cli.errors import InputError, OutputError
from vmonarch_cli.media.publish import atomic, sweep
from vmonarch_cli.tune.request import TunePlan

_SETTINGS = "settings.json"


def prepare_work(plan: TunePlan) -> None:
    """Make the folder, or see that the one to go on in is of the same settings; InputError names the first that is not.

    With `overwrite` and without `resume` what is there is removed.
    """
    folder, path = plan.work, plan.work / _SETTINGS
    try:
        if folder.exists() and not plan.resume:
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("trajectories", "evaluation"):
            (folder / name).mkdir(exist_ok=True)
            sweep(folder / name)
        sweep(folder)
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error.strerror or error}") from None
    if not path.exists():
        with atomic(path, overwrite=True) as temporary:
            temporary.write_text(json.dumps(plan.identity(), indent=1) + "\n")
    check_work(plan)


def check_work(plan: TunePlan) -> None:
    """InputError, that names the first setting that is another one, where a run would go on in a folder of another."""
    folder, path = plan.work, plan.work / _SETTINGS
    if not plan.resume or not path.exists():
        return
    identity = json.loads(json.dumps(plan.identity()))
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        differing = next((name for name in identity if found[name] != identity[name]), None)
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{path} cannot be read: pass --overwrite without --resume to start anew") from None
    if differing is not None:
        raise InputError(
            f"--resume: {folder} was begun with {differing} {_short(found[differing])}, and now it is "
            f"{_short(identity[differing])}: give the flags of that run, or --overwrite to start anew"
        )


def remove_work(plan: TunePlan) -> None:
    """The adapter is written: nothing of the folder is needed any more."""
    shutil.rmtree(plan.work, ignore_errors=True)


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
