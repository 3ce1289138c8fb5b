"""Lines to clips: precedence, keys, and names that stay in the folder whatever the file says."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import adapters
import pytest
import records
from batches import batch, request
from command import call
from PIL import Image

from vmonarch_cli.batch.clips import PlannedClip, in_running_order, plan_clips
from vmonarch_cli.batch.folder import Batch, Terms
from vmonarch_cli.batch.lines import Line, Prompts
from vmonarch_cli.batch.manifest import happened
from vmonarch_cli.errors import InputError, InputErrors, OutputError
from vmonarch_cli.presets import load_preset

HOSTILE = [
    "../../etc/passwd",
    "/etc/passwd",
    "a cat\nrm -rf ~\r\0\x1b[31m",
    "🐈‍⬛ 🎬" * 10,
    "x" * 10_000,
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "$(touch owned); `touch owned` | touch owned && touch owned > owned",
    "%s%n{0}{prompt}",
    "--output /tmp/owned",
    "CON",
    "manifest.jsonl",
    ".vmonarch",
    "one very long prompt that is cut at the same word as its twin here, first",
    "one very long prompt that is cut at the same word as its twin here, second",
    "\u202egpj.exe",
]

LARGE: dict[str, Any] = {"height": None, "width": None, "num_frames": None}


def clips(model: Path, folder: Path, lines: list[Line], **flags: Any) -> list[PlannedClip]:
    return plan_clips(request(model, folder, **flags), Prompts("p", lines, []))[0]


def lines(*prompts: str, **fields: Any) -> list[Line]:
    return [Line(i + 1, {"prompt": prompt, **fields}) for i, prompt in enumerate(prompts)]


def names(opened: Batch) -> list[str]:
    return [clip.path.name for clip in opened.clips]


def test_flags_beat_lines_and_lines_beat_presets_and_models(tiny_wan_folder: Path, tmp_path: Path) -> None:
    line = Line(4, {"prompt": "x", "steps": 7, "size": "64x64", "preset": "fast", "seed": 3, "dense_steps": 1})
    made, notes = plan_clips(request(tiny_wan_folder, tmp_path, height=None, width=None), Prompts("p", [line], []))
    plan = made[0].plan
    assert (plan.steps, plan.height, plan.preset.name, plan.seed, plan.preset.dense_steps) == (2, 64, "fast", 3, 1)
    origins = {name: plan.origins[name] for name in ("steps", "height", "seed", "preset", "preset.dense_steps")}
    assert origins == {
        "steps": "flag",
        "height": "prompts file",
        "seed": "prompts file",
        "preset": "prompts file",
        "preset.dense_steps": "prompts file",
    }
    assert plan.origins["preset.band"] == "preset"
    assert notes == ["--steps beats steps in 1 line"]
    made, notes = plan_clips(request(tiny_wan_folder, tmp_path), Prompts("p", [line], []))
    assert (made[0].plan.height, sorted(notes)) == (
        32,
        ["--size beats size in 1 line", "--steps beats steps in 1 line"],
    )


def test_a_flag_of_0_beats_lines(tiny_wan_folder: Path, tmp_path: Path) -> None:
    given = [Line(1, {"prompt": "x", "seed": 7, "guidance_scale": 2.0, "preset.dense_steps": "1"})]
    (clip,) = clips(tiny_wan_folder, tmp_path, given, seed=0, guidance_scale=0.0, dense_steps=0)
    assert (clip.plan.seed, clip.plan.guidance_scale, clip.plan.preset.dense_steps) == (0, 0.0, 0)
    assert {clip.plan.origins[name] for name in ("seed", "guidance_scale", "preset.dense_steps")} == {"flag"}


def test_all_bad_lines_are_said_together(tiny_wan_folder: Path, tmp_path: Path) -> None:
    wrong = [
        Line(2, {"prompt": " "}),
        Line(3, {"prompt": "x", "preset": "papre"}),
        Line(4, {"prompt": "x"}),
        Line(5, {"prompt": "x", "seed": -2}),
        Line(6, {"prompt": "x", "output": "../x"}),
        Line(7, {"prompt": "x", "output": "Same.mp4"}),
        Line(8, {"prompt": "y", "output": "same.gif"}),
        Line(9, {"prompt": "x", "preset": "papre"}),
    ]
    with pytest.raises(InputErrors) as caught:
        clips(tiny_wan_folder, tmp_path, wrong)
    sentences = caught.value.sentences
    assert [sentence.split(":")[0] for sentence in sentences] == [
        "p line 2",
        "p lines 3, 9",
        "p line 5",
        "p line 6",
        "p lines 7, 8",
    ]
    assert "did you mean paper?" in sentences[1]
    assert (
        sentences[2]
        == "p line 5: seed takes a whole number from 0 to 9223372036854775807, or -1 for a random one, got -2"
    )
    assert list(tmp_path.iterdir()) == []


def test_what_is_wrong_with_a_flag_is_not_said_of_every_line(tiny_wan_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputErrors) as caught:
        clips(tiny_wan_folder, tmp_path, lines("a", "b", "c"), steps=0)
    assert caught.value.sentences == ("--steps takes a whole number from 1 to 1000, got 0",)
    with pytest.raises(InputError, match="--prompt and --prompts-file"):
        clips(tiny_wan_folder, tmp_path, lines("a"), prompt="b")
    with pytest.raises(OutputError, match="--output takes a folder with --prompts-file, got "):
        clips(tiny_wan_folder, tmp_path / "x.mp4", lines("a"))


def test_names_of_hostile_prompts_stay_in_the_folder(tiny_wan_folder: Path, tmp_path: Path) -> None:
    made = clips(tiny_wan_folder, tmp_path / "out", lines(*HOSTILE))
    assert len({clip.key for clip in made}) == len(HOSTILE)
    opened = batch(tiny_wan_folder, tmp_path / "out", format="jsonl", text="\n".join(_json(line) for line in HOSTILE))
    found = names(opened)
    assert all(clip.path.parent == tmp_path / "out" for clip in opened.clips)
    assert all(name.isascii() and not name.startswith((".", "-")) and "/" not in name for name in found)
    assert len({name.lower() for name in found}) == len(HOSTILE)
    assert max(map(len, found)) < 70
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["manifest.jsonl", "out"]
    for line in (tmp_path / "out" / "manifest.jsonl").read_bytes().split(b"\n"):
        assert line.isascii()


def _json(text: str) -> str:
    import json

    return json.dumps({"prompt": text})


@pytest.mark.parametrize(
    "name",
    [
        *("../x.mp4", "/var/x.mp4", "a/b", "a\\b", ".hidden", "..", ".", " ", "-rf", "~x", "a\nb", "a\0b"),
        *("x" * 300, "\u202ex", "a:b", "é" * 95),
    ],
)
def test_names_that_are_no_plain_file_names_are_refused(tiny_wan_folder: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(InputErrors, match=r"p line 1: output takes a file name"):
        clips(tiny_wan_folder, tmp_path, [Line(1, {"prompt": "x", "output": name})])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("x", "x.mp4"),
        ("x.gif", "x.gif"),
        ("a b.v2", "a b.v2.mp4"),
        ("🎬", "🎬.mp4"),
        ("\U0001f469\u200d\U0001f680.png", "\U0001f469\u200d\U0001f680.png"),
        ("$(x)&;'", "$(x)&;'.mp4"),
    ],
)
def test_names_that_are(tiny_wan_folder: Path, tmp_path: Path, name: str, expected: str) -> None:
    (clip,) = clips(tiny_wan_folder, tmp_path, [Line(1, {"prompt": "x", "output": name})])
    assert clip.wanted == expected


def test_names_are_kept_and_never_given_twice(tiny_wan_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "red-s0.mp4").touch()
    (tmp_path / "red-s0-2.json").touch()
    text = '{"prompt": "red"}\n{"prompt": "red!"}\n{"prompt": "blue", "output": "Red-s0-4.mp4"}\n{"prompt": "red"}'
    opened = batch(tiny_wan_folder, tmp_path, text, format="jsonl")
    assert names(opened) == ["red-s0-3.mp4", "red-s0-5.mp4", "Red-s0-4.mp4", "red-s0-6.mp4"]
    more = '{"prompt": "green"}\n{"prompt": "red"}\n' + text.replace("\n", "\n\n")
    again = batch(tiny_wan_folder, tmp_path, more, format="jsonl")
    assert names(again) == [
        "green-s0.mp4",
        "red-s0-3.mp4",
        "red-s0-6.mp4",
        "red-s0-5.mp4",
        "Red-s0-4.mp4",
        "red-s0-7.mp4",
    ]
    with pytest.raises(InputErrors, match=r"line 5: .*red-s0\.mp4 exists already: pass --overwrite"):
        batch(tiny_wan_folder, tmp_path, text + '\n{"prompt": "new", "output": "red-s0"}', format="jsonl")
    with pytest.raises(InputErrors, match=r"red-s0-5\.mp4 is the name of another clip"):
        batch(tiny_wan_folder, tmp_path, text + '\n{"prompt": "new", "output": "red-s0-5"}', format="jsonl")


def test_a_manifest_of_other_clips_is_not_joined_by_accident(tiny_wan_folder: Path, tmp_path: Path) -> None:
    batch(tiny_wan_folder, tmp_path, "red\nblue")
    before = (tmp_path / "manifest.jsonl").read_bytes()
    with pytest.raises(InputError, match="holds another batch, of 2 clips, none of which"):
        batch(tiny_wan_folder, tmp_path, "red\nblue", steps=3)
    assert (tmp_path / "manifest.jsonl").read_bytes() == before
    assert names(batch(tiny_wan_folder, tmp_path, "red\nblue", steps=3, terms=Terms(resume=True))) == [
        "red-s0-2.mp4",
        "blue-s0-2.mp4",
    ]
    assert names(batch(tiny_wan_folder, tmp_path, "red\nblue\ngreen")) == ["red-s0.mp4", "blue-s0.mp4", "green-s0.mp4"]
    with pytest.raises(InputError, match="--resume keeps what is done and --overwrite makes it again"):
        batch(tiny_wan_folder, tmp_path, "red", terms=Terms(resume=True, overwrite=True))


def test_what_is_due_again(tiny_wan_folder: Path, tmp_path: Path) -> None:
    opened = batch(tiny_wan_folder, tmp_path, "red\nblue\ngreen")
    for clip in opened.clips[:2]:
        records.write(clip.plan, clip=True)
        opened.manifest.append(happened("done", clip.key))
    opened.manifest.append(happened("failed", opened.clips[2].key, error="why"))

    def status(**terms: Any) -> list[str]:
        again = batch(tiny_wan_folder, tmp_path, "red\nblue\ngreen", terms=Terms(**terms))
        return [entry.status for entry in again.before.values()]

    assert status() == ["done", "done", "failed"]
    opened.clips[0].path.unlink()
    assert status() == ["planned", "done", "failed"]
    assert status(retry_failed=True) == ["planned", "done", "planned"]
    renamed = batch(tiny_wan_folder, tmp_path, "red\nblue\ngreen", terms=Terms(resume=False))
    assert names(renamed) == ["red-s0-2.mp4", "blue-s0-2.mp4", "green-s0.mp4"]
    kept = batch(tiny_wan_folder, tmp_path, "red\nblue\ngreen", terms=Terms(overwrite=True))
    assert names(kept) == names(renamed)
    assert all(entry.owns_name for entry in kept.manifest.read().values())


def test_keys_say_what_a_clip_is_and_nothing_else(tiny_wan_folder: Path, tmp_path: Path) -> None:
    def key(**flags: Any) -> str:
        return clips(tiny_wan_folder, tmp_path, lines("red"), **flags)[0].key

    assert key() == key(device="auto") == key(dense_every=3) == key(preset="balanced")
    others = [key(seed=1), key(steps=3), key(preset="fast"), key(fps=9), key(dtype="bf16"), key(negative_prompt="x")]
    assert len({key(), *others}) == 7
    assert len({key(quantize=kind) for kind in (None, "fp8", "int8", "fp8-storage", "int8-storage")}) == 5


def test_keys_hold_what_changes_a_clip_not_how_it_was_asked_for(tiny_wan_folder: Path, tmp_path: Path) -> None:
    def key(folder: Path = tiny_wan_folder, **flags: Any) -> str:
        return clips(folder, tmp_path, lines("red"), **flags)[0].key

    small = key()
    tokens = clips(tiny_wan_folder, tmp_path, lines("red"))[0].plan.tokens
    assert small == key(fuse=False) != key(fuse=True), "few tokens do not repay fused blocks"
    assert small == key(vae_dtype="float32") != key(vae_dtype="bfloat16"), "Wan's VAE decodes in float32"
    assert small != key(dense_below=0), "a GPU would run so few tokens dense"
    assert key(dense_below=0) == key(dense_below=tokens) == key(dense_below=tokens, fuse=False)
    assert key(dense_below=tokens + 1) == key(dense_below=tokens + 50) not in (small, key(dense_below=0))
    assert key(preset="dense") == key(preset="dense", dense_below=0) == key(preset="dense", dense_below=10**6)
    assert key(impl="torch") == key(impl="torch", dense_below=0), "what was named runs"
    assert key(graphs=True) == key(graphs=True, dense_below=0), "what is to be replayed is"
    long: dict[str, Any] = {"folder": Path("wan2.1-1.3b"), "height": 480, "width": 832, "num_frames": 81}
    assert key(**long) == key(**long, fuse=True) == key(**long, dense_below=0) != key(**long, fuse=False)
    assert key(**long, impl="torch") == key(**long, impl="torch", fuse=False)


def test_a_batch_that_is_asked_for_in_other_words_is_done(tiny_wan_folder: Path, tmp_path: Path) -> None:
    """The same clips, so that nothing is made again."""
    (tmp_path / "p.txt").write_text("red\n")
    batch = ("generate", "-m", str(tiny_wan_folder), "--prompts-file", str(tmp_path / "p.txt"), "--device", "cpu")
    tiny = ("--size", "32x32", "--num-frames", "5", "--steps", "1", "-o", str(tmp_path / "out"), "--json")
    assert [clip["status"] for clip in json.loads(call(*batch, *tiny).stdout)["clips"]] == ["done"]
    again = json.loads(call("plan", *batch[1:], *tiny, "--no-fuse", "--vae-dtype", "float32").stdout)["clips"]
    assert [clip["status"] for clip in again] == ["done"]


def test_a_picture_that_was_painted_over_is_another_clip(tmp_path: Path) -> None:
    picture = tmp_path / "first.png"

    def key(colour: str) -> str:
        Image.new("RGB", (64, 64), colour).save(picture)
        line = Line(1, {"prompt": "x", "image": str(picture), "size": "832x480"})
        return clips(Path("wan2.1-i2v-480p"), tmp_path / "out", [line], **LARGE)[0].key

    assert key("red") == key("red") != key("blue")


def test_what_lines_share_is_read_once_and_again_when_it_changed(
    tiny_wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    film, picture, adapter = (tmp_path / name for name in ("film.gif", "x.png", "paper.safetensors"))

    def write(frames: int) -> None:
        shades = [Image.new("RGB", (16, 16), (index, 0, 0)) for index in range(frames)]
        shades[0].save(film, save_all=True, append_images=shades[1:], duration=100)
        shades[-1].save(picture)
        adapter.unlink(missing_ok=True)
        adapters.write(tiny_wan_folder, adapter, load_preset("paper"), seed=frames)

    read: Counter[str] = Counter()
    opened, hashed = Image.open, hashlib.file_digest

    def opens(path: Path, **kinds: Any) -> Any:
        read[Path(path).name] += 1
        return opened(path, **kinds)

    def hashes(file: Any, name: str) -> Any:
        read[f"{Path(file.name).name} hashed"] += 1
        return hashed(file, name)

    monkeypatch.setattr("PIL.Image.open", opens)
    monkeypatch.setattr("hashlib.file_digest", hashes)
    files = [film.name, *(f"{path.name} hashed" for path in (film, picture, adapter)), picture.name]
    for frames in (60, 61):
        write(frames)
        read.clear()
        clips(tiny_wan_folder, tmp_path, lines("a", "b", "c", video=str(film), tuned=str(adapter)), preset="paper")
        clips(Path("wan2.1-i2v-480p"), tmp_path, lines("a", "b", image=str(picture), size="832x480"), **LARGE)
        assert read == dict.fromkeys(files, 1)


def test_several_videos_a_line(tiny_wan_folder: Path, tmp_path: Path) -> None:
    found = clips(tiny_wan_folder, tmp_path, [Line(1, {"prompt": "x", "seed": 5, "output": "n.gif"})], num_videos=3)
    assert [(clip.plan.seed, clip.wanted) for clip in found] == [(5, "n.gif"), (6, "n-2.gif"), (7, "n-3.gif")]


def test_clips_of_one_shape_run_after_each_other(tiny_wan_folder: Path, tmp_path: Path) -> None:
    mixed = [Line(i + 1, {"prompt": "x", "seed": i, "size": size}) for i, size in enumerate(["48x32", "64x32"] * 3)]
    found = clips(tiny_wan_folder, tmp_path, mixed, height=None, width=None)
    assert [clip.plan.seed for clip in in_running_order(found)] == [0, 2, 4, 1, 3, 5]


def test_the_time_of_planning_grows_as_the_prompts_do(tiny_wan_folder: Path, tmp_path: Path) -> None:
    def planned(count: int) -> float:
        text = "".join(f"prompt number {i}\n" for i in range(count))
        began = time.process_time()
        opened = batch(tiny_wan_folder, tmp_path / str(count), text)
        assert len(opened.clips) == count
        return time.process_time() - began

    few = planned(100)
    assert planned(500) < 10 * few, "five times as many, each planned once"
