"""Where a LoRA is: a file, one of a folder or of a hub repository, and which of two transformers it is for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

from vmonarch_cli.errors import InputError, ModelError
from vmonarch_cli.models.hub import hub_file
from vmonarch_cli.text import printable

Expert = Literal["high", "low"]
"""The transformers of a model that has two: "high" denoises the first, noisy steps and "low" the rest."""
SETTINGS_FILE = "adapter_config.json"
"""What peft writes beside the weights: rank, alpha and more."""


class Lora(NamedTuple):
    """A LoRA as `--lora` names it: a file, a folder or a place on the hub, its weight, and its transformer."""

    source: str
    scale: float
    expert: Expert | None = None


@dataclass(frozen=True)
class LoraFile:
    """One weights file of a LoRA."""

    path: Path
    name: str
    """What sentences call it."""
    expert: Expert | None
    """The one transformer that it is for, by the flag or by its name; None where neither says."""
    settings: Path | None = None
    """peft's settings beside it."""


def parse_lora(text: str) -> Lora:
    """'[high:|low:]path[:scale]'; InputError when the scale is not valid or a local path is not there."""
    head, _, rest = text.partition(":")
    expert: Expert | None = "high" if head == "high" else "low" if head == "low" else None
    given = rest if expert else text
    source, colon, tail = given.rpartition(":")
    if not colon:
        source, scale = given, 1.0
    else:
        try:
            scale = float(tail)
        except ValueError:
            source, scale = given, 1.0
    path = Path(source).expanduser()
    if not -10 <= scale <= 10:
        raise InputError(f"--lora takes a scale from -10 to 10, got {scale:g}")
    if not path.exists() and not _on_hub(source):
        raise InputError(
            f"there is no LoRA {source}: --lora takes a .safetensors file, a folder or a hub id, and :scale"
        )
    if path.is_file() and path.suffix != ".safetensors":
        raise InputError(f"LoRA {source} is not a .safetensors file: pickled weights can run code when opened")
    return Lora(str(path) if path.exists() else source, scale, expert)


def _on_hub(source: str) -> bool:
    """Whether a name that is no local path can be owner/repository, with or without a file or folder in it."""
    parts = source.split("/")
    if source.startswith((".", "/", "~")) or len(parts) < 2 or not all(parts) or ".." in parts:
        return False
    if Path(parts[0]).is_dir():
        return False
    return len(parts) > 2 or not source.endswith(".safetensors")


def lora_file(source: str) -> Path:
    """The .safetensors file of a LoRA: itself, the only one of its kind in a folder, or of a hub repository.

    Raises ModelError when there is none or it cannot be told which one.
    """
    return lora_files(Lora(source, 1.0), transformers=1)[0].path


def lora_files(lora: Lora, transformers: int) -> list[LoraFile]:
    """The files of a LoRA: one, or two where a model has two transformers and a folder has a file for each.

    Raises InputError or ModelError when there is none, it cannot be told which, or it is for the other transformer.
    """
    if lora.expert is not None and transformers < 2:
        raise InputError(f"--lora {lora.expert}: is for models with two transformers, and this one has one")
    path = Path(lora.source)
    if path.is_file():
        return [_file(path, lora.source, lora.expert, path.parent / SETTINGS_FILE)]
    if path.is_dir():
        chosen = _choose([found.name for found in path.iterdir()], lora, transformers)
        return [_file(path / name, str(path / name), expert, path / SETTINGS_FILE) for name, expert in chosen]
    return _of_hub(lora, transformers)


