"""The teacher: the same model with dense attention. What every forward of its sampling took and gave goes to disk.

A trajectory is one safetensors file: the transformer's inputs and outputs, forward by forward, as the pipeline called
it. So any pipeline can be tuned whose transformer is called once for each prompt, without a sampler of our own. Of a
user's clip the file has the latents and each step's noise level instead (see `flow_matching`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vmonarch_cli.errors import InputError, ModelError, NonFiniteError
from vmonarch_cli.families.registry import family_of
from vmonarch_cli.media.publish import atomic
from vmonarch_cli.pipeline.call import call, encode, sampling_of
from vmonarch_cli.pipeline.swap import swapped
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.presets import Preset, load_preset
from vmonarch_cli.tune.recorder import LATENTS, ForwardRecorder, Guidance, TeacherForward, narrow
from vmonarch_cli.tune.request import TunePlan

_KEY = "vmonarch_trajectory"
_CLEAN = "clean"
_LAYOUT = 2


@torch.no_grad()
def sample(
    pipeline: Any,
    clip: Plan,
    prompts: Sequence[str],
    seeds: Sequence[int],
    preset: Preset,
    recorder: ForwardRecorder | None = None,
    **swap: Any,
) -> Tensor:
    """Final latents (B, C, F, h, w), float32 on the CPU, of clips made side by side by the pipeline's own loop with a
    preset, one for each prompt and the seed of its noise. More than one only of a family that has `batches`.

    swap: further arguments of `swapped`. Raises NonFiniteError when they are not finite.
    """
    tokens = clip.model.max_sequence_length
    texts = prompts[0] if len(prompts) == 1 else list(prompts)
    embeddings = encode(pipeline, texts, clip.negative_prompt, clip.guidance_scale, tokens)
    noises = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    with swapped(pipeline, preset, **swap) as session, ExitStack() as records:
        if recorder is not None:
            records.enter_context(recorder.recording(pipeline, session))
        latents = call(
            pipeline,
            embeddings,
            (clip.height, clip.width, clip.num_frames),
            **{**sampling_of(clip, seeds[0]), "generator": noises[0] if len(noises) == 1 else noises},
        )
    if not torch.isfinite(latents).all():
        raise NonFiniteError(
            f"the latents of a clip with preset {preset.name} are not finite: a wider --dtype may help"
        )
    return latents.float().cpu()


def side_by_side(pipeline: Any, plan: TunePlan, numbers: Sequence[int]) -> Iterator[Sequence[int]]:
    """Numbers of clips in groups that can be sampled together: as many as are trained on at once."""
    size = plan.batch if family_of(pipeline).batches else 1
    return (numbers[first : first + size] for first in range(0, len(numbers), size))


def trajectory_path(plan: TunePlan, number: int) -> Path:
    """The file of a trajectory."""
    return plan.work / "trajectories" / f"{number:05d}.safetensors"


def sample_trajectories(pipeline: Any, plan: TunePlan, numbers: Sequence[int]) -> None:
    """Let the teacher make the clips of prompts, side by side, and keep their forwards; each file appears whole or not
    at all. Forwards of steps that the preset runs dense are left out, and so are files that are there.
    """
    missing = [number for number in numbers if not trajectory_path(plan, number).exists()]
    if not missing:
        return
    recorder = ForwardRecorder()
    prompts, noises = [plan.prompts[number] for number in missing], [plan.noise_seed(number) for number in missing]
    sample(pipeline, plan.clip, prompts, noises, load_preset("dense"), recorder)
    kept = [forward for forward in recorder.forwards if forward.step >= plan.dense_steps]
    for place, number in enumerate(missing):
        own = kept if len(missing) == 1 else _of_sample(kept, place, len(missing))
        save_trajectory(trajectory_path(plan, number), own, recorder.guidance)


def _of_sample(forwards: Sequence[TeacherForward], place: int, count: int) -> list[TeacherForward]:
    """What forwards of several clips took and gave for one of them."""
    parts: dict[int, Tensor] = {}

    def part(value: Tensor) -> Tensor:
        """One tensor for each that forwards share."""
        if value.dim() == 0 or value.shape[0] != count:
            return value
        return parts.setdefault(id(value), value[place : place + 1])

    return [
        replace(
            forward,
            inputs={name: part(value) for name, value in forward.inputs.items()},
            velocity=part(forward.velocity).contiguous(),
        )
        for forward in forwards
    ]


def save_trajectory(path: Path, forwards: Sequence[TeacherForward], guidance: Guidance) -> None:
    """Write forwards to a file, whole or not at all: latents and velocities in float16, other inputs as they are.

    What several forwards share is kept once.
    """
    tensors, table = _table_of(forwards, keep_latents=True)
    for number, forward in enumerate(forwards):
        tensors[f"{number}.velocity"] = forward.velocity
    _save(path, tensors, table, guidance)


def save_clip(
    path: Path, forwards: Sequence[TeacherForward], latents: Tensor, sigmas: Sequence[float | None], guidance: Guidance
) -> None:
    """Write a clip's latents (1, C, F, h, w), in float16, and what forwards take beside latents, whole or not at all.

    sigmas: noise level of each step of the sampler, its dense ones included; ModelError where it has none.
    """
    tensors, table = _table_of(forwards, keep_latents=False)
    for row in table:
        row["sigma"] = sigmas[row["step"]]
        if row["sigma"] is None:
            raise ModelError("the sampler of this model has no noise levels between clip and noise")
    _save(path, {**tensors, _CLEAN: narrow(latents)}, table, guidance)


def _table_of(
    forwards: Sequence[TeacherForward], *, keep_latents: bool
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """(the tensors that forwards took, each once, and for each forward what it took)."""
    tensors: dict[str, Tensor] = {}
    names: dict[tuple[Any, ...], str] = {}
    table: list[dict[str, Any]] = []
    for number, forward in enumerate(forwards):
        inputs = {}
        for name, value in forward.inputs.items():
            if name == LATENTS and not keep_latents:
                continue
            same = (value.data_ptr(), value.shape, value.stride(), value.dtype)  # all are alive: no address is two
            if same not in names:
                names[same] = f"{number}.{name}"
                tensors[names[same]] = value.cpu().clone(memory_format=torch.contiguous_format)
            inputs[name] = names[same]
        table.append(
            {"step": forward.step, "transformer": forward.transformer, "inputs": inputs, "constants": forward.constants}
        )
    return tensors, table


def _save(path: Path, tensors: dict[str, Tensor], table: list[dict[str, Any]], guidance: Guidance) -> None:
    said = {"layout": _LAYOUT, "guidance": asdict(guidance), "forwards": table}
    with atomic(path, overwrite=True) as temporary:
        save_file(tensors, temporary, {"format": "pt", _KEY: json.dumps(said)})


class Trajectories:
    """Some trajectories read side by side, forward by forward; all come from one sampler."""

    def __init__(self, paths: Sequence[Path], device: torch.device, seeds: Sequence[int] = ()) -> None:
        """seeds: one for each file, of the noise of clips; trajectories need none.

        Raises InputError when a file cannot be read, or is of another sampler.
        """
        self._device = device
        self._files = [_open(path) for path in paths]
        said = [_said(file, path) for file, path in zip(self._files, paths, strict=True)]
        self._tables: list[list[dict[str, Any]]] = [one["forwards"] for one in said]
        self.guidance = Guidance(**said[0]["guidance"])
        """Of sampling; a clip's file may have fewer forwards."""
        kinds = {tuple((row["step"], row["transformer"], row.get("sigma")) for row in rows) for rows in self._tables}
        if len(kinds) != 1:
            raise InputError(f"trajectories in {paths[0].parent} are of different samplers: remove the folder")
        self.of_clips = "sigma" in self._tables[0][0]
        """They are clips with noise, not the teacher's."""
        self._clean: Tensor | None = None
        if self.of_clips:
            self._clean = self._batched([_CLEAN] * len(paths), True)
            self._target = _noise(self._clean, seeds) - self._clean
        self.first_step: int = self._tables[0][0]["step"]
        """Of the sampler; those before it are dense."""
        self.steps: list[list[int]] = []
        """Numbers of the forwards of every step."""
        last = None
        for number, row in enumerate(self._tables[0]):
            if row["step"] != last:
                self.steps.append([])
            self.steps[-1].append(number)
            last = row["step"]

    def forward(self, number: int) -> TeacherForward:
        """A forward of all the trajectories, batched."""
        rows = [table[number] for table in self._tables]
        first = rows[0]
        inputs = {
            name: self._batched([row["inputs"][name] for row in rows], name == LATENTS) for name in first["inputs"]
        }
        if self._clean is not None:
            inputs[LATENTS] = self._clean + first["sigma"] * self._target
            velocity = self._target
        else:
            velocity = self._batched([f"{number}.velocity"] * len(rows), True)
        return TeacherForward(first["step"], first["transformer"], inputs, first["constants"], velocity)

    def _batched(self, names: Sequence[str], wide: bool) -> Tensor:
        parts = [file.get_tensor(name) for file, name in zip(self._files, names, strict=True)]
        of_sample = parts[0].dim() > 0 and parts[0].shape[0] == 1
        whole = (torch.cat(parts) if len(parts) > 1 and of_sample else parts[0]).to(self._device)
        return whole.float() if wide else whole


def _noise(latents: Tensor, seeds: Sequence[int]) -> Tensor:
    """Standard normal, one sample for each seed: the same on every machine."""
    shape = latents.shape[1:]
    samples = [torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds]
    return torch.stack(samples).to(latents.device)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except Exception as error:
        raise InputError(f"trajectory {path} cannot be read: remove it, and it will be made again") from error


def _said(file: Any, path: Path) -> dict[str, Any]:
    try:
        said: dict[str, Any] = json.loads((file.metadata() or {})[_KEY])
        if said["layout"] == _LAYOUT:
            return said
    except (KeyError, TypeError, ValueError):
        pass
    raise InputError(f"{path} is no trajectory of this version: remove it, and it will be made again")
