"""From flags and lines to clips: each with a plan of its own, a key that says what it is, and a name in the folder."""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from vmonarch_cli.batch.manifest import ManifestEntry
from vmonarch_cli.batch.prompts import Line
from vmonarch_cli.errors import InputError, InputErrors, OutputError, VmonarchError
from vmonarch_cli.media.paths import DEFAULT_FOLDER, ENDINGS, record_path, slug
from vmonarch_cli.plan.resolve import GenerateRequest, Plan, resolve
from vmonarch_cli.text import shown

LINE = "prompts file"
"""Origin of a setting that a line gave."""
_SIZE = {"size", "height", "width"}
# Neither where nor how a clip is computed changes what it is; every other field of the plan does.
_NOT_IDENTITY = {"outputs", "overwrite", "device", "dense_every", "num_videos", "origins", "notes", "warnings"}
_NOT_IDENTITY |= {"grid", "tokens", "flops", "model"}
_MAX_NAME_BYTES = 180


@dataclass(frozen=True)
class PlannedClip:
    """One clip of a batch. Its plan is of one video; the name is None until the manifest gives one."""

    key: str
    line: int
    plan: Plan
    wanted: str | None
    """The name that the line asks for, with its ending."""

    @property
    def path(self) -> Path:
        return self.plan.outputs[0]

    def named(self, folder: Path, name: str) -> PlannedClip:
        """The same clip with its place in the folder."""
        return replace(self, plan=self.plan.model_copy(update={"outputs": (folder / name,)}))


def batch_folder(request: GenerateRequest) -> Path:
    """The folder of a batch; OutputError where --output names a file."""
    output = request.output or DEFAULT_FOLDER
    folder = Path(output).expanduser()
    if not output.strip() or (folder.suffix.lower() in ENDINGS and not folder.is_dir()):
        raise OutputError(f"--output takes a folder with --prompts-file, got {shown(output)}")
    return folder


def plan_clips(request: GenerateRequest, lines: Sequence[Line], source: str) -> tuple[list[PlannedClip], list[str]]:
    """Clips in the order of the lines, and notes about flags that beat lines; nothing is named yet.

    Raises InputErrors with a sentence for every line that cannot be done.
    """
    if request.prompt is not None:
        raise InputError("--prompt and --prompts-file say the same thing twice: give one of them")
    folder = batch_folder(request)
    clips: list[PlannedClip] = []
    wrong: dict[str, list[int]] = {}
    beaten: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    for line in lines:
        merged, given, lost = _merge(request, line)
        beaten.update(lost)
        try:
            wanted = _checked_name(line.fields.get("output"))
            for seed_offset in range(_count(request)):
                clips.append(_clip(merged, given, line, folder, wanted, seed_offset, seen))
        except VmonarchError as error:
            wrong.setdefault(_without_dashes(error.message, given), []).append(line.number)
    for name, numbers in _clashes(clips).items():
        wrong.setdefault(f"{shown(name)} is the name of more than one clip", []).extend(numbers)
    if wrong:
        raise InputErrors(_sentences(wrong, source, len(lines)))
    notes = [f"--{name.replace('_', '-')} beats {name} in {_lines(count)}" for name, count in beaten.items()]
    return clips, notes


def assign_names(
    clips: Sequence[PlannedClip], folder: Path, entries: Mapping[str, ManifestEntry], source: str, *, overwrite: bool
) -> list[PlannedClip]:
    """Every clip with its name: the manifest's for a clip that it knows, the line's, or one from prompt and seed.

    Names differ in more than letter case, and none of them is taken by a file or another clip of the folder (with
    `overwrite` a file is no obstacle). InputErrors for lines whose own name is taken.
    """
    names = {clip.key: entries[clip.key].name for clip in clips if clip.key in entries}
    taken = {_folded(entry.name) for entry in entries.values()}
    wrong: dict[str, list[int]] = {}
    for clip in clips:
        if clip.key in names or clip.wanted is None:
            continue
        if _folded(clip.wanted) in taken:
            wrong.setdefault(f"{clip.wanted} is the name of another clip of {folder}: choose another", []).append(
                clip.line
            )
        elif _exists(folder / clip.wanted) and not overwrite:
            sentence = f"{folder / clip.wanted} exists already: pass --overwrite to replace it, or choose another name"
            wrong.setdefault(sentence, []).append(clip.line)
        names[clip.key] = clip.wanted
        taken.add(_folded(clip.wanted))
    if wrong:
        raise InputErrors(_sentences(wrong, source, 0))
    for clip in clips:
        if clip.key not in names:
            names[clip.key] = _free(folder, f"{slug(clip.plan.prompt)}-s{clip.plan.seed}", taken, overwrite)
            taken.add(_folded(names[clip.key]))
    return [clip.named(folder, names[clip.key]) for clip in clips]


def in_running_order(clips: Iterable[PlannedClip]) -> list[PlannedClip]:
    """Clips of one kind, shape and preset after each other, so that nothing loads or compiles twice; else by line."""
    groups: dict[object, list[PlannedClip]] = {}
    for clip in sorted(clips, key=lambda clip: clip.plan.image is not None):
        plan = clip.plan
        group = (
            plan.image is not None,
            plan.height,
            plan.width,
            plan.num_frames,
            plan.preset,
            plan.guidance_scale > 1,
            plan.flow_shift,
        )
        groups.setdefault(group, []).append(clip)
    return [clip for group in groups.values() for clip in group]


