"""What happens at every self-attention call of a swapped model: decide, run, count, time."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vmonarch_cli.attention.clock import Clock, Mark
from vmonarch_cli.attention.joint import Rows, Text, dense_joint, text_entry, text_rows, valid_rows
from vmonarch_cli.attention.sampling import DenseSample, sample_dense
from vmonarch_cli.attention.warm import NEGATIVE, CallKey, WarmState
from vmonarch_cli.presets import Preset
from vmonarch_cli.timing import Coverage, StepAttention
from vmonarch_kernels import Inputs, Options, attend, resolve_impl
from vmonarch_kernels.cost import band_with_refresh, is_exact

PRESET_IS_DENSE = "preset is dense"
DENSE_STEPS = "dense_steps"
DENSE_LAYERS = "dense_layers"
GRID_MISFIT = "token count does not fit the grid"

NO_STEP = (
    "a swapped transformer ran outside a denoising step: give `swapped` the pipeline, whose scheduler tells the steps "
    "apart, or call session.begin_step() and session.end_step() around each step"
)


@dataclass(frozen=True)
class _Forward:
    """The transformer forward that is running."""

    transformer: int
    grid: tuple[int, int, int]
    branch: int
    both_prompts: bool
    """Its samples are those of all negative prompts and then those of all prompts, as diffusers orders them."""
    valid: dict[tuple[int, ...], list[Rows] | None] = field(default_factory=dict)
    """Real text tokens by the mask's shape: all layers of a forward share one mask, and reading one waits."""


