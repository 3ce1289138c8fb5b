"""Files of strangers, mutated at random and given to the whole command: one sentence and a code, never a traceback.

Each kind starts from something valid. A seed decides every mutation, so that a failure names its input: the assertion
shows kind and number, and the file stays in the test's folder. The default suite takes a few of each kind; the slow
test takes two thousand.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import numpy as np
import pytest
from safetensors.numpy import save
from tiny_wan import tiny_pipeline
from typer.testing import CliRunner, Result

from vmonarch_cli.cli.app import app

INPUTS = Path(__file__).parent / "inputs"
NASTY: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    3.5,
    -0.0,
    1e300,
    10**40,
    -(10**40),
    "",
    " ",
    "x" * 300,
    "x" * 70_000,
    "\x00",
    "\ud800",
    "\x1b[31mred",
    "[/bold]",
    "[link=x]",
    "../up",
    "/etc/passwd",
    "~nosuchuser/x",
    "NaN",
    "1e999",
    "0x10",
    "042",
    "1:30",
    "२",
    "\u202egpj",
    [],
    [[]],
    [1],
    {},
    {"": ""},
    {"a": {"b": {"c": 1}}},
    [None],
    ["x", 1],
    "猫",
    "a\nb",
    "a\tb",
    "-",
]
RAW = [
    b"\x00",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"[" * 2000,
    b"{" * 300,
    b'"',
    b"\\u0000",
    b"\\ud800",
    b"1" * 5000,
    b"0x" + b"f" * 400,
    b"!!python/object:os.system",
    b"&a [*a]",
    b"\r",
    b"\xef\xbb\xbf",
    b"1e999",
    b"-",
    b": ",
    b"#",
]

Mutant = Callable[[random.Random, Path], list[list[str]]]
"""(random numbers, a folder of its own) -> command lines to run."""


def nasty(draw: random.Random) -> Any:
    """A copy of one of the values, so that what is put into it later stays out of the list."""
    return deepcopy(draw.choice(NASTY))


def anywhere(value: Any, draw: random.Random) -> Any:
    """A copy of a JSON value with one or two places replaced, removed or added to."""
    copy = json.loads(json.dumps(value))
    for _ in range(draw.choice((1, 1, 2))):
        node = copy
        while isinstance(node, dict | list) and node:
            key = draw.choice(list(node) if isinstance(node, dict) else list(range(len(node))))
            if not isinstance(node[key], dict | list) or not node[key] or draw.random() < 0.25:
                break
            node = node[key]
        if not isinstance(node, dict | list) or not node:
            return nasty(draw)
        act = draw.random()
        if act < 0.7:
            node[key] = nasty(draw)
        elif act < 0.85:
            del node[key]
        elif isinstance(node, dict):
            node[str(nasty(draw))[:400]] = nasty(draw)
    return copy


def bytes_of(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def garbled(content: bytes, draw: random.Random) -> bytes:
    """Bytes cut, flipped or with something put in."""
    act = draw.random()
    at = draw.randrange(len(content) + 1)
    if act < 0.3:
        return content[:at]
    if act < 0.5 and content:
        flipped = bytearray(content)
        flipped[at % len(content)] ^= 1 << draw.randrange(8)
        return bytes(flipped)
    return content[:at] + draw.choice(RAW) + content[at:]


PRESET = b'name = "own"\nnum_steps = 2\nband = 1\nrefresh = 0.5\nwarm_start = true\nc_floor = 0.1\ndense_steps = 1\n'
LINES = [
    {"prompt": "a red star", "seed": 3, "size": "96x96", "num_frames": 9, "steps": 4, "output": "a.mp4"},
    {
        "prompt": "a blue ring",
        "guidance_scale": 2.5,
        "preset": "fast",
        "negative_prompt": "dark",
        "height": 96,
        "width": 96,
    },
]
CSV = b'prompt,seed,steps\na red star,3,4\n"a blue, ring",4,5\n'
YAML = b"- prompt: a red star\n  seed: 3\n  steps: 4\n- prompt: 'a blue ring'\n  size: 96x96\n"


def a_preset(draw: random.Random, folder: Path) -> list[list[str]]:
    path = folder / "own.toml"
    path.write_bytes(garbled(PRESET, draw))
    return [["presets", "check", str(path)], ["plan", "--prompt", "a red star", "--preset", str(path)]]


def an_assignment(draw: random.Random, folder: Path) -> list[list[str]]:
    field = draw.choice(["band", "refresh", "num_steps", "c_floor", "warm_start", "impl", "attention", "name", "x"])
    value = draw.choice([*map(str, NASTY), "[" * 500, "{a=1}", "'''", "1" * 4000, "0b1", "0o7", "inf", "nan", "none"])
    return [["plan", "--prompt", "a red star", "--set", f"{field}={value}".replace("\x00", "\x01")]]


def a_prompts_file(draw: random.Random, folder: Path) -> list[list[str]]:
    kind = draw.choice(["jsonl", "jsonl", "csv", "yaml", "txt"])
    if kind == "jsonl" and draw.random() < 0.6:
        content = b"\n".join(bytes_of(anywhere(line, draw)) for line in LINES)
    else:
        plain = {
            "jsonl": b"\n".join(map(bytes_of, LINES)),
            "csv": CSV,
            "yaml": YAML,
            "txt": b"a red star\na blue ring\n",
        }
        content = garbled(plain[kind], draw)
    path = folder / f"prompts.{kind}"
    path.write_bytes(content)
    return [["plan", "--prompts-file", str(path), "-o", f"{folder}/out/"]]


def a_record(draw: random.Random, folder: Path) -> list[list[str]]:
    clip = folder / "a.mp4"
    shutil.copyfile(_clip(folder), clip)
    shutil.copyfile(clip, folder / "b.mp4")
    record = anywhere(json.loads((INPUTS / "rec_gallery_00.json").read_text()), draw)
    content = bytes_of(record)
    clip.with_suffix(".json").write_bytes(garbled(content, draw) if draw.random() < 0.3 else content)
    return [["gallery", str(folder)], ["compare", str(clip), str(folder / "b.mp4")]]


def a_manifest(draw: random.Random, folder: Path) -> list[list[str]]:
    prompts, out = folder / "p.txt", folder / "out"
    prompts.write_text("a red star\na blue ring\n", encoding="utf-8")
    out.mkdir()
    head = {"schema": 1, "vmonarch": "0.1.0"}
    entry = {"key": "k" * 16, "name": "a-red-star-s0.mp4", "status": "done", "seed": 0, "prompt": "a red star"}
    lines = [bytes_of(anywhere(part, draw)) for part in (head, entry, entry)]
    content = b"\n".join(lines)
    (out / "manifest.jsonl").write_bytes(garbled(content, draw) if draw.random() < 0.4 else content)
    return [["plan", "--prompts-file", str(prompts), "-o", f"{out}/", "--resume"]]


def a_model_folder(draw: random.Random, folder: Path) -> list[list[str]]:
    model = folder / "model"
    shutil.copytree(_model(folder), model, symlinks=True)
    victim = model / draw.choice(
        ["model_index.json", "transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json"]
    )
    content = json.loads(victim.read_text())
    victim.write_bytes(bytes_of(anywhere(content, draw)) if draw.random() < 0.8 else garbled(victim.read_bytes(), draw))
    return [["models", "show", str(model)], ["plan", "--prompt", "a red star", "-m", str(model), "--num-frames", "9"]]


def a_lora_header(draw: random.Random, folder: Path) -> list[list[str]]:
    path = folder / "x.safetensors"
    path.write_bytes(garbled((INPUTS / "lora" / "diffusers.safetensors").read_bytes()[:6000], draw))
    if draw.random() < 0.4:
        names = [str(name)[:50] for name in NASTY if isinstance(name, str) and name.isprintable()]
        path.write_bytes(save({draw.choice(names) + ".lora_A.weight": np.zeros((2, 3), np.float32)}))
    return [["plan", "--prompt", "a red star", "-m", str(_model(folder)), "--num-frames", "9", "--lora", str(path)]]


KINDS: dict[str, Mutant] = {
    "preset": a_preset,
    "assignment": an_assignment,
    "prompts file": a_prompts_file,
    "record": a_record,
    "manifest": a_manifest,
    "model folder": a_model_folder,
    "LoRA header": a_lora_header,
}


def _clip(folder: Path) -> Path:
    return folder.parent / "clip.mp4"


def _model(folder: Path) -> Path:
    return folder.parent / "tiny"


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a clip and a tiny model, under which every input has a folder of its own."""
    root = tmp_path_factory.mktemp("fuzz")
    pixels = np.zeros((9, 48, 48, 3), dtype=np.uint8)
    imageio.imwrite(root / "clip.mp4", pixels, fps=16, codec="libx264", macro_block_size=1)
    tiny_pipeline().save_pretrained(root / "tiny", safe_serialization=True)
    return root


