"""`vmonarch calibrate`: whole runs on a tiny model, what a forecast is worth, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_wan import GRID, LAYERS
from typer.testing import CliRunner

from vmonarch_cli.attention.session import AttentionSession
from vmonarch_cli.attention.structured import AttentionCall, StructuredAttention
from vmonarch_cli.cli.app import app
from vmonarch_cli.cli.phase_progress import PhaseProgress
from vmonarch_cli.clip.interrupts import Interrupted
from vmonarch_cli.models.tuned import fingerprint
from vmonarch_cli.plan.costs import Work
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve
from vmonarch_cli.plan.step_schedule import FIRST_STAGE, schedule_for
from vmonarch_cli.presets import Preset, at_steps, load_preset, read_preset
from vmonarch_cli.profile.calibrate.allocate import Allocator, layer_groups, step_groups
from vmonarch_cli.profile.calibrate.forecast import CallKind, Replay, Weights
from vmonarch_cli.profile.calibrate.lacks import LackRecorder
from vmonarch_cli.profile.calibrate.limits import bare, units_of
from vmonarch_kernels import dense_attention

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = ("a red circle moving left", "a blue circle moving right", "a red square moving left", "a blue square")
STEPS, HEADS, DIM = 4, 2, 16
SHAPE = "--size 48x32 --num-frames 17 --guidance-scale 3"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """A file of four prompts outside the folder that a command runs in."""
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["calibrate", *arguments])


def test_it_writes_a_preset_that_keeps_the_budget_and_carries_what_it_rests_on(
    tiny_wan_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    file = tmp_path / "mine.toml"
    flags = f"{SHAPE} --steps {STEPS} --budget 17.8 --eval-prompts 2 --prompts-file {prompts} -o {file}".split()
    result = run("-m", str(tiny_wan_folder), *flags, "--json")
    assert result.exit_code == 0, result.stderr
    said, preset = json.loads(result.stdout), read_preset(file)
    plan = resolve(
        GenerateRequest(
            model=str(tiny_wan_folder),
            prompt="x",
            size="48x32",
            num_frames=17,
            steps=STEPS,
            guidance_scale=3.0,
            preset=str(file),
        )
    )
    work = Work(plan.model, plan.grid, STEPS, 2, plan.flow_shift)
    assert said["after"]["units"] == pytest.approx(units_of(work, preset))
    assert said["after"]["units"] <= 17.8
    assert preset.step_refresh is not None
    assert len(preset.step_refresh) == STEPS
    assert preset.layer_refresh is None or len(preset.layer_refresh) == LAYERS
    assert said["fingerprint"] == fingerprint(tiny_wan_folder)
    assert preset.evidence is not None
    assert said["fingerprint"][:12] in preset.evidence[0]
    assert f"{said['before']['error_mean']:.4f}" in preset.evidence[1]
    assert f"{said['after']['error_mean']:.4f}" in preset.evidence[2]
    assert (said["before"]["preset"], said["after"]["preset"]) == ("balanced", "mine")
    assert [line.partition(":")[0] for line in preset.evidence[1:]] == ["balanced", "mine"]
    assert len(said["after"]["errors"]) == 2
    assert [row["first"] for row in said["steps"]] == [1, 2, 3, 4]
    assert all(row["error"] > 0 for row in (*said["steps"], *said["layers"]))
    shown = CliRunner().invoke(app, ["presets", "show", str(file)])
    assert "evidence" in shown.stdout
    assert "held-out prompts" in " ".join(shown.stdout.split())
    again = run("-m", str(tiny_wan_folder), *flags)
    assert again.exit_code == 2
    assert "exists already" in again.stderr


def test_an_error_to_reach_takes_more_work_than_one_that_is_reached_at_once(
    tiny_wan_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    found = []
    for error in ("1", "0.2"):
        file = tmp_path / f"e{error.replace('.', '_')}.toml"
        flags = f"{SHAPE} --steps 2 --eval-prompts 1 --prompts-file {prompts} --error {error} --json -o {file}"
        result = run("-m", str(tiny_wan_folder), *flags.split())
        assert result.exit_code == 0, result.stderr
        found.append(json.loads(result.stdout)["after"])
        assert found[-1]["error_mean"] <= float(error)
    assert found[0]["units"] < found[1]["units"]


def test_an_error_that_no_preset_reaches_is_one_sentence_and_no_file(
    tiny_wan_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    file = tmp_path / "never.toml"
    flags = f"{SHAPE} --steps 2 --eval-prompts 1 --prompts-file {prompts} --error 0 -o {file}"
    result = run("-m", str(tiny_wan_folder), *flags.split())
    assert result.exit_code == 2
    assert "error: --error 0 was not reached: the best of 3 presets came to" in result.stderr
    assert not file.exists()


def test_a_preset_that_gains_nothing_is_said(tiny_wan_folder: Path, prompts: Path, tmp_path: Path) -> None:
    """Without exact frames, and with no work left for them, the starting preset is all that can be found."""
    file = tmp_path / "same.toml"
    bare_paper = "--preset paper --set first_frame=false"
    flags = f"{SHAPE} --steps 2 --eval-prompts 1 --prompts-file {prompts} {bare_paper} -o {file}"
    result = run("-m", str(tiny_wan_folder), *flags.split())
    assert result.exit_code == 0, result.stderr
    said = " ".join(result.stderr.split())
    assert "warning: paper is as close to dense attention on the held-out prompts" in said
    assert "same.toml gains nothing here" in said
    assert read_preset(file).step_refresh == (0.0, 0.0)


def test_a_run_that_is_stopped_writes_nothing(
    tiny_wan_folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: PhaseProgress, words: str, done: int, total: int | None) -> None:
        if "balanced" in words:
            raise Interrupted(2)

    monkeypatch.setattr(PhaseProgress, "phase", stop)
    file = tmp_path / "stopped.toml"
    flags = f"{SHAPE} --steps 2 --eval-prompts 1 --prompts-file {prompts} -o {file}"
    result = run("-m", str(tiny_wan_folder), *flags.split())
    assert result.exit_code == 130
    assert sorted(path.name for path in tmp_path.iterdir() if "toml" in path.name or "tmp" in path.name) == []


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("", "--output is missing: it takes the file of the preset"),
        ("-o a.txt", "--output takes a file that ends in .toml, got 'a.txt'"),
        ("-o [a].toml", "--output: field 'name' takes 1 to 60 printable characters without brackets"),
        ("-o a.toml --budget 5", "--budget 5 is less than structured attention costs without any exact frames: 1"),
        ("-o a.toml --budget 52", "--budget 52 is not below dense attention, which costs 52 units with 13 latent"),
        ("-o a.toml --budget nan", "--budget takes a number from 0 to"),
        ("-o a.toml --error 2", "--error takes a number from 0 to 1, got 2"),
        ("-o a.toml --error 0.1 --budget 20", "--budget and --error are both given"),
        ("-o a.toml --preset dense", "preset dense is dense attention, what all others are measured against"),
        ("-o a.toml --preset exact", "preset exact is exact on 13 latent frames, so that there is nothing to measure"),
        ("-o a.toml --num-frames 1", "is exact on 1 latent frame, so that"),
        ("-o a.toml --eval-prompts 0", "--eval-prompts takes a whole number from 1 to 1000, got 0"),
        ("-o a.toml --model wan2.1-1.3b", "no prompts to calibrate wan2.1-1.3b with"),
        ("-o a.toml --prompts-file none.txt", "prompts file none.txt does not exist"),
        ("-o a.toml --prompts-file one.txt --eval-prompts 1", "--eval-prompts 1 leaves no prompt to measure with"),
        ("-o a.toml --prompts-file none_in_it.txt", "has no prompts"),
        ("-o a.toml --seed random", "--seed -1 draws another seed each time"),
        ("-o a.toml --video a.mp4", "No such option: --video"),
        ("-o a.toml a red circle", "words without a flag are not taken"),
    ],
)
def test_what_is_refused_before_anything_loads(
    flags: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.txt").write_text("a red circle\n")
    (tmp_path / "none_in_it.txt").write_text("\n")
    result = run(*flags.split())
    assert result.exit_code == 2, result.stderr
    assert sentence in " ".join(result.stderr.split())
    assert not list(tmp_path.glob("*.toml"))


# What a forecast is worth


class Calls:
    """q, k and v of a clip's calls, as a model without layers between them would give them."""

    def __init__(self, layers: int = 2, forwards: int = 2) -> None:
        self.layers, self.forwards = layers, forwards
        random = torch.Generator().manual_seed(3)
        tokens = GRID[0] * GRID[1] * GRID[2]
        self._base = torch.randn(3, layers, forwards, 1, tokens, HEADS, DIM, generator=random) * 1.5
        self._drift = torch.randn(3, layers, forwards, 1, tokens, HEADS, DIM, generator=random) * 0.2

    def through(self, preset: Preset, see: Callable[[AttentionCall], torch.Tensor]) -> None:
        """Give every call of a clip to `see`, in a session with a preset."""
        session = AttentionSession(preset, [self.layers], attention=see)
        session.begin_clip(STEPS)
        for step in range(STEPS):
            session.begin_step(step, STEPS)
            for forward in range(self.forwards):
                session.begin_forward(0, GRID, torch.device("cpu"), forwards=self.forwards)
                for layer in range(self.layers):
                    q, k, v = (self._base + step * self._drift)[:, layer, forward]
                    session.attend(q, k, v, 0, layer)
            session.end_step()


