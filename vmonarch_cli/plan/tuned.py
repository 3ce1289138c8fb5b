"""Which tuned adapter a run uses: the one that was asked for, or one that the model brings for its preset."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vmonarch_cli.errors import InputError
from vmonarch_cli.models.base import PipelineFacts
from vmonarch_cli.models.demo import WEIGHTS
from vmonarch_cli.models.hub import snapshot_at_hand
from vmonarch_cli.models.tuned import check_base, check_finite, other_base, read_adapter, shipped_adapter
from vmonarch_cli.plan.setup import AdapterFile
from vmonarch_cli.presets import Preset, load_preset, shipped_names
from vmonarch_cli.untrusted.files import file_sha256, require_regular, user_path

NONE = "none"
"""What `--tuned` takes for no adapter."""
_PEFT = 'needs peft: pip install "vmonarch[lora]"'


@dataclass(frozen=True)
class Use:
    """What an adapter would be used with; sizes in pixels."""

    source: str
    """Folder or hub id of the model."""
    revision: str | None
    facts: PipelineFacts
    preset: Preset
    steps: int
    guidance_scale: float
    height: int
    width: int
    num_frames: int
    replaced: bool = False
    """A file of its own gives a transformer's weights (`--transformer`)."""

    @property
    def folder(self) -> Path | None:
        """Where the model is on this machine, if it is."""
        folder = Path(self.source).expanduser()
        return folder if folder.is_dir() else snapshot_at_hand(self.source, self.revision)

    def shipped(self) -> Iterator[Path]:
        """What the model brings for a preset of this name; the demo's lie beside its weights."""
        folder = self.folder
        places = [] if folder is None else [folder, *([WEIGHTS.parent] if folder == WEIGHTS else [])]
        found = (shipped_adapter(place, self.preset.name) for place in places)
        return (path for path in found if path is not None)


@dataclass(frozen=True)
class Choice:
    """An adapter, or none, and what the user should know of it."""

    tuned: AdapterFile | None = None
    is_shipped: bool = False
    warnings: tuple[str, ...] = ()


def choose(given: str | None, use: Use) -> Choice:
    """The adapter of `--tuned`: a file, "none", or (None) the one that the model brings, where it fits.

    InputError for a file that is no adapter, and for one of another model, another preset, or a family without LoRA.
    """
    if given == NONE or (given is None and use.preset.attention == "dense"):
        return Choice()
    if given is not None:
        tuned = read(user_path(given, "--tuned"))
        check(tuned, use)
        return Choice(tuned, warnings=tuple(_made_for_others(tuned, use)))
    return _shipped(use)


def read(path: Path) -> AdapterFile:
    """An adapter's file, with its weights checked; InputError in one sentence."""
    require_regular(path, f"adapter {path}")
    facts = path.stat()
    return _read(path, facts.st_ino, facts.st_size, facts.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _read(path: Path, *stamp: int) -> AdapterFile:
    """As `read`; `stamp` is other for a file that changed. Each line of a batch asks."""
    adapter = read_adapter(path)
    check_finite(path)
    return AdapterFile(path=str(path), sha256=file_sha256(path), adapter=adapter)


def check(tuned: AdapterFile, use: Use) -> None:
    """InputError when an adapter must not be used so: the sentence names what it was made for, and what runs."""
    is_lora = tuned.adapter.kind == "lora"
    if is_lora and not use.facts.lora:
        raise InputError(f"--tuned: diffusers loads no LoRA into a {use.facts.name}")
    if is_lora and importlib.util.find_spec("peft") is None:
        raise InputError(f"--tuned {_PEFT}")
    if use.replaced:
        raise InputError(
            f"adapter {tuned.path} was tuned on the weights of {tuned.adapter.model}, and --transformer replaces "
            "them: leave out one of the two"
        )
    misfit = tuned.adapter.misfit(use.preset, use.steps)
    if misfit is not None:
        raise InputError(
            f"adapter {tuned.path} was tuned with preset {tuned.adapter.preset_name} and cannot run with "
            f"{use.preset.name}: {misfit}{_hint(tuned)}"
        )
    if use.folder is not None:
        check_base(tuned.adapter, tuned.path, use.folder)


def _hint(tuned: AdapterFile) -> str:
    """The shipped preset that an adapter was tuned with, if it is one."""
    name = tuned.adapter.preset_name
    fits = name in shipped_names() and tuned.adapter.misfit(load_preset(name), tuned.adapter.steps) is None
    return f"; --preset {name} fits it" if fits else ""


def check_file(tuned: AdapterFile, folder: Path) -> None:
    """InputError when an adapter's file, or the model in a folder, is another one than the run was planned with."""
    path = Path(tuned.path)
    require_regular(path, f"adapter {path}")
    if file_sha256(path) != tuned.sha256:
        raise InputError(f"adapter {path} changed since the run was planned: start it again")
    check_base(tuned.adapter, tuned.path, folder)


def _shipped(use: Use) -> Choice:
    """The adapter of the model's own folder for a preset of this name, and why it is not used where it does not fit."""
    path = next(use.shipped(), None)
    if path is None:
        return Choice()
    name = f"the model's adapter for {use.preset.name}"
    if importlib.util.find_spec("peft") is None:
        return Choice(warnings=(f"{name} is not used: it {_PEFT}",))
    try:
        tuned = read(path)
    except InputError as error:
        raise InputError(f"{error.message}; --tuned none goes without it") from None
    try:
        check(tuned, use)
    except InputError as error:
        return Choice(warnings=(f"{name} is not used: {error.message}",))
    if (tuned.adapter.steps, tuned.adapter.guidance_scale) != (use.steps, use.guidance_scale):
        made, here = (
            _sampling(tuned.adapter.steps, tuned.adapter.guidance_scale),
            _sampling(use.steps, use.guidance_scale),
        )
        sentence = f"{name} is not used: it was made for {made}, and this run has {here}; --tuned {path} uses it"
        return Choice(warnings=(sentence,))
    return Choice(tuned, is_shipped=True, warnings=tuple(_made_for_others(tuned, use)))


def _made_for_others(tuned: AdapterFile, use: Use) -> Iterator[str]:
    """A sentence where steps, guidance or shape are not those that an adapter was made for, and one where the model is
    another one that it allows.
    """
    said, size = tuned.adapter, f"{use.width}x{use.height}"
    other = None if use.folder is None else other_base(said, use.folder)
    if other is not None:
        yield f"adapter {tuned.path} was tuned and measured on {said.model}, and says that it may go with {other}, too"
    pairs = [
        (f"{said.steps} steps", f"{use.steps}", said.steps != use.steps),
        (f"guidance {said.guidance_scale:g}", f"{use.guidance_scale:g}", said.guidance_scale != use.guidance_scale),
        (said.size, size, said.size != size),
        (f"{said.num_frames} frames", f"{use.num_frames}", said.num_frames != use.num_frames),
    ]
    others = [(there, here) for there, here, differs in pairs if differs]
    if others:
        there, here = (_listed([pair[side] for pair in others]) for side in (0, 1))
        yield f"adapter {tuned.path} was made for {there}, and this run has {here}: it may correct less"


def _sampling(steps: int, guidance_scale: float) -> str:
    return f"{steps} steps and guidance {guidance_scale:g}"


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
