"""Which tuned adapter a run uses: the one that was asked for, or one that the model brings for its preset."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vmonarch_cli.errors import InputError
from vmonarch_cli.models.base import PipelineFacts
from vmonarch_cli.models.demo import WEIGHTS
from vmonarch_cli.models.hub import snapshot_at_hand
from vmonarch_cli.models.tuned import (
    TunedAdapter,
    check_base,
    check_finite,
    other_base,
    read_adapter,
    shipped_adapters,
)
from vmonarch_cli.plan.setup import AdapterFile
from vmonarch_cli.presets import Preset, load_preset, shipped_names
from vmonarch_cli.text import counted, listed, with_article
from vmonarch_cli.untrusted.files import known_sha256, once_a_content, require_regular, user_path

NONE = "none"
"""What `--tuned` takes for no adapter."""
TUNED_ROW = ", tuned"
"""Ends the name of a measured row that runs with an adapter, before a number where several rows have the name."""
_PEFT = "needs peft: pip install peft"


@dataclass(frozen=True)
class Use:
    """What an adapter would be used with; sizes in pixels."""

    source: str
    """Folder or hub id of the model."""
    revision: str | None
    facts: PipelineFacts
    preset: Preset
    """As it was chosen, or as `at_steps` resolved it."""
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

    def shipped(self) -> list[Path]:
        """What the model brings for a preset of this name."""
        return [] if self.folder is None else brought(self.folder, self.preset.name)


@dataclass(frozen=True)
class Choice:
    """An adapter, or none, and what the user should know of it."""

    tuned: AdapterFile | None = None
    is_shipped: bool = False
    warnings: tuple[str, ...] = ()
    note: str | None = None
    """Why none of those that the model brings for the preset is used."""


def brought(folder: Path, preset: str | None = None) -> list[Path]:
    """Files of the adapters that a model's folder brings, for all presets or by a preset's name; the demo's lie beside
    its weights.
    """
    places = [folder, *([WEIGHTS.parent] if folder == WEIGHTS else [])]
    return [path for place in places for path in shipped_adapters(place, preset)]


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
    return _read(path)


@once_a_content
def _read(path: Path) -> AdapterFile:
    adapter = read_adapter(path)
    check_finite(path)
    return AdapterFile(path=str(path), sha256=known_sha256(path), adapter=adapter)


def check(tuned: AdapterFile, use: Use) -> None:
    """InputError when an adapter must not be used so: the sentence names what it was made for, and what runs."""
    is_lora = tuned.adapter.kind == "lora"
    if is_lora and not use.facts.lora:
        raise InputError(f"--tuned: diffusers loads no LoRA into {with_article(use.facts.name)}")
    if is_lora and importlib.util.find_spec("peft") is None:
        raise InputError(f"--tuned {_PEFT}")
    if use.replaced:
        raise InputError(
            f"adapter {tuned.path} was tuned on the weights of {tuned.adapter.model}, and --transformer replaces "
            "them: leave out one of the two"
        )
    misfit = tuned.adapter.misfit(use.preset, use.steps)
    if misfit is not None:
        raise InputError(_of_another_preset(tuned, use, misfit))
    if use.folder is not None:
        check_base(tuned.adapter, tuned.path, use.folder)


def _of_another_preset(tuned: AdapterFile, use: Use, misfit: str) -> str:
    """The refusal: the preset is another one, or it is the same and few steps change it."""
    said, name = tuned.adapter, use.preset.name
    few = use.preset.few_steps
    if few is not None and said.misfit(use.preset, said.steps) is None:
        return (
            f"adapter {tuned.path} was tuned with preset {name} at {counted(said.steps, 'step')} and cannot run at "
            f"{use.steps}: up to {few.up_to} steps {name} computes otherwise ({misfit}); "
            f"`vmonarch tune --sampler-steps {use.steps}` makes one"
        )
    return (
        f"adapter {tuned.path} was tuned with preset {said.preset_name} and cannot run with {name}: "
        f"{misfit}{_hint(tuned)}"
    )


def _hint(tuned: AdapterFile) -> str:
    """The shipped preset that an adapter was tuned with, if it is one."""
    name = tuned.adapter.preset_name
    fits = name in shipped_names() and tuned.adapter.misfit(load_preset(name), tuned.adapter.steps) is None
    return f"; --preset {name} fits it" if fits else ""


def adapter_names(adapters: Sequence[AdapterFile]) -> dict[str, AdapterFile]:
    """Names of the rows that run with adapters: the preset's and "tuned", with a number where several have it."""
    names: dict[str, AdapterFile] = {}
    for tuned in adapters:
        name, number = f"{tuned.adapter.preset_name}{TUNED_ROW}", 1
        while name in names:
            number += 1
            name = f"{tuned.adapter.preset_name}{TUNED_ROW} {number}"
        names[name] = tuned
    return names


