"""`--image` is checked before anything loads, as the picture that a model will get."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from vmonarch_cli.errors import InputError
from vmonarch_cli.models.catalogue import ENTRIES
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve

MODEL = next(entry.alias for entry in ENTRIES if entry.takes_image)


def planned(image: str) -> str | None:
    return resolve(GenerateRequest(model=MODEL, prompt="a cat", image=image)).image


def test_an_image_is_planned_by_its_path(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "x.png")
    assert planned(str(tmp_path / "x.png")) == str(tmp_path / "x.png")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("postscript.png", "cannot be read: give a PNG, JPEG or WebP file"),
        ("pipe.png", "is a pipe, not a file"),
        ("/dev/zero", "is a device, not a file"),
        ("none.png", "there is no image"),
        ("x" * 300, "is too long: a name has at most 255 bytes"),
        ("~nosuchuser/x.png", "begins with the home folder of a user"),
    ],
)
def test_what_is_no_picture(tmp_path: Path, name: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("PIL.EpsImagePlugin.has_ghostscript", lambda: pytest.fail("Ghostscript was asked for"))
    Path("postscript.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    os.mkfifo("pipe.png")
    with pytest.raises(InputError, match=words):
        planned(name)