def _merge(request: GenerateRequest, line: Line) -> tuple[GenerateRequest, dict[str, Any], list[str]]:
    """The request for one line, the line's fields that count, and the fields that a flag beat."""
    flags = {field.name for field in fields(request) if getattr(request, field.name) not in (None, (), False)}
    flags |= _SIZE if flags & _SIZE else set()
    settable = {name: value for name, value in line.fields.items() if name != "output"}
    given = {name: value for name, value in settable.items() if name not in flags}
    merged = replace(request, **given, num_videos=None)
    return merged, given, [name for name in settable if name in flags]


def _count(request: GenerateRequest) -> int:
    count = request.num_videos
    if count is not None and not 1 <= count <= 1000:
        raise InputError(f"--num-videos takes a whole number from 1 to 1000, got {count}")
    return count or 1


def _clip(
    request: GenerateRequest,
    given: Mapping[str, Any],
    line: Line,
    folder: Path,
    wanted: str | None,
    offset: int,
    seen: Counter[str],
) -> PlannedClip:
    # The name is settled later: here the folder is checked, and the rate where the ending is known.
    target = str(folder / (wanted or "clip.mp4"))
    seed = request.seed if not offset else (request.seed or 0) + offset
    plan = resolve(replace(request, output=target, overwrite=True, seed=seed))
    origins = {name: LINE if _came_from_line(name, given) else origin for name, origin in plan.origins.items()}
    origins["output"] = LINE if wanted else "default"
    plan = plan.model_copy(update={"origins": origins, "overwrite": False})
    if wanted is not None and offset:
        wanted = str(Path(wanted).with_stem(f"{Path(wanted).stem}-{offset + 1}"))
    identity = _identity(plan, wanted)
    seen[identity] += 1
    key = identity if seen[identity] == 1 else f"{identity}-{seen[identity]}"
    return PlannedClip(key, line.number, plan, wanted)


def _came_from_line(name: str, given: Mapping[str, Any]) -> bool:
    if name in ("height", "width") and "size" in given:
        return True
    if name in ("preset.dense_steps", "preset.dense_layers"):
        return name.removeprefix("preset.") in given
    return name in given


def _identity(plan: Plan, wanted: str | None) -> str:
    """Sixteen hexadecimal digits of everything that the clip's content depends on."""
    content = plan.model_dump(mode="json", exclude=_NOT_IDENTITY & set(Plan.model_fields))
    content["setup"].pop("offload", None)
    content["preset"] = plan.preset.model_dump(mode="json", exclude={"name", "description"})
    if plan.image is not None:  # a picture that was painted over is another picture
        content["image"] = hashlib.sha256(Path(plan.image).read_bytes()).hexdigest()
    if Path(plan.model_source).is_dir():  # the same folder, from wherever the command runs
        content["model_source"] = str(Path(plan.model_source).resolve())
    text = json.dumps([content, wanted], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _checked_name(name: str | None) -> str | None:
    """A plain file name with one of the endings (.mp4 where it has none); InputError for anything else."""
    if name is None:
        return None
    plain = unicodedata.normalize("NFC", name.strip())
    path = Path(plain or ".")
    if path.suffix.lower() not in ENDINGS:
        plain += ".mp4"
    # Joined emoji carry U+200D; nothing else that has no shape belongs in a name.
    printable = all(unicodedata.category(sign)[0] not in "CZ" or sign in " \u200d" for sign in plain)
    bad = not printable or re.search(r'[/\\:*?"<>|]', plain) or plain.startswith((".", "-", "~"))
    if bad or len(os.fsencode(plain)) > _MAX_NAME_BYTES:
        raise InputError(
            f"output takes a file name without a folder, of at most {_MAX_NAME_BYTES} bytes and without control "
            f'characters or any of / \\ : * ? " < > |, got {shown(name)}'
        )
    return plain


def _clashes(clips: Sequence[PlannedClip]) -> dict[str, list[int]]:
    """Names that more than one clip asks for, with their lines."""
    by_name: dict[str, list[PlannedClip]] = {}
    for clip in clips:
        if clip.wanted is not None:
            by_name.setdefault(_folded(clip.wanted), []).append(clip)
    return {same[0].wanted or "": [clip.line for clip in same] for same in by_name.values() if len(same) > 1}


def _folded(name: str) -> str:
    """What two names must differ in: their stems (records share one), whatever the case."""
    return unicodedata.normalize("NFC", Path(name).stem).casefold()


def _exists(clip: Path) -> bool:
    return os.path.lexists(clip) or os.path.lexists(record_path(clip))


def _free(folder: Path, stem: str, taken: set[str], overwrite: bool) -> str:
    number = 1
    while True:
        name = f"{stem}.mp4" if number == 1 else f"{stem}-{number}.mp4"
        if _folded(name) not in taken and (overwrite or not _exists(folder / name)):
            return name
        number += 1


def _without_dashes(sentence: str, given: Mapping[str, Any]) -> str:
    """A sentence about a flag, told of the line's field."""
    for name in given:
        sentence = re.sub(rf"--{name.replace('_', '-')}\b(?!-)", name, sentence)
    return sentence


def _sentences(wrong: Mapping[str, Sequence[int]], source: str, count: int) -> list[str]:
    """Sentences in the order of their first lines; one that is wrong with every line is not the lines' fault."""
    name = "stdin" if source == "-" else source
    ordered = sorted(wrong.items(), key=lambda pair: pair[1][0])
    found = []
    for sentence, numbers in ordered:
        if len(set(numbers)) == count and count > 1:
            found.append(sentence)
        elif len(numbers) == 1:
            found.append(f"{name} line {numbers[0]}: {sentence}")
        else:
            more = f" and {len(numbers) - 10} more" if len(numbers) > 10 else ""
            found.append(f"{name} lines {', '.join(map(str, numbers[:10]))}{more}: {sentence}")
    return found


def _lines(count: int) -> str:
    return "1 line" if count == 1 else f"{count} lines"