def check_file(tuned: AdapterFile, folder: Path) -> None:
    """InputError when an adapter's file, or the model in a folder, is another one than the run was planned with."""
    path = Path(tuned.path)
    require_regular(path, f"adapter {path}")
    if known_sha256(path) != tuned.sha256:
        raise InputError(f"adapter {path} changed since the run was planned: start it again")
    check_base(tuned.adapter, tuned.path, folder)


def _shipped(use: Use) -> Choice:
    """The adapter that the model brings for this preset, steps and guidance, or why none of its own is used."""
    paths = use.shipped()
    name = f"the model's adapter for {use.preset.name}"
    if paths and importlib.util.find_spec("peft") is None:
        return Choice(warnings=(f"{name} is not used: it {_PEFT}",))
    try:
        found = [tuned for tuned in map(read, paths) if _is_named_for(tuned, use)]
    except InputError as error:
        raise InputError(f"{error.message}; --tuned none goes without it") from None
    if not found:
        return Choice()
    fitting = [tuned for tuned in found if _sampling_of(tuned.adapter) == (use.steps, use.guidance_scale)]
    if not fitting:
        made = listed(list(dict.fromkeys(_sampling(*_sampling_of(tuned.adapter)) for tuned in found)))
        what = f"{name} was" if len(found) == 1 else f"the model's adapters for {use.preset.name} were"
        return Choice(note=f"{what} made for {made}; this run has {_sampling(use.steps, use.guidance_scale)}")
    size = f"{use.width}x{use.height}"
    tuned = min(fitting, key=lambda one: (one.adapter.size != size, abs(one.adapter.num_frames - use.num_frames)))
    others = _differences(tuned, use)
    if others is not None:
        which = f"the model's nearest adapter for {use.preset.name}" if len(fitting) > 1 else name
        return Choice(note=f"{which} was made for {others}")
    misfit = tuned.adapter.misfit(use.preset, use.steps)
    if misfit is not None:
        return Choice(note=f"{name} was made for other fields of it: {misfit}")
    try:
        check(tuned, use)
    except InputError as error:
        return Choice(warnings=(f"{name} is not used: {error.message}",))
    return Choice(tuned, is_shipped=True, warnings=tuple(_made_for_others(tuned, use)))


def _is_named_for(tuned: AdapterFile, use: Use) -> bool:
    """Whether a file is for the preset; PRESET-ANYTHING may be another one's."""
    return Path(tuned.path).stem == use.preset.name or tuned.adapter.preset_name == use.preset.name


def _sampling_of(adapter: TunedAdapter) -> tuple[int, float]:
    return adapter.steps, adapter.guidance_scale


def _made_for_others(tuned: AdapterFile, use: Use) -> Iterator[str]:
    """A sentence where steps, guidance or shape are not those that an adapter was made for, and one where the model is
    another one that it allows.
    """
    other = None if use.folder is None else other_base(tuned.adapter, use.folder)
    if other is not None:
        yield (
            f"adapter {tuned.path} was tuned and measured on {tuned.adapter.model}, and says that it may go with "
            f"{other}, too"
        )
    words = _differences(tuned, use)
    if words is not None:
        yield f"adapter {tuned.path} was made for {words}: it may correct less"


def _differences(tuned: AdapterFile, use: Use) -> str | None:
    """'96x96, and this run has 80x64', where steps, guidance or shape are not those that an adapter was made for."""
    said, size = tuned.adapter, f"{use.width}x{use.height}"
    pairs = [
        (counted(said.steps, "step"), f"{use.steps}", said.steps != use.steps),
        (f"guidance {said.guidance_scale:g}", f"{use.guidance_scale:g}", said.guidance_scale != use.guidance_scale),
        (said.size, size, said.size != size),
        (counted(said.num_frames, "frame"), f"{use.num_frames}", said.num_frames != use.num_frames),
    ]
    others = [(there, here) for there, here, differs in pairs if differs]
    there, here = (listed([pair[side] for pair in others]) for side in (0, 1))
    return f"{there}, and this run has {here}" if others else None


def _sampling(steps: int, guidance_scale: float) -> str:
    return f"{counted(steps, 'step')} with guidance {guidance_scale:g}"
