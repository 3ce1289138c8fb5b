"""Put Monarch processors into a pipeline's transformers, watch its steps, and take everything out again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

import torch

from vmonarch_cli.attention import op
from vmonarch_cli.attention.base import MonarchProcessor
from vmonarch_cli.attention.joint import Packed
from vmonarch_cli.attention.session import AttentionSession
from vmonarch_cli.errors import ModelError
from vmonarch_cli.families.registry import FAMILIES
from vmonarch_cli.models.catalogue import PIPELINES
from vmonarch_cli.models.unfit import UNFIT
from vmonarch_cli.pipeline.tuned import AdapterSwitch, switch_of
from vmonarch_cli.pipeline.tuned_weights import WeightSwitch
from vmonarch_cli.plan.small_calls import AS_THEY_ARE, SmallCalls
from vmonarch_cli.presets import Preset
from vmonarch_cli.text import with_article
from vmonarch_kernels.dense import SDPA

_STAGES = ("transformer", "transformer_2")
"""A pipeline's transformers that take over from one another within a clip."""
_PARTITIONS = ("transformer_ref",)
"""Those that make clips of another kind in its first one's place: MiniMax-H3's, from references."""


@contextmanager
def swapped(
    target: Any,
    preset: Preset,
    *,
    sample_dense_every: int = 0,
    on_first_call: Callable[[], None] | None = None,
    session: AttentionSession | None = None,
    adapter: str | None = None,
    dense: Sequence[str] = (SDPA,),
    small: SmallCalls = AS_THEY_ARE,
) -> Iterator[AttentionSession]:
    """Run self-attention as ``preset`` says inside the block; afterwards, also after an error, all is as before.

    target: a diffusers pipeline (all of its transformers are swapped and its scheduler tells clips and steps apart,
        see AttentionSession), or a transformer or a sequence of them (then the caller must call
        begin_step and end_step).
    sample_dense_every: measure dense attention on one layer's tensors in every n-th structured step; 0 never.
    on_first_call: called before a kernel variant runs for the first time, which may compile for seconds.
    session: one to go on with, warm state and counters included, instead of a new one; the arguments above,
        `dense` and `small` are then its own. This is how several presets take turns on one model.
    dense: names of `vmonarch_kernels.dense_attention`: what runs the calls that are dense, and what else a sample
        times; ("auto",) is what suits the first such call.
    small: what becomes of structured calls that are small: run dense, or recorded as CUDA graphs and replayed.
    adapter: name of a tuned adapter that the transformers have (see `tuned.switch_of`). It is on in the forwards
        whose attention is structured, except in the first layers that run dense, and off otherwise and afterwards.

    Raises ModelError for a transformer of an unknown family, and for one that is swapped already.
    """
    transformers, scheduler = _parts(target)
    layers = [_self_attentions(transformer) for transformer in transformers]
    if session is None:
        session = AttentionSession(
            preset,
            [len(found) for found in layers],
            stages=1 if any(getattr(target, name, None) is not None for name in _PARTITIONS) else None,
            sample_dense_every=sample_dense_every,
            on_first_call=on_first_call,
            dense=dense,
            small=small,
        )
    session_id = op.register(session)
    with ExitStack() as undo:
        undo.callback(op.unregister, session_id)
        switch = None
        if adapter is not None:
            blocks = [
                _dense_blocks(transformer, found, session.preset.dense_layers)
                for transformer, found in zip(transformers, layers, strict=True)
            ]
            switch = switch_of(transformers, adapter, blocks)
            undo.callback(switch.off)
        for index, transformer in enumerate(transformers):
            hook = functools.partial(_before_forward, session, index, target, scheduler, switch)
            handle = transformer.register_forward_pre_hook(hook, with_kwargs=True)
            undo.callback(handle.remove)
            kinds = FAMILIES[_class_name(transformer)].processors
            for number, module in layers[index].items():
                kind = kinds[type(module.processor).__name__]
                undo.callback(setattr, module, "processor", module.processor)
                module.processor = _replacement(kind, module.processor, session_id, index, number)
        if scheduler is not None:
            undo.enter_context(_watched(scheduler, session))
        yield session


def _parts(target: Any) -> tuple[list[Any], Any]:
    """Transformers and scheduler (None for bare transformers) of what ``swapped`` was given."""
    if isinstance(target, torch.nn.Module):
        return [target], None
    if isinstance(target, Sequence):
        return list(target), None
    kind = type(target).__name__
    if kind in UNFIT:
        raise ModelError(f"attention of {with_article(kind)} cannot be swapped: {UNFIT[kind]}")
    found = [getattr(target, name, None) for name in (*_STAGES, *_PARTITIONS)]
    transformers = [transformer for transformer in found if transformer is not None]
    if not transformers or getattr(target, "scheduler", None) is None:
        raise ModelError(f"{kind} has no transformer and scheduler to work with")
    return transformers, target.scheduler


def _class_name(transformer: Any) -> str:
    """The class of diffusers: FSDP gives a module a class of its own, below that."""
    kinds = [kind.__name__ for kind in type(getattr(transformer, "_orig_mod", transformer)).__mro__]
    return next((name for name in kinds if name in FAMILIES), kinds[0])


