"""The structured call itself: its guidance branches, what they start from and keep, and the text around them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import torch

from vmonarch_cli.attention.joint import Text, text_entry, text_rows
from vmonarch_cli.attention.warm import CallKey, Grid, WarmState
from vmonarch_cli.plan.call_options import CallOptions
from vmonarch_cli.plan.step_schedule import FIRST_STAGE, ClipCalls, Stage
from vmonarch_cli.presets import Preset
from vmonarch_kernels import Inputs, attend, resolve_impl
from vmonarch_kernels.graphs import Graphs


@dataclass(frozen=True)
class AttentionCall:
    """One self-attention call: its tensors, and where in the clip it stands.

    q, k, v: (B, S, heads, D). The S tokens are those of ``grid`` (T, H, W) and those of ``text``.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    text: Text | None
    grid: Grid
    step: int
    """0-based denoising step of the clip."""
    key: CallKey
    both_prompts: bool = False
    """The samples are those of all negative prompts and then those of all prompts."""
    may_lead: bool = False
    """Another forward may follow in this step although none did in the last one."""
    forwards: int = 1
    """Forwards of one transformer in a step, as far as it is known or the last step showed."""
    steps: int | None = None
    """Denoising steps of the clip, if known."""
    stage: Stage = FIRST_STAGE
    """Where the step stands among the transformers that take over from one another."""

    @property
    def video_tokens(self) -> int:
        """Tokens of the call that are not text."""
        return self.q.shape[1] - (self.text.tokens if self.text else 0)

    def samples(self, rows: slice, *, negative_half: bool) -> AttentionCall:
        """The call with only some samples of the batch, as a guidance branch."""
        text = None if self.text is None else self.text.samples(rows)
        key = self.key._replace(negative_half=negative_half)
        return replace(self, q=self.q[rows], k=self.k[rows], v=self.v[rows], text=text, key=key)


Attention = Callable[[AttentionCall], torch.Tensor]
"""How the self-attention of a call is computed: (B, S, heads, D) in q's dtype."""


class StructuredAttention:
    """Attention as a preset has it, and what a clip's calls keep from step to step."""

    def __init__(self, preset: Preset, layers: Sequence[int], stages: int | None = None) -> None:
        """``layers``: how many self-attention layers each transformer has; ``stages``: how many of them take
        over from one another in a clip, all by default.
        """
        self.preset = preset
        self.calls = cache(partial(ClipCalls, preset))
        """What the calls of clips with a number of steps compute."""
        self._layers = list(layers)
        self._stages = len(self._layers) if stages is None else stages
        self.warm = WarmState()
        self.graphs: Graphs | None = None
        """Replays the calls that are small; None for none."""
        self.impl: str | None = None
        """The implementation of the last call, None before one."""
        self._impls: dict[tuple[torch.device, torch.dtype, int], str] = {}

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        """The call's output."""
        return self._run(call, self.warm)

    @torch.no_grad()
    def rehearse(self, call: AttentionCall) -> torch.Tensor:
        """The same work without keeping anything: what it kept would make this clip differ from the next one, and what
        it kept for gradients would be missing where a layer runs again in the backward pass.
        """
        return self._run(call, self.warm.rehearsal())

    def replay(self, call: AttentionCall, before: WarmState) -> torch.Tensor:
        """A call once more, from a copy of what its forward had started from: the same output."""
        return self._run(call, before)

    def resolve_impl(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
        """Decide the implementation; ImplUnavailable (a ValueError) when the preset's own cannot run."""
        key = (device, dtype, head_dim)
        if key not in self._impls:
            self._impls[key] = resolve_impl(self.preset.impl, device, dtype, head_dim)
        self.impl = self._impls[key]
        return self.impl

    def variant(self, call: AttentionCall) -> Hashable:
        """What the first run of this call compiles; None where nothing compiles (all but Triton)."""
        if self.resolve_impl(call.q.device, call.q.dtype, call.q.shape[3]) != "triton":
            return None
        first = self._branches(call)[0]
        cold = self.warm.factor(first.key, first.grid, first.q)[0] is None
        q = call.q
        return (q.shape, q.stride(), q.dtype, q.device, call.grid, call.key.forward > 0, cold)

    def _run(self, call: AttentionCall, warm: WarmState) -> torch.Tensor:
        """The output of all guidance branches that the call has, in the order of its samples."""
        self.resolve_impl(call.q.device, call.q.dtype, call.q.shape[3])
        branches = self._branches(call)
        outs = [self._branch(branch, warm) for branch in branches]
        return outs[0] if len(outs) == 1 else torch.cat(outs[::-1])

    def _branches(self, call: AttentionCall) -> list[AttentionCall]:
        """The guidance branches of a call, the one that leads first; apart only where they keep something."""
        preset = self.calls(call.steps).preset
        if not (call.both_prompts and (preset.warm_start or preset.refresh)):
            return [call]
        samples = call.q.shape[0]
        if samples % 2:
            return [replace(call, forwards=1)]
        prompts = call.samples(slice(samples // 2, None), negative_half=False)
        negative = call.samples(slice(samples // 2), negative_half=True)
        return [replace(branch, forwards=2) for branch in (prompts, negative)]

    def _branch(self, call: AttentionCall, warm: WarmState) -> torch.Tensor:
        """The structured call of one guidance branch. One that starts warm does one iteration."""
        options_for, frames = self.calls(call.steps).options, call.grid[0]
        options, start, keeps = options_for(frames), None, False
        if options.keeps_l:
            start, keeps = warm.factor(call.key, call.grid, call.q)
            options = options_for(frames, warm=start is not None)
        text, extra, video = call.text, None, (call.q, call.k, call.v)
        if text is not None:
            extra = text_entry(*video, text)
            video = (text.split(call.q)[0], text.split(call.k)[0], text.split(call.v)[0])
        out, factor = self._attend(Inputs(*video, call.grid, start, extra), options, call, warm, keeps)
        if factor is not None:
            factor = factor.detach() if factor.requires_grad else factor
            warm.put(call.key, call.grid, factor, start, follow=call.forwards > 1 or call.may_lead)
        return out if text is None else text.join(out, text_rows(call.q, call.k, call.v, text))

    def _attend(
        self, inputs: Inputs, options: CallOptions, call: AttentionCall, warm: WarmState, keeps: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(output of the video's queries, L where the call ``keeps`` it), with the residual that the preset wants."""
        impl = self.impl or "auto"
        if not options.refresh:
            if self.graphs is not None and self.graphs.takes(inputs, impl):
                return self.graphs.attend(inputs, options.kernel, return_l=keeps)
            return attend(inputs, options.kernel, impl=impl, return_l=keeps)
        residual, leads = warm.residual(
            call.key, call.grid, inputs.q, options.kernel.first_frame, call.step, shared=options.shared_refresh
        )
        residual.graphs = self.graphs
        if not leads:
            return residual.attention_without_turns(inputs, options.kernel, impl=impl, return_l=keeps)
        count = self._due(call) if warm.keeps else 1
        return residual.attention(inputs, options.kernel, options.refresh, count=count, impl=impl, return_l=keeps)

    def _due(self, call: AttentionCall) -> int:
        """Frames that have their turn in this call."""
        layers = self._layers[call.key.transformer]
        due = self.calls(call.steps).due(call.grid[0], layers, self._stages)
        return due(call.step, call.key.layer, call.forwards, call.stage)
