"""What both training scripts share: the clock, checkpoints, running averages of weights, the log and picture sheets."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

_PROCESS_START = time.monotonic()


@dataclass
class Schedule:
    """Where a training stands between 0 (start) and 1 (end), across interrupted runs.

    Either by wall-clock seconds of training (set-up and compilation shorten the plan but do not move the schedule) or,
    with `max_steps`, by steps, which makes a run reproducible.

    Args:
        run_seconds: wall-clock seconds of this process, counted from its start.
        total_seconds: planned seconds of all runs together.
        reserve: seconds kept at the end of this process for evaluation and export.
        before: seconds of training in earlier runs.
        aside: seconds of earlier runs that were not training, of `total_seconds`.
        max_steps: total steps of all runs, in place of seconds.
        stop_after: end this run after so many steps in all (an interruption, for tests).
        idle: seconds of this process that were not training.

    """

    run_seconds: float
    total_seconds: float
    reserve: float
    before: float = 0.0
    aside: float = 0.0
    max_steps: int | None = None
    stop_after: int | None = None
    idle: float = 0.0

    def start(self) -> None:
        """Training begins now: what came before in this process does not move the schedule."""
        self.idle = time.monotonic() - _PROCESS_START

    def exclude(self, seconds: float) -> None:
        """Take seconds (of compilation) out of the schedule."""
        self.idle += seconds

    def elapsed(self) -> float:
        """Seconds of training in all runs so far."""
        return self.before + time.monotonic() - _PROCESS_START - self.idle

    def position(self, step: int) -> float:
        """Progress of the whole training in [0, 1]."""
        if self.max_steps is not None:
            return min(step / self.max_steps, 1.0)
        return min(self.elapsed() / max(self.total_seconds - self.aside - self.reserve - self.idle, 1e-6), 1.0)

    def over(self, step: int) -> bool:
        """Whether this run must stop now."""
        if self.stop_after is not None and step >= self.stop_after:
            return True
        if self.max_steps is not None:
            return step >= self.max_steps
        return self._out_of_time() or self.position(step) >= 1.0

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps of it, for `resume`."""
        spent = self.reserve if self._out_of_time() else 0.0  # else the run was interrupted, or has time left
        return {"elapsed": self.elapsed(), "aside": self.aside + self.idle + spent}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint with `state`; those of earlier versions have no "aside"."""
        self.before, self.aside = state["elapsed"], state.get("aside", 0.0)

    def _out_of_time(self) -> bool:
        return time.monotonic() - _PROCESS_START >= self.run_seconds - self.reserve


def learning_rate(base: float, position: float, step: int, *, warmup: int = 100, final: float = 0.01) -> float:
    """Constant after a short warm-up, then linear decay to `final` times the base over the second half."""
    decay = 1.0 if position < 0.5 else 1.0 - (1.0 - final) * (position - 0.5) / 0.5
    return base * min(1.0, (step + 1) / warmup) * decay


class Ema:
    """Exponential running average of modules' parameters, kept in copies of the modules."""

    def __init__(self, live: Sequence[nn.Module], averaged: Sequence[nn.Module], decay: float) -> None:
        self._live = [p for m in live for p in m.parameters()]
        self._averaged = [p for m in averaged for p in m.parameters()]
        self._decay = decay
        for p in self._averaged:
            p.requires_grad_(False)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the live weights; early steps forget faster."""
        decay = min(self._decay, (1 + step) / (10 + step))
        averaged = [p.data for p in self._averaged]
        torch._foreach_lerp_(averaged, [p.data for p in self._live], 1 - decay)


class JsonLog:
    """One JSON object a line, appended to a file and shown on stderr: what the first process of a torchrun does, and
    what fails in another one.
    """

    def __init__(self, path: Path, process: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._process = path, process

    def write(self, event: str, **values: object) -> None:
        """Log an event with its values; numbers are rounded to six significant digits."""
        if self._process:
            if not event.endswith(("_failed", "_unavailable")):
                return
            values = {"process": self._process, **values}
        record = {"event": event, "seconds": round(time.monotonic() - _PROCESS_START, 2), **_rounded(values)}
        line = json.dumps(record)
        with self._path.open("a") as file:
            file.write(line + "\n")
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    return value


def save_checkpoint(path: Path, state: dict[str, Any]) -> float:
    """Write a checkpoint so that a reader sees the old one or the new one, never half of one; the seconds it took."""
    start = time.monotonic()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)
    return time.monotonic() - start


def load_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """Read a checkpoint of tensors and plain data (no code is run)."""
    state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    return state


def conform_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Give loaded optimizer state the strides of its parameters, which fused updates rely on."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.dim() > 0:
                state[name] = torch.empty_like(parameter).copy_(value)


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 autocast on a GPU, float32 on a CPU."""
    return torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else nullcontext()


