"""From what a command left to a record: what may vary between runs and machines is named, not kept.

A record has three parts. Text, settings and file names must come back word for word; `numbers` are measured
accuracies and pixel values, which another CPU rounds differently; `exact` are hashes, which hold on one machine.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from running import Command, Left

if TYPE_CHECKING:
    import numpy as np  # not before the number of its threads is set

_DROPPED = re.compile(
    r"^(versions|commit|chip|break_even|verdicts|pid|started|finished|threads|fastest_dense|floor_s|times_vary|times_differ)$"
)
_TIMED = re.compile(r"(_s|_ms|_per_s|seconds|speedup|attention_share|floor_share|over_\w+|peak\w*bytes|^time|^bytes)$")
_GAIN = r"<what \1 gained over \2>"
_NUMBER = re.compile(r"(error|psnr|ssim|sigma|flicker|difference)s?$")
_HASH = re.compile(r"(sha256)$")
_DEVICE = re.compile(r"CPU \([^)]*\)|(?<= on )[^`\n]*? x \d+(?= yet)")
_MEASURE = re.compile(
    r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?(?: ?(ms|µs|min|s|h|%|MiB|GiB|KiB|dB|kB|MB|GB)|(x))(?!\w)"
)
_DECIMAL = re.compile(r"(?<![\w.])[-+]?\d+\.\d+(?:e-?\d+)?(?![\w.]|\.\d)(?! [KMGTP]?FLOP\b)")
_VERSION = re.compile(r"\b(torch|triton|diffusers|transformers|vmonarch) \d+\.\d[\w.+]*")
_COUNT = re.compile(r"(?<![\w.])[-+]?\d[\d,.]*(?:e-?\d+)?(?![\w.])")
_DOCTOR = (
    (
        r"(?m)^(ok|note|bad)( +)(python|torch|diffusers|transformers|triton|ffmpeg|peft|torchao)( +).*$",
        r"\1\2\3\4<version>",
    ),
    (r"(?m)^(\w+ +gpu +).*$", r"\1<gpu>"),
    (r"(?m)^(\w+ +hub cache +).*$", r"\1<cache>"),
)
_UNITS = {"ms": "<time>", "µs": "<time>", "s": "<time>", "min": "<time>", "h": "<time>", "%": "<n> %", "dB": "<n> dB"}
Numbers = dict[str, float | list[float]]


def record(command: Command, left: Left) -> dict[str, Any]:
    """The record of a command, as `expected/` keeps it."""
    numbers: Numbers = {}
    exact: dict[str, str] = {}
    tidy = _Tidy(command, left.folder, numbers, exact)
    found: dict[str, Any] = {
        "command": f"vmonarch {command.args}",
        "exit": left.exit,
        "stdout": tidy.output("stdout", left.stdout),
        "stderr": tidy.output("stderr", left.stderr),
    }
    files = {tidy.name(name): tidy.file(name) for name in left.changed if not _is_frame(name)}
    for folder in sorted({name.rsplit("/", 1)[0] for name in left.changed if _is_frame(name)}):
        files[folder] = tidy.frames(folder)
    if files:
        found["files"] = dict(sorted(files.items()))
    if left.removed:
        found["removed"] = [tidy.name(name) for name in left.removed]
    if numbers:
        found["numbers"] = numbers
    if exact:
        found["exact"] = exact
    return found


def significant(value: float) -> float:
    """Six significant digits, which a reader can compare."""
    return float(f"{value:.6g}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_frame(name: str) -> bool:
    return name.endswith(".png") and "/" in name and name.rsplit("/", 1)[0].endswith(".png")


class _Tidy:
    def __init__(self, command: Command, folder: Path, numbers: Numbers, exact: dict[str, str]) -> None:
        self._folder = folder
        self._measured = command.measured
        self._reports = command.group == "profiles"
        self._in_full = command.in_full
        self._numbers = numbers
        self._exact = exact
        self._keys: dict[str, str] = {}

    def output(self, name: str, text: str) -> Any:
        """JSON as an object, all else as lines."""
        if text.lstrip().startswith(("{", "[{")):
            try:
                return self.json(name, json.loads(text))
            except ValueError:
                pass
        return self.text(text).splitlines()

    def text(self, text: str) -> str:
        """Paths, machine facts and, where the command is measured, numbers replaced by their names."""
        text = self._known(text)
        if self._measured:
            # How fast this machine is decides how often a long phase says where it stands, and what is left of it.
            text = re.sub(r"(?m)^.*; \d+:\d\d, [\d:]+ left\n", "", text)
            text = re.sub(r"(?m), about [\d:]+ left$", "", text)
            text = _MEASURE.sub(lambda match: "<n>x" if match[2] else _UNITS.get(match[1], "<size>"), text)
            text = _DECIMAL.sub("<n>", text)
            text = re.sub(r"(?m)^( *step +sigma +)m?s( +)m?s( +share +)m?s", r"\1<unit>\2<unit>\3<unit>", text)
            text = re.sub(r"(?m)^LPIPS is left out: .*\n", "", text)
            if self._reports:
                text = re.sub(r"(?<![\w'])(ms|µs|s|[KMGT]?FLOP/s)\b", "<unit>", _COUNT.sub("<n>", text))
            text = re.sub(r"; not worth it at this size|, worth it\b", "", text)
            text = re.sub(r"\s+\(<time>\s+of\s+writing\s+beside\s+decoding\)", "", text)
            # Whether two times differ by more than this machine's times vary is no constant either.
            text = re.sub(r"(?m)^.*(no difference measurable for|end-to-end ratios give all clips) .*\n?", "", text)
            text = text.replace("<time>, no difference", "<time>, <n>x")
            text = re.sub(r"(\w+) was (?:fast|slow)er than (\w+): .*? as fast; end to end <n>x as fast", _GAIN, text)
            text = re.sub(r"(\w+) and (\w+) took the same time, as far .*? against <time>", _GAIN, text)
            text = re.sub(r"(?m)^\[<time>\] ", "", text)
            text = re.sub(r"[ \t]+", " ", re.sub(r"[─━-]{3,}", "---", text))
        return "\n".join(line.rstrip() for line in text.split("\n")).rstrip("\n")

    def _known(self, text: str) -> str:
        """Without what is of this machine or this run: folders, the device, versions."""
        text = text.replace(str(self._folder), "<folder>").replace(str(self._folder.parent / "home"), "<home>")
        text = re.sub(r"[^\s\"'=]*/weights\b", "<demo weights>", text)
        text = re.sub(r"[^\s\"'=]*/demo/tuned\b", "<demo adapters>", text)
        text = re.sub(r"(needs at least [^:]* and )[\d.]+ \w+( are free)", r"\1<size>\2", text)
        text = _DEVICE.sub("<machine>", text)
        for pattern, plain in _DOCTOR:
            text = re.sub(pattern, plain, text)
        return _VERSION.sub(r"\1 <version>", text)

    def json(self, path: str, value: Any, key: str = "") -> Any:
        """The same tree with measured values taken out."""
        if value is None:
            return None
        if _DROPPED.search(key):
            return "<left out>"
        if isinstance(value, dict):
            if "median" in value:
                return "<times>"
            if "threads" in value and "name" in value:
                return "<device>"
            if set(value) == {"value", "origin"}:
                return f"{json.dumps(self.json(path, value['value'], key), ensure_ascii=False)} from {value['origin']}"
            if ("hub_id" in value or "c_floor" in value) and not self._in_full:
                return f"<{len(value)} facts, {_digest(self._known(json.dumps(value)))}>"
            return {k: self.json(f"{path}.{k}", v, str(k)) for k, v in value.items()}
        if isinstance(value, list):
            return [self.json(f"{path}[{i}]", v, key) for i, v in enumerate(value)]
        if isinstance(value, bool):
            return value
        if isinstance(value, str):
            if _HASH.search(key):
                self._exact[path] = value
                return "<hash>"
            if key == "key":
                return self._keys.setdefault(value, f"<key {len(self._keys) + 1}>")
            return "<time>" if key == "time" else self._known(value)
        if _TIMED.search(key) and not path.endswith("settings.seconds"):
            return "<measured>"
        if _NUMBER.search(key) or (isinstance(value, float) and len(repr(value)) > 8):
            if not math.isfinite(value):
                return str(value)
            self._numbers[path] = significant(float(value))
            return "<number>"
        return value

    def name(self, name: str) -> str:
        """A file's name without the key of its clip, which depends on where the weights are."""
        return re.sub(r"[0-9a-f]{16}(?=.*\.claim$)", "<key>", name)

    def file(self, name: str) -> Any:
        """A file by its ending."""
        path = self._folder / name
        match path.suffix:
            case ".json":
                return self.json(name, json.loads(path.read_text(encoding="utf-8")))
            case ".jsonl":
                rows = path.read_text(encoding="utf-8").splitlines()
                return [self.json(f"{name}[{i}]", json.loads(row)) for i, row in enumerate(rows)]
            case ".claim":
                return "<claim of a process>"
            case ".html":
                return self._page(path.read_text(encoding="utf-8"))
            case ".safetensors":
                return self._tensors(name, path.read_bytes())
            case ".gif" | ".png":
                return self._picture(name, path)
            case ".mp4":
                return "<video>"
        return self.text(path.read_text(encoding="utf-8")).splitlines()

    def frames(self, folder: str) -> str:
        """Pixels of a folder of PNGs: one hash, and for every frame its mean colour and spread."""
        import numpy as np
        from PIL import Image

        files = sorted((self._folder / folder).glob("*.png"))
        pixels = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
        self._pixels(folder, pixels)
        return f"{files[0].name} to {files[-1].name}, {len(files)} frames of {pixels.shape[2]}x{pixels.shape[1]}"

    def _pixels(self, name: str, pixels: np.ndarray[Any, Any]) -> None:
        self._exact[f"{name} pixels"] = hashlib.sha256(pixels.tobytes()).hexdigest()
        values = pixels.astype("float64")
        for i, colour in enumerate(("red", "green", "blue")):
            self._numbers[f"{name} pixels, mean {colour}"] = [significant(x) for x in values[..., i].mean((1, 2))]
        self._numbers[f"{name} pixels, spread"] = [significant(x) for x in values.std((1, 2, 3))]

    def _picture(self, name: str, path: Path) -> str:
        from PIL import Image

        picture = Image.open(path)
        count = getattr(picture, "n_frames", 1)
        if count > 1:
            self._exact[f"{name} bytes"] = hashlib.sha256(path.read_bytes()).hexdigest()
        each = f" of {picture.info['duration']} ms" if count > 1 else ""
        size = "" if path.name.startswith("plot") else f" {picture.width}x{picture.height}"
        return f"{picture.format}{size}, {count} frame{'s' if count > 1 else ''}{each}"

    def _page(self, text: str) -> list[str]:
        style = re.search(r"<style>.*?</style>", text, re.DOTALL)
        if style:
            text = text.replace(style[0], f"<style {_digest(style[0])}>")
        text = re.sub(r"data:[\w/+.-]+;base64,[\w+/=]+", "<data>", text)
        text = re.sub(r"(?<=>)\s*(?=<)", "\n", self.text(text))
        return [line for line in text.splitlines() if line.strip()]

    def _tensors(self, name: str, content: bytes) -> Any:
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        self._exact[f"{name} tensors"] = hashlib.sha256(content[8 + length :]).hexdigest()
        notes = header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        for key, value in notes.items():
            if value.startswith("{"):
                notes[key] = json.loads(value)
        return self.json(name, header)
