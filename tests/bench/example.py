"""Draw outputs/example.png: clips of the built-in model, dense beside presets, the prompts above them.

    python tests/bench/example.py            # minutes on two cores

Every clip is made by `vmonarch generate` with seed 0 and the model's own settings.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).parents[2]
PROMPTS = (
    "a large red star moving from left to right on a light blue background",
    "an orange square rising on a checkered lavender background",
)
PRESETS = ("dense", "paper", "fast")
FRAMES, SIDE, GAP, LABEL, TITLE = 7, 120, 6, 64, 26


def make(folder: Path) -> None:
    """One folder of PNG frames for each preset and prompt."""
    prompts = folder / "prompts.jsonl"
    lines = [json.dumps({"prompt": prompt, "output": f"{index}.png"}) for index, prompt in enumerate(PROMPTS)]
    prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    for preset in PRESETS:
        command = ["-m", "vmonarch_cli", "generate", "--prompts-file", str(prompts), "--preset", preset]
        command += ["--dense-every", "0", "-o", str(folder / preset), "--quiet"]
        subprocess.run([sys.executable, *command], check=True)


def draw(folder: Path) -> Image.Image:
    """A strip of frames for each preset, below its prompt."""
    block = TITLE + len(PRESETS) * (SIDE + GAP) + GAP
    sheet = Image.new("RGB", (LABEL + FRAMES * (SIDE + GAP), len(PROMPTS) * block), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for number, prompt in enumerate(PROMPTS):
        pen.text((LABEL, number * block + 4), prompt, "black", font)
        for row, preset in enumerate(PRESETS):
            top = number * block + TITLE + row * (SIDE + GAP)
            pen.text((4, top + SIDE // 2 - 8), preset, "black", font)
            clip = sorted(path for path in (folder / preset).iterdir() if path.is_dir())[number]
            frames = sorted(clip.glob("*.png"))
            for at in range(FRAMES):
                with Image.open(frames[at * (len(frames) - 1) // (FRAMES - 1)]) as frame:
                    sheet.paste(frame.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (LABEL + at * (SIDE + GAP), top))
    return sheet


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "example.png")
    target = parser.parse_args().out
    with tempfile.TemporaryDirectory() as name:
        make(Path(name))
        draw(Path(name)).save(target, optimize=True)


if __name__ == "__main__":
    main()