def tune_backend(device: torch.device) -> None:
    """TF32 for what stays in float32 and cuDNN's search for the fastest convolution."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True


def fastest_attention(
    log: JsonLog, device: torch.device, shape: tuple[int, int, int, int]
) -> AbstractContextManager[Any]:
    """Use the backend of scaled_dot_product_attention whose forward and backward pass is fastest on (B, heads, N, D).

    PyTorch takes FlashAttention-2 wherever it can; on a Hopper GPU cuDNN is faster.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if device.type != "cuda":
        return nullcontext()
    rest = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    q, k, v, out = torch.randn(4, *shape, device=device, dtype=torch.bfloat16)
    q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
    seconds = {}
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        try:
            with sdpa_kernel(backend):
                for repeat in range(6):
                    if repeat == 3:
                        synchronize(device)
                        start = time.monotonic()
                    nn.functional.scaled_dot_product_attention(q, k, v).backward(out)
                synchronize(device)
        except RuntimeError as error:
            log.write("attention_unavailable", backend=backend.name, error=str(error)[:500])
            continue
        seconds[backend] = (time.monotonic() - start) / 3
    log.write("attention", **{backend.name: value for backend, value in seconds.items()})
    if not seconds:
        return nullcontext()
    fastest = min(seconds, key=lambda backend: seconds[backend])
    return sdpa_kernel([fastest, *(b for b in rest if b is not fastest)], set_priority=True)


def set_layout(module: nn.Module, *, channels_last: bool) -> torch.memory_format:
    """Lay out the weights of a module's convolutions; returns the format that its 5-d inputs should have."""
    for child in module.modules():
        weight = getattr(child, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.dim() in (4, 5):
            last = torch.channels_last if weight.dim() == 4 else torch.channels_last_3d
            weight.data = weight.data.contiguous(memory_format=last if channels_last else torch.contiguous_format)
    return torch.channels_last_3d if channels_last else torch.contiguous_format


def gpu_memory_gb(device: torch.device) -> float:
    """Peak memory allocated on the device so far, in GB (0 on a CPU)."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that wall-clock times mean something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def queued(device: torch.device) -> Callable[[], None]:
    """A function that waits for what is queued on the device now, and not for what is queued after this call."""
    if device.type != "cuda":
        return lambda: None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event.synchronize


class GuardedStep:
    """Optimiser steps on clipped gradients that leave everything as it was when the gradient is not finite.

    One bad batch must not end a training. On a GPU the fused optimiser decides on the device, so nothing waits.

    Args:
        optimizer: its parameters are the ones whose gradients are clipped.
        max_norm: largest norm of the whole gradient.

    Attributes:
        parameters: those of the optimiser.

    """

    def __init__(self, optimizer: torch.optim.Optimizer, max_norm: float) -> None:
        self._optimizer = optimizer
        self._max_norm = max_norm
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._skipped: Tensor | float = 0.0

    def __call__(self) -> None:
        """Clip and step."""
        norm = nn.utils.clip_grad_norm_(self.parameters, self._max_norm)
        bad = (~torch.isfinite(norm)).float()
        self._skipped = self._skipped + bad
        if norm.device.type == "cuda":
            # The fused optimiser reads this as gradient scaling does and skips its update where it is 1.
            self._optimizer.found_inf = bad  # type: ignore[attr-defined]
        elif bad:
            self._optimizer.zero_grad(set_to_none=True)
        self._optimizer.step()

    @property
    def skipped(self) -> int:
        """Steps without an update so far (waits for the device)."""
        return int(self._skipped)


def trial(log: JsonLog, name: str, device: torch.device, attempt: Callable[[], None]) -> bool:
    """Run `attempt`, which compiles something on its first call; log how long it took, or why it failed.

    Returns:
        Whether it worked. A failure is never silent: the caller goes on eagerly and the log says so.

    """
    start = time.monotonic()
    try:
        attempt()
        synchronize(device)
    except Exception as error:
        log.write("compile_failed", name=name, took=time.monotonic() - start, error=str(error)[:2000])
        return False
    log.write("compiled", name=name, took=time.monotonic() - start)
    return True


def mean_losses(measured: Sequence[tuple[str, Mapping[str, Tensor]]]) -> dict[str, Any]:
    """Means of what some steps measured, each over those that did, and of their loss for each kind of clip (waits for
    the device).
    """
    by_kind: dict[str, list[float]] = {}
    for kind, values in measured:
        by_kind.setdefault(kind, []).append(float(values["loss"]))
    names = {name: None for _, values in measured for name in values}
    means: dict[str, Any] = {name: fmean(float(v[name]) for _, v in measured if name in v) for name in names}
    return means | {"losses": {kind: fmean(values) for kind, values in sorted(by_kind.items())}}


def report_of_init(init: Path | None, name: str) -> dict[str, Any] | None:
    """The report `name` of the training that made what this one starts from, if it lies there."""
    for path in () if init is None else (init / name, init / "training" / name):
        if path.is_file():
            report: dict[str, Any] = json.loads(path.read_text())
            return report
    return None


def keep_report(path: Path, folder: Path) -> None:
    """Copy the report of an earlier training into a folder, if it exists and is not there already."""
    if path.is_file() and path.parent.resolve() != folder.resolve():
        shutil.copy(path, folder)


def save_sheet(path: Path, clips: Iterable[Tensor], *, frames: int = 7, columns: int = 1) -> None:
    """Write clips (3, F, H, W) in [-1, 1] as rows of evenly spaced frames in one PNG."""
    from PIL import Image

    rows = []
    for clip in clips:
        index = torch.linspace(0, clip.shape[1] - 1, min(frames, clip.shape[1])).round().long()
        rows.append(torch.cat(list(clip[:, index].float().cpu().unbind(1)), dim=2))
    while len(rows) % columns:
        rows.append(torch.ones_like(rows[0]))
    per_column = len(rows) // columns
    sheet = torch.cat([torch.cat(rows[i * per_column : (i + 1) * per_column], 1) for i in range(columns)], 2)
    pixels = ((sheet.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