def _of_hub(lora: Lora, transformers: int) -> list[LoraFile]:
    owner, name, *inside = lora.source.split("/")
    repo, folder = f"{owner}/{name}", "/".join(inside)
    found: list[tuple[str, Expert | None]] = []

    def choose(names: Sequence[str]) -> str:
        if not found:
            found.extend(_choose_of_hub(names, lora, folder, transformers))
        return found[0][0]

    files = [hub_file(repo, choose)]
    files += [hub_file(repo, _always(other)) for other, _ in found[1:]]
    made = []
    for path, (within, expert) in zip(files, found, strict=True):
        settings = _settings_of_hub(repo, within) if within.endswith("adapter_model.safetensors") else None
        made.append(_file(path, f"{repo}/{within}" if folder or len(files) > 1 else lora.source, expert, settings))
    return made


def _choose_of_hub(names: Sequence[str], lora: Lora, folder: str, transformers: int) -> list[tuple[str, Expert | None]]:
    if folder.endswith(".safetensors"):
        if folder not in names:
            here = sorted(name for name in names if name.endswith(".safetensors"))
            raise ModelError(f"LoRA {lora.source} is not in its repository, which has {_some(here)}")
        return [(folder, lora.expert)]
    within = f"{folder}/" if folder else ""
    inner = [name.removeprefix(within) for name in names if name.startswith(within)]
    return [(within + name, expert) for name, expert in _choose(inner, lora, transformers)]


def _always(name: str) -> Callable[[Sequence[str]], str]:
    return lambda names: name


def _settings_of_hub(repo: str, within: str) -> Path | None:
    settings = str(PurePosixPath(within).with_name(SETTINGS_FILE))

    def choose(names: Sequence[str]) -> str:
        if settings not in names:
            raise ModelError(f"LoRA {repo}/{within} has no {SETTINGS_FILE}")
        return settings

    try:
        return hub_file(repo, choose)
    except ModelError:  # the tensors alone say what is needed where it has default settings
        return None


def _file(path: Path, name: str, expert: Expert | None, settings: Path | None) -> LoraFile:
    named = expert_by_name(path.name)
    if expert is not None and named is not None and expert != named:
        raise InputError(f"LoRA {name} is for the {named}-noise transformer by its name, and {expert}: was given")
    has_settings = path.name == "adapter_model.safetensors" and settings is not None and settings.is_file()
    return LoraFile(path, name, expert or named, settings if has_settings else None)


def expert_by_name(name: str) -> Expert | None:
    """Which of two transformers a file is for, where its name says one of them: "..._high_noise.safetensors"."""
    # "low-rank" is no word for an expert, but "LOW_rank64" has one.
    words = set(
        re.findall(r"(?<![a-z])(high|low)(?=[^a-z]|noise|$)(?![ _.-]?(?:rank(?![_-]?\d)|vram|res|mem))", name.lower())
    )
    if len(words) != 1:
        return None
    return "high" if "high" in words else "low"


def _choose(names: Iterable[str], lora: Lora, transformers: int) -> list[tuple[str, Expert | None]]:
    """Of a folder's files the LoRA, as diffusers would choose; (name, transformer) of each that is to be loaded."""
    files = sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)
    usual = [name for name in files if name.endswith(("pytorch_lora_weights.safetensors", "adapter_model.safetensors"))]
    files = usual or files
    if not files:
        raise ModelError(f"LoRA {lora.source} has no .safetensors file")
    if len(files) == 1:
        return [(files[0], lora.expert)]
    by_expert: dict[Expert | None, list[str]] = {}
    for name in files:
        by_expert.setdefault(expert_by_name(name), []).append(name)
    if transformers > 1 and lora.expert is not None and len(by_expert.get(lora.expert, [])) == 1:
        return [(by_expert[lora.expert][0], lora.expert)]
    high, low = by_expert.get("high", []), by_expert.get("low", [])
    if transformers > 1 and lora.expert is None and len(files) == 2 and len(high) == len(low) == 1:
        return [(high[0], "high"), (low[0], "low")]
    raise ModelError(
        f"LoRA {lora.source} has {len(files)} .safetensors files ({_some(files)}): name one of them by its path"
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(printable(name) for name in names[:3]) + (", ..." if len(names) > 3 else "")