@dataclass(frozen=True)
class _Tensors:
    """What a call attends over: q, k, v (B, S, heads, D) and which of the S tokens are text."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    text: Text | None

    def samples(self, rows: slice) -> _Tensors:
        """The same of some samples of the batch alone."""
        text = None if self.text is None else self.text.samples(rows)
        return _Tensors(self.q[rows], self.k[rows], self.v[rows], text)


@dataclass(frozen=True)
class _Call:
    start: Mark
    stop: Mark
    structured: bool


@dataclass
class _Step:
    """A denoising step in which a forward has begun; marks are resolved when it ends."""

    index: int
    total: int | None
    clock: Clock
    start: Mark
    forward: _Forward
    calls: list[_Call] = field(default_factory=list)
    forwards: Counter[int] = field(default_factory=Counter)
    excluded: list[tuple[Mark, Mark]] = field(default_factory=list)
    first_calls: list[tuple[Mark, Mark]] = field(default_factory=list)
    sample: tuple[DenseSample, _Call] | None = None


class AttentionSession:
    """Counters, timings and warm state of one ``swapped`` block.

    Clips and steps: with a pipeline, ``swap`` watches its scheduler. ``set_timesteps``, which every pipeline call
    makes once, begins a clip and forgets everything of the one before; a step begins with the first forward
    after it or after the last ``scheduler.step``, and ends when ``scheduler.step`` returns. No values are compared, so
    nothing waits for the device. Callers without a pipeline call begin_clip, begin_step and end_step themselves.
    """

    def __init__(
        self,
        preset: Preset,
        layers: Sequence[int],
        *,
        sample_dense_every: int = 0,
        on_first_call: Callable[[], None] | None = None,
    ) -> None:
        """layers: how many self-attention layers each transformer has."""
        self.preset = preset
        self.steps: list[StepAttention] = []
        """The finished steps of the current clip."""
        self.excluded_s = 0.0
        """Seconds of the current clip spent in dense samples and first calls."""
        self._layers = list(layers)
        self._sample_every = sample_dense_every
        self._on_first_call = on_first_call
        self._impls: dict[tuple[torch.device, torch.dtype, int], str] = {}
        self._impl: str | None = "dense" if preset.attention == "dense" else None
        self._grid: tuple[int, int, int] | None = None
        self._warm = WarmState()
        self._used: set[int] = set()
        """Transformers that the last step ran."""
        self._forwards = 1
        """Forwards of one transformer in the clip's last step."""
        self._variants: set[tuple[Any, ...]] = set()
        self._dense_ready: set[tuple[Any, ...]] = set()
        self._structured = 0
        self._dense: Counter[str] = Counter()
        self._step: _Step | None = None
        self._begun: int | None = None
        """Index given to begin_step, until its first forward."""
        self._watching = False
        self._total: int | None = None
        self.on_sample: Callable[[torch.Tensor], None] | None = None
        """Told each step's new latents by a watched scheduler, for pipelines that call nobody back."""
        self._skipped = 0

    # What callers read

    @property
    def impl(self) -> str | None:
        """The implementation in use ("dense" for a dense preset), None before it is resolved."""
        return self._impl

    @property
    def grid(self) -> tuple[int, int, int] | None:
        """(T, H, W) tokens of the last forward, None before one."""
        return self._grid

    @property
    def warm_state_bytes(self) -> int:
        """Largest size of the kept L factors in the current clip."""
        return self._warm.peak_bytes

    def coverage(self) -> Coverage:
        """How the self-attention calls of the current clip ran."""
        return Coverage(self._structured, dict(self._dense))

    @property
    def skipped_calls(self) -> int:
        """Self-attention calls of the current clip that a step cache, or the model itself, left out."""
        return self._skipped

    def resolve_impl(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
        """Decide the implementation before the first call; ImplUnavailable (a ValueError) when it cannot run."""
        if self.preset.attention == "dense":
            return "dense"
        key = (device, dtype, head_dim)
        if key not in self._impls:
            self._impls[key] = resolve_impl(self.preset.impl, device, dtype, head_dim)
        self._impl = self._impls[key]
        return self._impl

    # Clips and steps

    def begin_clip(self, total: int | None = None) -> None:
        """Forget warm state, counters and timings; ``total`` is the clip's number of steps, if known."""
        self._warm.clear()
        self.steps = []
        self.excluded_s = 0.0
        self._structured = self._skipped = 0
        self._dense.clear()
        self._step = self._begun = None
        self._forwards = 1
        self._total = total

    def begin_step(self, index: int | None = None, total: int | None = None) -> None:
        """Begin a denoising step (0-based; the next one by default); its time starts with its first forward."""
        if self._step is not None:
            self.end_step()
        if total is not None:
            self._total = total
        self._begun = len(self.steps) if index is None else index

    def end_step(self, sigma: float | None = None) -> StepAttention:
        """End the step; waits for the device, so that the returned figures are final."""
        step = self._step
        if step is None:
            raise RuntimeError("end_step was called without a forward since the last step")
        stop = step.clock.mark()
        step.clock.settle()
        self._step = self._begun = None
        self._warm.note_peak()
        self._used = set(step.forwards)
        self._forwards = max(step.forwards.values())
        self._skipped += sum(self._layers[index] * count for index, count in step.forwards.items()) - len(step.calls)
        measured = _measure(step, stop, sigma)
        self.steps.append(measured)
        self.excluded_s += _total(step.excluded)
        return measured

    # What the swap's hooks call

    def watch_clip(self, total: int | None) -> None:
        """A watched scheduler was set up for a clip: from here on steps begin by themselves."""
        self._watching = True
        self.begin_clip(total)

    def watch_step(self, sigma: float | None) -> None:
        """A watched scheduler made its step."""
        if self._step is not None:
            self.end_step(sigma)

    def begin_forward(
        self, transformer: int, grid: tuple[int, int, int], device: torch.device, both_prompts: bool = False
    ) -> None:
        """A forward of a transformer begins; learns the grid (T, H, W) and the guidance branch.

        ``both_prompts``: a step's first forward has the samples of the negative prompts and then those of the prompts.
        """
        if self._step is None:
            if self._begun is None and not self._watching:
                raise RuntimeError(NO_STEP)
            if transformer not in self._used:
                # A two-stage model changed over and will not go back: free the first stage's factors.
                self._warm.drop()
            index = len(self.steps) if self._begun is None else self._begun
            clock = Clock(device)
            forward = _Forward(transformer, grid, 0, both_prompts)
            self._step = _Step(index, self._total, clock, clock.mark(), forward)
        else:
            branch = self._step.forwards[transformer]
            self._step.forward = _Forward(transformer, grid, branch, both_prompts and branch == 0)
        self._step.forwards[transformer] += 1
        self._grid = grid

    # The call itself

    def text(self, tokens: int, first: bool, mask: torch.Tensor | None) -> Text | None:
        """The text side of a call as the running forward has it; None for a call of video tokens alone."""
        if tokens == 0:
            return None
        if mask is None or self._step is None:
            return Text(tokens, first, valid_rows(mask))
        known = self._step.forward.valid
        if mask.shape not in known:
            known[mask.shape] = valid_rows(mask)
        return Text(tokens, first, known[mask.shape])

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, transformer: int, layer: int) -> torch.Tensor:
        """One self-attention call of video tokens alone: q, k, v (B, N, heads, D) -> (B, N, heads, D)."""
        return self.attend_joint(q, k, v, transformer, layer, text=None, clips=1)

    def attend_joint(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        transformer: int,
        layer: int,
        text: Text | None,
        clips: int,
    ) -> torch.Tensor:
        """The general call: S tokens are those of ``clips`` grids, one after the other, and of the text."""
        step = self._step
        if step is None or step.forward.transformer != transformer:
            raise RuntimeError(NO_STEP)
        frames, rows, columns = step.forward.grid
        grid = (frames * clips, rows, columns)
        dense = functools.partial(dense_joint, q, k, v, text)
        reason = self._dense_reason(step, grid, layer, tokens=q.shape[1] - (text.tokens if text else 0))
        if reason is not None:
            if step.clock.on_gpu:
                self._warm_up_dense(step, q, dense)
            start = step.clock.mark()
            out: torch.Tensor = dense()
            step.calls.append(_Call(start, step.clock.mark(), structured=False))
            self._dense[reason] += 1
            return out

        self.resolve_impl(q.device, q.dtype, q.shape[3])
        branches = self._branches(step.forward, layer, _Tensors(q, k, v, text))
        run = functools.partial(self._structured_call, branches, grid, step)
        # What a rehearsal keeps would make this clip differ from the next one, which has none.
        key, first = branches[0]
        cold = self._warm.factor(key, grid, first.q)[0] is None
        variant = (q.shape, q.stride(), q.dtype, q.device, grid, step.forward.branch > 0, cold)
        self._first_call(step, lambda: run(self._warm.rehearsal()), variant)
        start = step.clock.mark()
        out = run(self._warm)
        call = _Call(start, step.clock.mark(), structured=True)
        step.calls.append(call)
        self._structured += 1
        if step.sample is None and self._samples(step.index, key):
            self._sample(step, q, dense, out, call)
        return out

    def _branches(self, forward: _Forward, layer: int, call: _Tensors) -> list[tuple[CallKey, _Tensors]]:
        """The guidance branches of a call; apart only where they hand something on, the one of the prompts first."""
        key = CallKey(forward.transformer, layer, forward.branch)
        samples = call.q.shape[0]
        if forward.both_prompts and samples % 2 == 0 and (self.preset.warm_start or self.preset.refresh):
            prompts, negative = call.samples(slice(samples // 2, None)), call.samples(slice(samples // 2))
            return [(key, prompts), (key._replace(branch=NEGATIVE), negative)]
        return [(key, call)]

    def _dense_reason(self, step: _Step, grid: tuple[int, int, int], layer: int, tokens: int) -> str | None:
        """Why this call runs dense, or None when it runs structured."""
        frames, rows, columns = grid
        if self.preset.attention == "dense":
            return PRESET_IS_DENSE
        if tokens != frames * rows * columns:
            return GRID_MISFIT
        if step.index < self.preset.dense_steps:
            return DENSE_STEPS
        return DENSE_LAYERS if layer < self.preset.dense_layers else None

    def _structured_call(
        self, branches: list[tuple[CallKey, _Tensors]], grid: tuple[int, int, int], step: _Step, warm: WarmState
    ) -> torch.Tensor:
        """The output of all guidance branches that the call has, in the order of its samples."""
        forwards = len(branches) if step.forward.both_prompts else self._forwards
        outs = [self._branch(key, call, grid, step, forwards, warm) for key, call in branches]
        return outs[0] if len(outs) == 1 else torch.cat(outs[::-1])

    def _branch(
        self,
        key: CallKey,
        call: _Tensors,
        grid: tuple[int, int, int],
        step: _Step,
        forwards: int,
        warm: WarmState,
    ) -> torch.Tensor:
        """The structured call of one guidance branch. One that starts warm does one iteration."""
        preset = self.preset
        q, k, v, text = call.q, call.k, call.v, call.text
        band = band_with_refresh(grid[0], preset.band, preset.refresh, first_frame=preset.first_frame)
        # When the band covers every frame there is no L, and nothing to keep.
        inexact = not is_exact(grid[0], band)
        l_prev, keeps = warm.factor(key, grid, q) if preset.warm_start and inexact else (None, False)
        extra = None
        video = (q, k, v)
        if text is not None:
            extra = text_entry(q, k, v, text)
            video = (text.split(q)[0], text.split(k)[0], text.split(v)[0])
        num_steps = preset.num_steps if l_prev is None else 1
        inputs = Inputs(*video, grid, l_prev, extra)
        options = Options(num_steps, preset.c_floor, preset.first_frame, band)
        run: dict[str, Any] = {"impl": self._impl, "return_l": keeps}
        if preset.refresh and inexact:
            steps_left = None if step.total is None else step.total - step.index
            residual, leads = warm.residual(
                key, grid, video[0], preset.first_frame, steps_left, shared=preset.shared_refresh
            )
            if leads:
                turns_for = forwards if preset.shared_refresh else 1
                out, factor = residual.attention(inputs, options, preset.refresh, forwards=turns_for, **run)
            else:
                out, factor = residual.attention_without_turns(inputs, options, **run)
        else:
            out, factor = attend(inputs, options, **run)
        if factor is not None:
            warm.put(key, grid, factor, l_prev, follow=forwards > 1)
        return out if text is None else text.join(out, text_rows(q, k, v, text))

    def _first_call(self, step: _Step, run: Callable[[], object], variant: tuple[Any, ...]) -> None:
        """Run a kernel variant once before its first timed call: compilation is reported apart, never as attention.

        Only Triton compiles; the other implementations have nothing to get ready.
        """
        if self._impl != "triton" or variant in self._variants:
            return
        if self._on_first_call is not None:
            self._on_first_call()
        step.clock.settle()
        start = step.clock.mark()
        run()
        step.clock.settle()
        span = (start, step.clock.mark())
        step.first_calls.append(span)
        step.excluded.append(span)
        self._variants.add(variant)

    def _warm_up_dense(self, step: _Step, q: torch.Tensor, dense: Callable[[], torch.Tensor]) -> None:
        """One untimed dense call per shape: cuDNN plans and CPU pages must not count against dense attention."""
        shape = (q.shape, q.dtype, q.device)
        if shape not in self._dense_ready:
            start = step.clock.mark()
            dense()
            step.excluded.append((start, step.clock.mark()))
            self._dense_ready.add(shape)

    def _samples(self, step_index: int, key: CallKey) -> bool:
        """Whether this is the call to sample: every n-th structured step, one layer in turn, first branch."""
        first_layer = self.preset.dense_layers
        structured_layers = self._layers[key.transformer] - first_layer
        since = step_index - self.preset.dense_steps
        if self._sample_every < 1 or key.branch != 0 or since % self._sample_every:
            return False
        return key.layer == first_layer + since // self._sample_every % structured_layers

    def _sample(
        self, step: _Step, q: torch.Tensor, dense: Callable[[], torch.Tensor], out: torch.Tensor, call: _Call
    ) -> None:
        self._warm_up_dense(step, q, dense)
        start = step.clock.mark()
        sample = sample_dense(dense, out, step.clock)
        step.sample = (sample, call)
        step.excluded.append((start, step.clock.mark()))


def _total(spans: Sequence[tuple[Mark, Mark]]) -> float:
    return sum(Clock.seconds(*span) for span in spans)


def _measure(step: _Step, stop: Mark, sigma: float | None) -> StepAttention:
    """Resolve a step's marks, which must have settled."""
    attention_s = _total([(call.start, call.stop) for call in step.calls])
    dense_calls_s = _total([(call.start, call.stop) for call in step.calls if not call.structured])
    structured_calls = sum(call.structured for call in step.calls)
    dense_call_s = dense_s = sampled_s = error = None
    if step.sample is not None:
        sample, call = step.sample
        dense_call_s, error = sample.seconds(), sample.error()
        sampled_s = Clock.seconds(call.start, call.stop)
        dense_s = dense_call_s * structured_calls + dense_calls_s
    elif structured_calls == 0:
        # The step ran dense: what it took is the dense time.
        dense_s = attention_s
    return StepAttention(
        index=step.index,
        total=step.total,
        sigma=sigma,
        step_s=Clock.seconds(step.start, stop) - _total(step.excluded),
        attention_s=attention_s,
        calls=len(step.calls),
        structured_calls=structured_calls,
        dense_call_s=dense_call_s,
        dense_s=dense_s,
        sampled_attention_s=sampled_s,
        error=error,
        first_call_s=_total(step.first_calls) if step.first_calls else None,
    )
