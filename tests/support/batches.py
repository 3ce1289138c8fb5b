"""Small batches for the tests of `vmonarch_cli.batch`: six clips of the tiny model, made in a second or two, or of the
demo model, made in ten.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import numpy as np
from tiny_wan import FRAMES, HEIGHT, WIDTH

from vmonarch_cli.batch.clips import batch_folder, plan_clips
from vmonarch_cli.batch.folder import Batch, Terms, open_batch
from vmonarch_cli.batch.prompts import parse_prompts
from vmonarch_cli.pipeline.preflight import Machine, check_machine_for
from vmonarch_cli.plan.request import GenerateRequest

DEMO: dict[str, Any] = {"height": 48, "width": 48, "num_frames": 9, "fps": 8}
SIX = "a red circle\na blue square\na red square moving left\na blue circle moving right\nred\nblue\n"


def request(model: Path | None, folder: Path, **flags: Any) -> GenerateRequest:
    """A request for clips of a folder's model, or small ones of the demo model (None)."""
    settings: dict[str, Any] = {
        "height": HEIGHT,
        "width": WIDTH,
        "num_frames": FRAMES,
        "fps": 8,
        "steps": 2,
        "guidance_scale": 1.0,
        "dense_every": 0,
        "device": "cpu",
        **(DEMO if model is None else {}),
        **flags,
    }
    return GenerateRequest(model=None if model is None else str(model), output=str(folder), **settings)


def batch(
    model: Path | None, folder: Path, text: str = SIX, *, format: str = "txt", terms: Terms | None = None, **flags: Any
) -> Batch:
    """A batch opened in `folder`, as `generate --prompts-file` opens it."""
    asked = request(model, folder, **flags)
    clips, _ = plan_clips(asked, parse_prompts(text.encode(), format, "prompts"))
    return open_batch(clips, batch_folder(asked), terms or Terms(overwrite=asked.overwrite), "prompts")


def machine_of(opened: Batch) -> Machine:
    """Where the clips of a batch run, as the command line finds it out."""
    return check_machine_for([clip.plan for clip in opened.clips])


def tree(folder: Path) -> list[str]:
    """Everything in a folder but its gallery, at any depth."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != "index.html")


def whole(names: Sequence[str]) -> list[str]:
    """What a folder holds in which exactly these clips are done."""
    return sorted(["manifest.jsonl", *(f"{name}.mp4" for name in names), *(f"{name}.json" for name in names)])


def frames(path: Path) -> np.ndarray[Any, Any]:
    return np.asarray(imageio.imread(path))