def assert_answered(result: Result, about: str) -> None:
    """Exit 0, 1 or 2; on failure whole sentences on stderr, and nowhere an error that nobody expected."""
    said = f"{about}: {result.exit_code} {result.stderr[-800:]!r} {result.exception!r}"
    assert result.exception is None or isinstance(result.exception, SystemExit), said
    assert result.exit_code in (0, 1, 2), said
    assert not re.search(r"unexpected [A-Z]", result.stderr), said  # YAML says "unexpected end of stream", and may
    assert "Traceback" not in result.stderr, said
    assert "\x1b" not in result.stderr, said
    if result.exit_code == 2:
        assert "error: " in result.stderr, said


def run_some(ground: Path, kind: str, numbers: range) -> None:
    for number in numbers:
        folder = ground / f"{kind.replace(' ', '-')}-{number}"
        folder.mkdir()
        for arguments in KINDS[kind](random.Random(f"{kind} {number}"), folder):
            assert_answered(CliRunner().invoke(app, arguments), f"{kind} {number}: {arguments[:2]}")
        shutil.rmtree(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files_are_answered_in_sentences(ground: Path, kind: str) -> None:
    run_some(ground, kind, range(25))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_thousand_mutated_files_are_answered_in_sentences(ground: Path, kind: str) -> None:
    run_some(ground, kind, range(25, 25 + 290))
