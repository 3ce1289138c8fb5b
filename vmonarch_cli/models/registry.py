"""Names to models: aliases, hub ids and local diffusers folders."""

from __future__ import annotations

import contextlib
import re

from vmonarch_cli.errors import ModelError
from vmonarch_cli.models import wan
from vmonarch_cli.models.base import ModelEntry
from vmonarch_cli.models.catalogue import ENTRIES
from vmonarch_cli.models.demo import DEMO, WEIGHTS
from vmonarch_cli.models.folder import read_folder
from vmonarch_cli.models.hub import NotFoundError, read_repository
from vmonarch_cli.text import near, printable, shown
from vmonarch_cli.untrusted.files import user_path

DEMO_ALIAS = DEMO.alias
_KINDS = "a diffusers folder, a hub id or a name that `vmonarch models` lists"
HOW_TO_GET_A_REAL_MODEL = f"--model {wan.WAN21_1_3B.alias} downloads a real one, about 29 GB"


def find_model(name: str, revision: str | None = None) -> tuple[ModelEntry, str]:
    """The entry of an alias, hub id or local folder, and where its weights are (a folder path or a hub id).

    A hub id that is not known is described by its configs, from the local cache or downloaded; `revision` is a branch,
    tag or commit of a hub repository. Raises ModelError with near matches for an unknown name, and with the reason for
    a folder or repository that cannot be used.
    """
    if not name.strip():
        raise ModelError(f"the model is empty: it is {_KINDS}")
    for entry in ENTRIES:
        if name.lower() in {known.lower() for known in _names(entry)}:
            return _demo() if entry is DEMO else (entry, entry.hub_id or "")
    folder = user_path(name, "model", ModelError)
    with contextlib.suppress(OSError, ValueError):  # a name that is too long for a file, or a link to itself
        if folder.is_dir():
            return read_folder(folder), str(folder)
        if folder.exists():
            raise ModelError(f"{printable(name)} is a file, and a model is {_KINDS}")
    if name.startswith((".", "/", "~")):
        raise ModelError(f"there is no folder {printable(name)}; a model is {_KINDS}")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII):
        try:
            return read_repository(name, revision), name
        except NotFoundError as error:
            raise ModelError(f"{error.message}{_near(name)}") from None
    raise ModelError(f"there is no model {shown(name)}{_near(name)}: a model is {_KINDS}")


def _demo() -> tuple[ModelEntry, str]:
    """The demo's entry, with the figures of the weights that are really there."""
    if not (WEIGHTS / "model_index.json").is_file():
        raise ModelError(
            f"the demo model's weights are missing from this installation ({WEIGHTS}): install vmonarch again, "
            "or name another model with --model"
        )
    actual = read_folder(WEIGHTS)
    own = {
        "alias", "title", "licence", "aliases", "max_sequence_length", "trained_sizes", "trained_frames", "defaults",
        "long_clips",
    }  # fmt: skip
    return actual.model_copy(update={key: getattr(DEMO, key) for key in own}), str(WEIGHTS)


def _names(entry: ModelEntry) -> tuple[str, ...]:
    return (entry.alias, *entry.aliases, *((entry.hub_id,) if entry.hub_id else ()))


def _near(name: str) -> str:
    """' (did you mean A or B?)' from aliases and from hub ids, shown as the short alias."""
    owners = {known.lower().split("/")[-1]: entry.alias for entry in ENTRIES for known in _names(entry)}
    return near(name.split("/")[-1], owners, cutoff=0.7, names=owners)
