"""From flags and lines to clips: each with a plan of its own, a key that says what it is, and a name in the folder."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vmonarch_cli.batch.faults import Faults
from vmonarch_cli.batch.keys import identity_of
from vmonarch_cli.batch.lines import PRESET_FIELD, Line, Prompts
from vmonarch_cli.batch.manifest import ManifestEntry
from vmonarch_cli.batch.names import Names, folded, plain_name
from vmonarch_cli.batch.prompts import STDIN
from vmonarch_cli.errors import InputError, OutputError, VmonarchError
from vmonarch_cli.media.paths import DEFAULT_FOLDER, ENDINGS, is_taken, output_path, slug
from vmonarch_cli.plan import checks
from vmonarch_cli.plan.auto import MARK
from vmonarch_cli.plan.defaults import default_of
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve
from vmonarch_cli.plan.seeds import DRAWN, RANDOM
from vmonarch_cli.plan.tuned import NONE, read
from vmonarch_cli.text import shown
from vmonarch_cli.untrusted.files import user_path

LINE = "prompts file"
"""Origin of a setting that a line gave."""
_SIZE = {"size", "height", "width"}
_SOURCES = {"image", "video"}
STAND_IN = "a red circle"
"""Stands for a prompt where something else is checked."""


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
    output = DEFAULT_FOLDER if request.output is None else request.output
    # An empty one is asked for first: `output_path` would say that it takes a file, too.
    folder = output_path(output) if output.strip() else None
    if folder is None or (folder.suffix.lower() in ENDINGS and not folder.is_dir()):
        raise OutputError(f"--output takes a folder with --prompts-file, got {shown(output)}")
    return folder


def plan_clips(request: GenerateRequest, prompts: Prompts) -> tuple[list[PlannedClip], list[str]]:
    """Clips in the order of the lines, and notes about flags that beat lines; nothing is named yet.

    Raises InputErrors with a sentence for everything that is wrong with the file: its form, each setting of each line
    (also where the line has other faults), and names that clash.
    """
    if request.prompt is not None:
        raise InputError("--prompt and --prompts-file say the same thing twice: give one of them")
    folder = batch_folder(request)
    count = _count(request)
    planner = _Planner(request, folder, Faults(prompts))
    clips: list[PlannedClip] = []
    for line in prompts.lines:
        clips += planner.plan(line, count)
    for name, numbers in _clashes(clips).items():
        for number in numbers:
            planner.faults.add(number, f"{shown(name)} is the name of more than one clip")
    planner.faults.raise_any()
    notes = [f"--{name.replace('_', '-')} beats {name} in {_lines(n)}" for name, n in planner.beaten.items()]
    return clips, notes


def assign_names(
    clips: Sequence[PlannedClip], folder: Path, entries: Mapping[str, ManifestEntry], source: str, *, overwrite: bool
) -> list[PlannedClip]:
    """Every clip with its name: the manifest's for a clip that it knows, the line's, or one from prompt and seed.

    Names differ in more than letter case, and none of them is taken by a file or another clip of the folder (with
    `overwrite` a file is no obstacle). InputErrors for lines whose own name is taken.
    """
    given = {clip.key: entries[clip.key].name for clip in clips if clip.key in entries}
    names = Names(folder, (entry.name for entry in entries.values()), overwrite=overwrite)
    faults = Faults(Prompts("stdin" if source == STDIN else source, [], []))
    for clip in clips:
        if clip.key in given or clip.wanted is None:
            continue
        path = folder / clip.wanted
        if names.is_taken(clip.wanted):
            faults.add(clip.line, f"{clip.wanted} is the name of another clip of {folder}: choose another")
        elif is_taken(path, with_sound=bool(clip.plan.audio)) and not overwrite:
            faults.add(clip.line, f"{path} exists already: pass --overwrite to replace it, or choose another name")
        given[clip.key] = names.take(clip.wanted)
    faults.raise_any()
    for clip in clips:
        if clip.key not in given:
            given[clip.key] = names.free(f"{slug(clip.plan.prompt)}-s{clip.plan.seed}")
    return [clip.named(folder, given[clip.key]) for clip in clips]


def in_running_order(clips: Iterable[PlannedClip]) -> list[PlannedClip]:
    """Clips of one kind, shape and preset after each other, so that nothing loads or compiles twice; else by line."""
    groups: dict[object, list[PlannedClip]] = {}
    for clip in sorted(clips, key=lambda clip: loaded_as(clip.plan)):
        plan = clip.plan
        group = (
            *loaded_as(plan),
            plan.height,
            plan.width,
            plan.num_frames,
            plan.preset,
            plan.guidance_scale > 1,
            plan.flow_shift,
        )
        groups.setdefault(group, []).append(clip)
    return [clip for group in groups.values() for clip in group]


def loaded_as(plan: Plan) -> tuple[str, ...]:
    """What plans of one model must share to run on one loaded pipeline."""
    files = plan.setup.single_files
    return (
        "" if plan.pipeline == plan.model.pipeline else plan.pipeline,
        *(files.get(name, "") for name in ("transformer", "transformer_2")),
    )


class _Planner:
    """Plans the clips of one file's lines, one line after the other."""

    def __init__(self, request: GenerateRequest, folder: Path, faults: Faults) -> None:
        self.faults = faults
        self.beaten: Counter[str] = Counter()
        self._request = request
        self._folder = folder
        self._seen: Counter[str] = Counter()
        self._alone: dict[str, str | None] = {}
        self._of_flags: str | None = self._sentence(self._with_output(replace(request, prompt=STAND_IN), None))

    def plan(self, line: Line, count: int) -> list[PlannedClip]:
        """The clips of one line; what is wrong with it is noted, and then there are none."""
        merged, given, lost = _merge(self._request, line)
        self.beaten.update(lost)
        wanted, name_fault = self._name(line)
        if line.refused and "prompt" not in line.fields:
            merged = replace(merged, prompt=STAND_IN)
        if name_fault is None and not line.refused:
            try:
                return [self._clip(merged, given, line, wanted, offset) for offset in range(count)]
            except VmonarchError as error:
                self._note(line, error.message, given)
        else:
            if name_fault is not None:
                self.faults.add(line.number, name_fault)
            sentence = self._sentence(self._with_output(merged, wanted))
            if sentence is not None:
                self._note(line, sentence, given)
        for name, value in given.items():
            sentence = self._sentence_about(name, value, given)
            if sentence is not None:
                self._note(line, sentence, given)
        return []

    def _name(self, line: Line) -> tuple[str | None, str | None]:
        """(the name that the line asks for, what is wrong with it)."""
        name = line.fields.get("output")
        try:
            return (None if name is None else plain_name(name)), None
        except InputError as error:
            return None, error.message

    def _note(self, line: Line, sentence: str, given: Mapping[str, Any]) -> None:
        self.faults.add(line.number, _without_dashes(sentence, given), of_flags=sentence == self._of_flags)

    def _sentence(self, request: GenerateRequest) -> str | None:
        """What is wrong with a request, if anything is: its first fault."""
        return self._sentence_of(lambda: resolve(request))

    def _sentence_of(self, check: Callable[[], object]) -> str | None:
        try:
            check()
        except VmonarchError as error:
            return error.message
        return None

    def _sentence_about(self, name: str, value: Any, given: Mapping[str, Any]) -> str | None:
        """What is wrong with one field of a line, whatever is wrong with the others."""
        if name == "tuned":  # whether it fits the line's preset is known with the rest of the line alone
            return self._sentence_of(lambda: value == NONE or read(user_path(value, "--tuned")))
        if name == "strength":  # whether there is a video is known with the rest of the line alone
            return self._sentence_of(lambda: checks.number("--strength", value, *checks.STRENGTHS))
        model = GenerateRequest(
            model=self._request.model,
            revision=self._request.revision,
            image=self._request.image,
            defaults=self._request.defaults,
            video=self._request.video,
            prompt=STAND_IN,
        )
        for source in _SOURCES & given.keys() - {name}:  # without its picture a model that continues one takes nothing
            with_source = _set(model, {source: given[source]})
            if self._alone_with(with_source) is None:
                model = with_source
        sentence = self._alone_with(_set(model, {name: value}))
        return None if sentence == self._alone_with(model) else sentence  # what is wrong without it is not its fault

    def _alone_with(self, request: GenerateRequest) -> str | None:
        known = repr(request)
        if known not in self._alone:
            self._alone[known] = self._sentence(self._with_output(request, None))
        return self._alone[known]

    def _with_output(self, request: GenerateRequest, wanted: str | None) -> GenerateRequest:
        # The name is settled later: here the folder is checked, and the rate where the ending is known.
        return replace(request, output=str(self._folder / (wanted or "clip.mp4")), overwrite=True)

    def _clip(
        self, request: GenerateRequest, given: Mapping[str, Any], line: Line, wanted: str | None, offset: int
    ) -> PlannedClip:
        first = default_of(request, "seed")
        seed = request.seed if not offset or first == RANDOM else (first or 0) + offset
        plan = resolve(self._with_output(replace(request, seed=seed), wanted))
        if "recipe" in given and plan.setup.loras != default_of(self._request, "loras"):
            raise InputError(
                f"recipe {given['recipe']} loads a LoRA, which is the same for all clips of a batch: give it as a flag"
            )
        origins = {name: LINE if _came_from_line(name, given) else origin for name, origin in plan.origins.items()}
        for name, mark in (("seed", DRAWN), ("preset", MARK)):
            if plan.origins[name].endswith(mark) and not origins[name].endswith(mark):
                origins[name] += mark
        origins["output"] = LINE if wanted else "default"
        plan = plan.model_copy(update={"origins": origins, "overwrite": False})
        if wanted is not None and offset:
            wanted = str(Path(wanted).with_stem(f"{Path(wanted).stem}-{offset + 1}"))
        identity = identity_of(plan, wanted)
        self._seen[identity] += 1
        key = identity if self._seen[identity] == 1 else f"{identity}-{self._seen[identity]}"
        return PlannedClip(key, line.number, plan, wanted)