def _self_attentions(transformer: Any) -> dict[int, Any]:
    name = _class_name(transformer)
    if name not in FAMILIES:
        raise ModelError(
            f"attention of {with_article(name)} cannot be swapped; known are {', '.join(sorted(FAMILIES))}"
        )
    family = FAMILIES[name]
    found = family.self_attentions(transformer)
    if not found:
        raise ModelError(f"this {name} has no self-attention layers to swap")
    if any(isinstance(module.processor, MonarchProcessor) for module in found.values()):
        raise ModelError(f"the attention of this {name} is swapped already: end that block, or disable it, first")
    obstacle = family.obstacle(transformer)
    if obstacle is not None:
        raise ModelError(f"attention of this {name} cannot be swapped: {obstacle}")
    for module in found.values():
        stock = type(module.processor).__name__
        if stock not in family.processors:
            raise ModelError(f"attention of this {name} cannot be swapped: its processor {stock} is not the stock one")
    return found


def _dense_blocks(transformer: Any, attentions: Mapping[int, Any], count: int) -> list[str]:
    """Paths of the blocks that the first `count` self-attention layers are in."""
    paths = {id(module): path for path, module in transformer.named_modules()}
    return [paths[id(module)].rpartition(".")[0] for number, module in attentions.items() if number < count]


def _replacement(
    kind: type[MonarchProcessor], stock: Any, session_id: int, transformer: int, layer: int
) -> MonarchProcessor:
    processor = kind(op.address(session_id, transformer, layer))
    processor._attention_backend = getattr(stock, "_attention_backend", None)
    processor._parallel_config = getattr(stock, "_parallel_config", None)
    return processor


def _before_forward(
    session: AttentionSession,
    index: int,
    target: Any,
    scheduler: Any,
    switch: AdapterSwitch | WeightSwitch | None,
    transformer: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Forward pre-hook: the family reads the grid, which processors never see, off the forward's arguments."""
    if scheduler is not None and target.scheduler is not scheduler:
        raise RuntimeError("the pipeline's scheduler was replaced while its attention was swapped: replace it before")
    latents: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    family = FAMILIES[_class_name(transformer)]
    packed = (
        Packed(family.grid(transformer, args, kwargs))
        if family.packed is None
        else family.packed(transformer, args, kwargs)
    )
    session.begin_forward(
        index,
        packed.grid,
        latents.device,
        both_prompts=_has_both_prompts(target),
        guided=_has_guider(target),
        forwards=_forwards(target),
        packed=packed.text,
    )
    session.adapted = switch is not None and not session.forward_is_dense()
    if switch is not None:
        switch.set(index, session.adapted)


def _has_both_prompts(target: Any) -> bool:
    """Whether a step's forward has the samples of the negative prompts and of the prompts, half and half."""
    facts = PIPELINES.get(type(target).__name__)
    if facts is None or not facts.guidance_by_batch:
        return False
    # Not every pipeline has the property; LTX-2's knows of the guidance of sound, too.
    scale = getattr(target, "guidance_scale", 0)  # set by the pipeline's call
    return bool(getattr(target, "do_classifier_free_guidance", scale > 1))


def _forwards(target: Any) -> int:
    """How many forwards a step has at least: two where the pipeline compares the prompts in forwards of their own."""
    facts = PIPELINES.get(type(target).__name__)
    if facts is None or facts.guidance_by_batch or facts.guider:
        return 1
    return 2 if getattr(target, "do_classifier_free_guidance", False) else 1


def _has_guider(target: Any) -> bool:
    """Whether guidance is a component of the pipeline and on: a guider may be so for an interval of the steps."""
    facts = PIPELINES.get(type(target).__name__)
    return facts is not None and facts.guider and target.guider.guidance_scale > 1


@contextmanager
def _watched(scheduler: Any, session: AttentionSession) -> Iterator[None]:
    """Tell the session of every ``set_timesteps`` and ``step`` of this very scheduler object.

    The wrappers are bound methods and call the class's own, because pipelines copy schedulers (LTX-2 has one for
    sound) and copy.deepcopy binds a method to the copy: a copy then works and is not watched. functools.wraps keeps
    the signature, by which diffusers decides what it may pass.
    """
    kind = type(scheduler)

    @functools.wraps(kind.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = kind.set_timesteps(self, *args, **kwargs)
        if self is scheduler:
            session.begin_clip(len(self.timesteps), watching=True)
        return result

    @functools.wraps(kind.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = kind.step(self, *args, **kwargs)
        if self is scheduler:
            session.watch_step(_sigma(self))
            if session.on_clean is not None and (sigma := _sigma(self)) is not None:
                velocity, _, noisy, *_ = (*args, *kwargs.values())
                session.on_clean(noisy.float() - sigma * velocity.float())
            if session.on_sample is not None:
                session.on_sample(result[0])
        return result

    scheduler.set_timesteps = MethodType(set_timesteps, scheduler)
    scheduler.step = MethodType(step, scheduler)
    try:
        yield
    finally:
        del scheduler.set_timesteps, scheduler.step


def _sigma(scheduler: Any) -> float | None:
    """Sigma at which the step just made began; diffusers keeps sigmas on the CPU, so reading one waits for nothing."""
    index, sigmas = getattr(scheduler, "step_index", None), getattr(scheduler, "sigmas", None)
    if index is None or sigmas is None or not 0 < index <= len(sigmas):
        return None
    return float(sigmas[index - 1])
