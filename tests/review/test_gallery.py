"""`vmonarch gallery`: one page of a folder of clips, whatever is in it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from pages import Page, screenshot
from PIL import Image
from typer.testing import CliRunner, Result

from vmonarch_cli.cli.app import app
from vmonarch_cli.review.gallery import write_gallery
from vmonarch_cli.review.webpage import PAGES

HOSTILE = (
    "</p><script>alert(1)</script>",
    "<img src=https://evil.example/x onerror=alert(1)>",
    "emoji 👩‍👩‍👧, 'quotes' \"double\" & ampersand\nand a second line",
    "x" * 10_000,
)


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def batch(tiny_record: Path, tmp_path: Path) -> Path:
    """A folder of clips with hostile prompts and names."""
    folder = tmp_path / "a <b> & 'c'"
    (folder / "inner").mkdir(parents=True)
    for number, prompt in enumerate(HOSTILE):
        name = ["clip.mp4", 'a "b" #1?%41.mp4', "javascript:alert(1).mp4", "inner/deep.mp4"][number]
        record = {**json.loads(tiny_record.read_text()), "prompt": prompt, "clip": f"../../etc/{Path(name).name}"}
        shutil.copy(tiny_record.with_suffix(".mp4"), folder / name)
        (folder / name).with_suffix(".json").write_text(json.dumps(record))
    (folder / "other.json").write_text("[1, 2]")
    (folder / "broken.json").write_text("{")
    (folder / "no-clip.json").write_text(tiny_record.read_text())
    return folder


def test_the_gallery_is_self_contained_and_escapes_everything(batch: Path) -> None:
    page = Page(write_gallery(batch).path)
    page.check_self_contained()
    for prompt in HOSTILE:
        assert prompt in page.text
    videos = [reference for reference in page.references if reference.endswith(".mp4")]
    assert set(videos) == {
        "./clip.mp4",
        "./a%20%22b%22%20%231%3F%2541.mp4",
        "./javascript%3Aalert%281%29.mp4",
        "./inner/deep.mp4",
    }
    posters = [reference for reference in page.references if reference.startswith("data:image/jpeg;base64,")]
    assert len(posters) == 4
    for words in ("fast", "48x32, 17 frames, 8 fps", "end to end", "guidance scale"):
        assert words in page.text


def test_a_card_has_the_steps_and_room_for_the_controls(batch: Path) -> None:
    page = Page(write_gallery(batch).path)
    assert "oldest first" in page.text
    record_file = next(path for path in batch.rglob("*.json") if path.with_suffix(".mp4").exists())
    record = json.loads(record_file.read_text())
    record["stopped_after"] = 1
    record_file.write_text(json.dumps(record))
    text = write_gallery(batch).path.read_text()
    assert f"1 of {record['settings']['steps']['value']}, stopped early" in text
    assert f"--tall:{record['frames']['height'] / record['frames']['width']:.4f}" in text  # the picture's own height


def test_the_gallery_in_chromium(batch: Path, tmp_path: Path) -> None:
    with Image.open(screenshot(write_gallery(batch).path, tmp_path / "page.png", 500, 1200)) as picture:
        assert np.asarray(picture.convert("L")).std() > 10


def test_the_gallery_command(batch: Path, tmp_path: Path) -> None:
    result = call("gallery", str(batch), "--json")
    assert json.loads(result.stdout)["clips"] == 4
    assert call("gallery", str(batch)).stdout == f"{batch}/index.html\n", "it is written again in place"
    (tmp_path / "empty").mkdir()
    result = call("gallery", str(tmp_path / "empty"))
    sentence = f"error: {tmp_path}/empty holds no clip with a record beside it, as vmonarch writes them\n"
    assert (result.exit_code, result.stderr) == (2, sentence)


def test_a_damaged_clip_does_not_cost_the_gallery(batch: Path) -> None:
    (batch / "clip.mp4").write_bytes(b"not a video")
    page = Page(write_gallery(batch).path)
    assert "./clip.mp4" in page.references


def test_text_cannot_become_markup() -> None:
    shown = PAGES.from_string("{{ value }}")
    assert shown.render(value='<a href="x">&\'') == "&lt;a href=&#34;x&#34;&gt;&amp;&#39;"
    assert shown.render(value="a\x00b\u202ec\ud800") == "a\ufffdb\ufffdc\ufffd"


def test_a_card_says_what_the_attention_gained_and_gave_up(batch: Path) -> None:
    """Ratios are of sums over the steps, whatever an earlier version wrote."""
    file = batch / "clip.json"
    record = json.loads(file.read_text())
    dense = {"calls": 4, "structured_calls": 0, "attention_s": 1.2, "dense_s": 1.2, "dense_call_s": 0.3, "error": None}
    fast = {**dense, "structured_calls": 4, "attention_s": 0.3}
    errors = (None, None, 0.566, 0.02, 0.03)
    steps = [
        {"index": n, "total": 5, "sigma": 0.5, "step_s": 2.0, **(dense if error is None else {**fast, "error": error})}
        for n, error in enumerate(errors)
    ]
    record["timing"] |= {"steps": steps, "attention_s": 3.3, "attention_speedup": 4.0, "error": 0.03}
    file.write_text(json.dumps(record))
    text = Page(write_gallery(batch).path).text
    assert "3.3 s, 1.82x as fast as dense" in text
    assert "0.030, up to 0.566 in step 3" in text
    assert "4.00x" not in text


def test_a_lost_subject_is_said(batch: Path) -> None:
    file = batch / "clip.json"
    record = json.loads(file.read_text())
    for number, step in enumerate(record["timing"]["steps"]):
        step |= {"error": (0.566, 0.02, 0.03)[number], "dense_s": 0.1, "dense_call_s": 0.01}
    file.write_text(json.dumps(record))
    assert "--dense-steps 1" in Page(write_gallery(batch).path).text
    shown = call("compare", str(file), str(batch / "inner" / "deep.json"))
    assert "clip: the first step differs far more" in " ".join(shown.stdout.split())
    assert "up to 0.566 in step 1" in " ".join(shown.stdout.split())