def _merge(request: GenerateRequest, line: Line) -> tuple[GenerateRequest, dict[str, Any], list[str]]:
    """The request for one line, the line's fields that count, and the fields that a flag beat."""
    flags = request.given()
    flags |= _SIZE if flags & _SIZE else set()
    flags |= {PRESET_FIELD + text.partition("=")[0].strip().replace("-", "_") for text in request.overrides}
    flags |= {PRESET_FIELD + name for name in flags & {"dense_steps", "dense_layers", "impl"}}
    settable = {name: value for name, value in line.fields.items() if name != "output"}
    given = {name: value for name, value in settable.items() if name not in flags}
    return _set(replace(request, num_videos=None), given), given, [name for name in settable if name in flags]


def _set(request: GenerateRequest, given: Mapping[str, Any]) -> GenerateRequest:
    """A request with a line's fields."""
    ordinary = {name: value for name, value in given.items() if not name.startswith(PRESET_FIELD)}
    of_preset = tuple(
        f"{name.removeprefix(PRESET_FIELD)}={value}" for name, value in given.items() if name.startswith(PRESET_FIELD)
    )
    return replace(request, **ordinary, overrides=(*request.overrides, *of_preset))


def _count(request: GenerateRequest) -> int:
    count = request.num_videos
    if count is not None and not 1 <= count <= 1000:
        raise InputError(f"--num-videos takes a whole number from 1 to 1000, got {count}")
    return count or 1


def _came_from_line(name: str, given: Mapping[str, Any]) -> bool:
    if name in ("height", "width") and "size" in given:
        return True
    if name in ("preset.dense_steps", "preset.dense_layers"):
        return name in given or name.removeprefix(PRESET_FIELD) in given
    return name in given


def _clashes(clips: Sequence[PlannedClip]) -> dict[str, list[int]]:
    """Names that more than one clip asks for, with their lines."""
    by_name: dict[str, list[PlannedClip]] = {}
    for clip in clips:
        if clip.wanted is not None:
            by_name.setdefault(folded(clip.wanted), []).append(clip)
    return {same[0].wanted or "": [clip.line for clip in same] for same in by_name.values() if len(same) > 1}


def _without_dashes(sentence: str, given: Mapping[str, Any]) -> str:
    """A sentence about a flag, as one about the line's field."""
    for name in given:
        sentence = re.sub(rf"--{re.escape(name.replace('_', '-'))}\b(?!-)", name, sentence)
    if any(name.startswith(PRESET_FIELD) for name in given):
        sentence = sentence.replace("--set: field '", f"field '{PRESET_FIELD}")
    return sentence


def _lines(count: int) -> str:
    return "1 line" if count == 1 else f"{count} lines"