def lacking(calls: Calls, preset: Preset, guidance: float) -> np.ndarray[Any, Any]:
    """(steps, layers): squared error of guided calls, as the product computes them."""
    structured = StructuredAttention(preset, [calls.layers])
    errors: dict[tuple[int, int], torch.Tensor] = {}
    share = (guidance, 1 - guidance)

    def see(call: AttentionCall) -> torch.Tensor:
        dense = dense_attention(call.q, call.k, call.v)
        error = share[call.key.forward] * (dense - structured(call))
        place = (call.step, call.key.layer)
        errors[place] = errors.get(place, torch.zeros_like(error)) + error
        return dense

    calls.through(bare(preset), see)
    return np.array([[float(errors[s, n].square().sum()) for n in range(calls.layers)] for s in range(STEPS)])


@pytest.mark.parametrize("first_frame", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_a_replay_is_what_frame_refresh_does(first_frame: bool, shared: bool) -> None:
    preset = at_steps(load_preset("balanced"), STEPS).model_copy(
        update={
            "first_frame": first_frame,
            "shared_refresh": shared,
            "step_refresh": (1.5, 1.0, 0.5, 1.0),
            "layer_refresh": (1.0, 0.5),
            "refresh": 1.0,
            "first_turns": None,
        }
    )
    calls = Calls()
    recorder = LackRecorder(bare(preset), [calls.layers], STEPS)
    calls.through(bare(preset), recorder)
    replay = Replay([recorder.lacks()], guidance_scale=3.0)
    schedule = schedule_for(preset, GRID[0], STEPS, calls.layers)
    kind = CallKind(first_frame, shared)
    for layer, expected in enumerate(lacking(calls, preset, 3.0).T):
        due = tuple(schedule.due(step, layer, calls.forwards, FIRST_STAGE) for step in range(STEPS))
        assert sum(due) > 0
        # A sketch keeps a frame's squared norm to about an eighth, and a call has five frames.
        assert replay.layer(layer, due, kind)[:, 0] == pytest.approx(expected, rel=0.35)


def test_exact_frames_go_where_they_lower_the_error(tiny_wan_folder: Path) -> None:
    """A step that matters a hundred times as much as the others gets more than its part."""
    by_step, by_layer = (0.01, 0.01, 1, 0.01), (1, 1, 1)
    model = resolve(
        GenerateRequest(
            model=str(tiny_wan_folder), prompt="x", size="48x32", num_frames=17, steps=STEPS, guidance_scale=1.0
        )
    ).model
    preset = at_steps(load_preset("balanced"), STEPS)
    calls = Calls(layers=LAYERS, forwards=1)
    recorder = LackRecorder(bare(preset), [LAYERS], STEPS)
    calls.through(bare(preset), recorder)
    replay = Replay([recorder.lacks()], 1.0)
    work = Work(model, GRID, STEPS, 1)
    weights = Weights(replay, step_groups(STEPS), layer_groups(LAYERS), (np.array(by_step), np.array(by_layer)))
    allocator = Allocator(work, preset, replay, weights)
    found = min(allocator.candidates(19), key=lambda found: found.error)
    assert found.units <= 19
    even = found.preset.model_copy(update={"step_refresh": None, "layer_refresh": None, "dense_layers": 0})
    for refresh in np.arange(0, 3, 0.01):
        tried = even.model_copy(update={"refresh": float(refresh), "first_turns": 0.0})
        if units_of(work, tried) > 19:
            break
        even_within = tried
    assert found.error < 0.9 * allocator.forecast(even_within)
