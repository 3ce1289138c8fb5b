"""What happens at every self-attention call of a swapped model: decide, run, count, time."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch

from vmonarch_cli.attention.joint import Text, dense_joint
from vmonarch_cli.attention.meter import Meter
from vmonarch_cli.attention.steps import NO_STEP, RunningForward, StepTracker
from vmonarch_cli.attention.structured import Attention, AttentionCall, StructuredAttention
from vmonarch_cli.attention.warm import CallKey, Grid, WarmState
from vmonarch_cli.errors import ModelError
from vmonarch_cli.plan.small_calls import AS_THEY_ARE, DENSE_BELOW, SmallCalls
from vmonarch_cli.plan.step_schedule import ClipCalls
from vmonarch_cli.presets import Preset
from vmonarch_cli.timing import Coverage, StepAttention
from vmonarch_kernels import dense_choices
from vmonarch_kernels.dense import AUTO, SDPA, is_quantised
from vmonarch_kernels.graphs import Graphs

PRESET_IS_DENSE = "preset is dense"
DENSE_STEPS = "dense_steps"
DENSE_LAYERS = "dense_layers"
EXACT = "the structure is exact"
"""One latent frame, or a band over all of them."""
GRID_MISFIT = "token count does not fit the grid"


@dataclass(frozen=True)
class _Began:
    """A forward, and what its calls start from."""

    forward: RunningForward
    warm: WarmState


class AttentionSession:
    """Counters, timings and warm state of one ``swapped`` block; module ``steps`` finds out where a step begins."""

    def __init__(
        self,
        preset: Preset,
        layers: Sequence[int],
        *,
        stages: int | None = None,
        attention: Attention | None = None,
        sample_dense_every: int = 0,
        on_first_call: Callable[[], None] | None = None,
        dense: Sequence[str] = (SDPA,),
        small: SmallCalls = AS_THEY_ARE,
    ) -> None:
        """layers: how many self-attention layers each transformer has.

        stages: how many of the transformers take over from one another in a clip; all of them by default.
        attention: computes the calls that do not run dense, in the place of the preset's structured attention. The
            other arguments are those of ``swapped``.
        """
        self.preset = preset
        self.dense = tuple(dense)
        """The dense attention of calls that run dense, and those beside it that samples compare with; "auto" until the
        first of such calls."""
        self.steps: list[StepAttention] = []
        """The finished steps of the current clip."""
        self.skipped_calls = 0
        """Self-attention calls of the current clip that a step cache, or the model itself, left out."""
        self.on_sample: Callable[[torch.Tensor], None] | None = None
        """Gets each step's new latents from a watched scheduler, for pipelines without a callback."""
        self.on_clean: Callable[[torch.Tensor], None] | None = None
        """Gets the clean latents that each step of a watched flow-matching scheduler predicts, in float32."""
        self.grid: Grid | None = None
        """(T, H, W) tokens of the last forward, None before one."""
        self.recomputes = False
        """The backward pass runs layers again (gradient checkpointing), see ``recomputing``."""
        self._began: _Began | None = None
        """The running forward as it began, where layers will run again."""
        self._replayed: _Began | None = None
        """The forward of which a layer runs again."""
        self.adapted = False
        """A tuned adapter is on in the running forward."""
        self.both_prompts = False
        """The last forward had the samples of the negative prompts and then those of the prompts."""
        self.always_both_prompts = False
        """So has every forward, of a caller whose pipeline does not say."""
        self.least_forwards = 1
        """As many forwards of a transformer make a step in sampling, where the caller runs fewer of them."""
        self._layers = list(layers)
        self._attention = attention
        self._sample_every = sample_dense_every
        self._structured = StructuredAttention(preset, self._layers, stages)
        self.small = small
        """What becomes of calls that are small."""
        self._structured.graphs = Graphs() if small.graphs else None
        self._replayed_before = 0
        self._tracker = StepTracker()
        self._meter = Meter() if on_first_call is None else Meter(on_first_call)
        self._structured_calls = 0
        self._dense_calls: Counter[str] = Counter()
        self.known_forwards = 1
        """Forwards that make a step at least, as far as was known before the last one."""

    # What callers read

    @property
    def impl(self) -> str | None:
        """The implementation in use ("dense" for a dense preset), None before it is resolved."""
        return "dense" if self.preset.attention == "dense" else self._structured.impl

    @property
    def graphs(self) -> Graphs | None:
        """The small calls that are recorded and replayed, None where they are not to be."""
        return self._structured.graphs

    @property
    def replayed_calls(self) -> int:
        """Structured calls of the current clip that were replayed, wholly or but for a part."""
        return 0 if self.graphs is None else self.graphs.replayed_calls - self._replayed_before

    @property
    def warnings(self) -> tuple[str, ...]:
        """One sentence where calls were to be replayed and could not be recorded."""
        failure = None if self.graphs is None else self.graphs.failure
        said = f"CUDA graphs were not recorded, and every attention call ran by itself: {failure}"
        return () if failure is None else (said,)

    @property
    def kept_bytes(self) -> int:
        """Largest size of what the current clip kept from step to step: L factors and residuals."""
        return self._structured.warm.peak_bytes

    @property
    def excluded_s(self) -> float:
        """Seconds of the current clip spent in dense samples and first calls."""
        return self._meter.excluded_s

    def coverage(self) -> Coverage:
        """How the self-attention calls of the current clip ran."""
        return Coverage(self._structured_calls, dict(self._dense_calls))

    def resolve_impl(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
        """Decide the implementation before the first call; ImplUnavailable (a ValueError) when it cannot run."""
        if self.preset.attention == "dense":
            return "dense"
        return self._structured.resolve_impl(device, dtype, head_dim)

    # Clips, steps and forwards: from the swap's hooks, or from callers that have no pipeline

    def begin_clip(self, total: int | None = None, *, watching: bool | None = None, forwards: int = 1) -> None:
        """Forget warm state, counters and timings; ``total`` is the clip's number of steps, if known.

        ``watching``: a watched scheduler was set up, so that steps begin by themselves from here on.
        ``forwards``: of one transformer in the dense steps that the caller leaves out.
        """
        self._structured.warm.clear()
        self._tracker.begin_clip(total, watching=watching, forwards=forwards)
        self._meter.begin_clip()
        self.steps = []
        self.skipped_calls = self._structured_calls = 0
        self._dense_calls.clear()
        self._replayed_before = 0 if self.graphs is None else self.graphs.replayed_calls

    def release(self) -> None:
        """Free what was kept from step to step; counters and timings of the clip stay."""
        self._structured.warm.drop()

    def begin_step(self, index: int | None = None, total: int | None = None) -> None:
        """Begin a denoising step (0-based; the next one by default); its time starts with its first forward."""
        if self._tracker.step is not None:
            self.end_step()
        self._tracker.begin_step(index, total)

    def begin_forward(
        self,
        transformer: int,
        grid: Grid,
        device: torch.device,
        *,
        both_prompts: bool = False,
        guided: bool = False,
        forwards: int = 1,
        packed: Text | None = None,
    ) -> None:
        """A forward of a transformer begins, on a grid of (T, H, W) tokens.

        ``both_prompts``: a step's first forward has the samples of the negative prompts and then those of the prompts.
        ``guided``: guidance is on, perhaps only for an interval of the steps: another forward may follow at any time.
        ``forwards``: at least so many forwards of this transformer make a step, as far as is known beforehand.
        ``packed``: the tokens that its sequence has beside those of the grid, where its calls do not say so.
        """
        self.both_prompts = both_prompts or self.always_both_prompts
        if self._tracker.begin_forward(transformer, grid, self.both_prompts, guided, packed):
            if self._tracker.changes_over(transformer):
                self._structured.warm.drop()
            self._meter.begin_step(device)
        self.grid = grid
        self.known_forwards = forwards
        if self.recomputes:
            self._began = _Began(self._tracker.forward(transformer), self._structured.warm.copy())

    def recomputing(self) -> AbstractContextManager[None]:
        """A context for later, within the step: calls in it repeat those of the forward that runs now.

        Gradient checkpointing runs a forward's layers again in the backward pass; they start from what they had started
        from, and nothing that they keep or take counts. RuntimeError where ``recomputes`` was not set before the
        forward.
        """
        if self._began is None:
            raise RuntimeError("a layer is to run again, and what its forward started from was not kept")
        return self._repeating(self._began)

    @contextmanager
    def _repeating(self, began: _Began) -> Iterator[None]:
        outer, self._replayed = self._replayed, began
        try:
            yield
        finally:
            self._replayed = outer

    def end_step(self, sigma: float | None = None) -> StepAttention:
        """End the step; waits for the device, so that the returned figures are final."""
        step = self._tracker.end_step()
        measured = self._meter.end_step(step, self._tracker.total, sigma)
        self._structured.warm.note_peak()
        self.skipped_calls += sum(self._layers[i] * count for i, count in step.forwards.items()) - measured.calls
        self.steps.append(measured)
        return measured

    def watch_step(self, sigma: float | None) -> None:
        """A watched scheduler made its step."""
        if self._tracker.step is not None:
            self.end_step(sigma)

    # The call itself

    def text(self, transformer: int, tokens: int, first: bool, mask: torch.Tensor | None) -> Text | None:
        """The text side of a call of the running forward; None for a call without text."""
        forward = self._forward(transformer)
        return forward.text(tokens, first, mask) if tokens else forward.packed

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        transformer: int,
        layer: int,
        text: Text | None = None,
        clips: int = 1,
    ) -> torch.Tensor:
        """One self-attention call: q, k, v (B, S, heads, D) -> (B, S, heads, D).

        The S tokens are those of ``clips`` grids, one after the other, and of the text.
        """
        forward, replayed = self._forward(transformer), self._replayed
        frames, rows, columns = forward.grid
        call = AttentionCall(
            q,
            k,
            v,
            text,
            grid=(frames * clips, rows, columns),
            step=forward.step,
            key=CallKey(transformer, layer, forward.number),
            both_prompts=forward.both_prompts,
            may_lead=forward.guided,
            forwards=max(self._tracker.forwards, self.known_forwards, self.least_forwards),
            steps=self._tracker.total,
            stage=self._tracker.stage,
        )
        run_dense = functools.partial(dense_joint, q, k, v, text)
        reason = self._why_dense(call)
        if replayed is not None:
            return run_dense(self._dense_names(q)[0]) if reason else self._structured.replay(call, replayed.warm)
        if reason is not None:
            if reason == GRID_MISFIT and self.adapted:
                raise ModelError(
                    f"a tuned adapter is not for dense attention, and layer {layer} runs dense because its {reason}: "
                    "choose --tuned none"
                )
            self._dense_calls[reason] += 1
            return self._meter.dense(q, functools.partial(run_dense, self._dense_names(q)[0]))
        if self._attention is None and self._calls.options(call.grid[0]).exact:
            # The structured code computes dense attention here: a speedup would be noise.
            self._dense_calls[EXACT] += 1
            return self._meter.dense(q, functools.partial(self._structured, call))
        self._structured_calls += 1
        if self._attention is not None:
            return self._meter.structured(functools.partial(self._attention, call))
        variant = self._structured.variant(call)
        if variant is not None:
            self._meter.first_call(variant, functools.partial(self._structured.rehearse, call))
        out = self._meter.structured(functools.partial(self._structured, call))
        if self._is_sampled(call.step, call.key):
            compared = [name for name in self._dense_names(q) if not is_quantised(name)]
            self._meter.sample(q, {name: functools.partial(run_dense, name) for name in compared}, out)
        return out

    def _forward(self, transformer: int) -> RunningForward:
        """The forward that a call belongs to."""
        return self._tracker.forward(transformer) if self._replayed is None else self._replayed.forward

    def _dense_names(self, q: torch.Tensor) -> tuple[str, ...]:
        """What runs a dense call on (B, S, heads, D), and what else samples compare with."""
        if self.dense == (AUTO,):
            self.dense = dense_choices(AUTO, q.device, q.dtype, q.shape[-1])
        return self.dense

    @property
    def _calls(self) -> ClipCalls:
        """What the calls of clips with the current one's number of steps compute."""
        return self._structured.calls(self._tracker.total)

    def forward_is_dense(self) -> bool:
        """Whether all self-attention of the running forward is dense; RuntimeError when none runs."""
        if self._tracker.step is None or self.grid is None:
            raise RuntimeError(NO_STEP)
        if self.preset.attention == "dense" or self._tracker.step.index < self._calls.preset.dense_steps:
            return True
        if self._attention is not None:
            return False
        return math.prod(self.grid) < self.small.dense_below or self._calls.options(self.grid[0]).exact

    def _why_dense(self, call: AttentionCall) -> str | None:
        """Why a call runs dense, or None when it runs structured."""
        frames, rows, columns = call.grid
        if self.preset.attention == "dense":
            return PRESET_IS_DENSE
        if call.video_tokens != frames * rows * columns:
            return GRID_MISFIT
        if call.step < self._calls.preset.dense_steps:
            return DENSE_STEPS
        if call.key.layer < self.preset.dense_layers:
            return DENSE_LAYERS
        return DENSE_BELOW if self._attention is None and math.prod(call.grid) < self.small.dense_below else None

    def _is_sampled(self, step: int, key: CallKey) -> bool:
        """Whether this is the call to sample: every n-th structured step, one layer in turn, first branch."""
        every, first_layer = self._sample_every, self.preset.dense_layers
        if every < 1 or key.forward or self._meter.has_sample:
            return False
        turn, since = divmod(step - int(self._calls.preset.dense_steps), every)
        return not since and key.layer == first_layer + turn % (self._layers[key.transformer] - first_layer)
