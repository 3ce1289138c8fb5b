"""Monarch attention in a script: two lines around any diffusers pipeline of a known family.

.. code-block:: python

    from diffusers import WanPipeline
    from vmonarch_cli import monarch

    pipe = WanPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    with monarch(pipe, "balanced") as session:
        frames = pipe("a cat surfing on a wave at sunset").frames
    print(session.table())
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, TypedDict, Unpack

from vmonarch_cli.attention.session import AttentionSession
from vmonarch_cli.cli.output import Output, plain_console
from vmonarch_cli.cli.report import coverage_words, step_legend, step_table
from vmonarch_cli.errors import ModelError, PresetError
from vmonarch_cli.pipeline.fuse import fused
from vmonarch_cli.pipeline.parts import transformers_of
from vmonarch_cli.pipeline.swap import swapped
from vmonarch_cli.pipeline.tuned_scripts import with_tuned
from vmonarch_cli.plan.small_calls import SmallCalls
from vmonarch_cli.presets import DEFAULT_PRESET, FewSteps, Preset, apply_overrides, load_preset, read_preset
from vmonarch_cli.text import shown
from vmonarch_cli.timing import Coverage, StepAttention
from vmonarch_cli.untrusted.files import user_path
from vmonarch_kernels.dense import AUTO, DENSE_NAMES

_OURS = "_vmonarch_session"
"""The attribute of a pipeline that holds its session."""


class PresetFields(TypedDict, total=False):
    """The fields of a preset that a call may change; ``vmonarch presets show NAME`` explains each of them."""

    attention: Literal["monarch", "dense"]
    num_steps: int
    warm_start: bool
    c_floor: float
    first_frame: bool
    band: int | None
    refresh: float
    shared_refresh: bool
    first_turns: float | None
    step_refresh: tuple[float, ...] | None
    layer_refresh: tuple[float, ...] | None
    dense_steps: int | float
    dense_layers: int
    few_steps: FewSteps | None
    impl: Literal["auto", "reference", "torch", "triton"]


class MonarchSession:
    """What the attention of one pipeline did, from ``monarch`` or ``enable_monarch``.

    All figures are of the pipeline's last call; they stay when the session has ended.
    """

    def __init__(self, attention: AttentionSession, undo: ExitStack) -> None:
        self._attention = attention
        self._undo = undo

    @property
    def preset(self) -> Preset:
        """The preset that is in use, with the fields that were changed."""
        return self._attention.preset

    @property
    def impl(self) -> str | None:
        """The implementation: "reference", "torch", "triton" or "dense"; None before the first structured call."""
        return self._attention.impl

    @property
    def dense_attention(self) -> str:
        """What computes the calls that run dense; "auto" before the first of them where nothing else was named."""
        return self._attention.dense[0]

    @property
    def steps(self) -> list[StepAttention]:
        """The finished denoising steps, with their times in seconds."""
        return list(self._attention.steps)

    @property
    def coverage(self) -> Coverage:
        """How many self-attention calls ran structured, and how many ran dense for which reason."""
        return self._attention.coverage()

    def table(self, width: int = 100) -> str:
        """The table of the denoising steps as text of at most ``width`` columns, with the coverage below it.

        The columns of dense attention are empty unless the session was made with ``dense_every``.
        """
        steps = self.steps
        if not steps:
            return "no denoising step has ended yet"
        text = io.StringIO()
        out = Output(stdout=plain_console(text, width))
        out.show(lambda columns: step_table(steps, columns))
        out.show(step_legend(steps))
        out.say(coverage_words(self.coverage))
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines() if line.strip())

    def _end(self) -> None:
        self._undo.close()
        self._attention.release()


@contextmanager
def monarch(
    pipeline: Any,
    preset: str | os.PathLike[str] | Preset = DEFAULT_PRESET,
    *,
    dense_every: int = 0,
    dense_attention: str = AUTO,
    tuned: str | os.PathLike[str] | None = None,
    fuse: bool = False,
    dense_below: int = 0,
    **fields: Unpack[PresetFields],
) -> Iterator[MonarchSession]:
    """Run a pipeline's self-attention as a preset says; after the block, also after an error, all is as before.

    pipeline: a diffusers pipeline whose transformer is of a known family (``vmonarch models``). It may be offloaded and
        compiled, before or inside the block. Its scheduler must not be replaced inside the block.
    preset: the name of a shipped preset, the path of a TOML file, or a ``Preset``.
    dense_every: time dense attention in every n-th step, on one layer's tensors, outside the step's own time; 0 never.
    dense_attention: what computes the calls that run dense, a name of ``vmonarch_kernels.dense_attention``; "auto" is
        the expected fastest of all that are installed and fit the first such call.
    tuned: a file that ``vmonarch tune`` made of this model for this preset; its layers are on where attention is
        structured, off where it is dense, and taken out again afterwards. Load the pipeline with ``from_pretrained``.
    fuse: run what a block does between its products in fused passes, of Triton on a GPU and of torch elsewhere, until
        the block ends. The pipeline must not be offloaded yet.
    dense_below: calls of fewer tokens run dense, which on a GPU is faster where tokens are few; 0 none.
    fields: fields of the preset to change, such as ``dense_steps=2``.

    Raises InputError for ``fuse`` with blocks that have no fused form, or whose forward was replaced; ModelError for a
    pipeline of an unknown family and for one whose attention is replaced already, PresetError for a preset, field or
    name of dense attention, or a ``fuse`` or number, that is not valid, and ModelError for an adapter of other weights
    or with another preset. A call raises DenseUnavailable (a ValueError) when the dense attention that was named cannot
    run.
    """
    how: dict[str, Any] = {"dense_every": dense_every, "dense_attention": dense_attention, "tuned": tuned}
    session = enable_monarch(pipeline, preset, **how, fuse=fuse, dense_below=dense_below, **fields)
    try:
        yield session
    finally:
        if vars(pipeline).get(_OURS) is session:
            disable_monarch(pipeline)


def enable_monarch(
    pipeline: Any,
    preset: str | os.PathLike[str] | Preset = DEFAULT_PRESET,
    *,
    dense_every: int = 0,
    dense_attention: str = AUTO,
    tuned: str | os.PathLike[str] | None = None,
    fuse: bool = False,
    dense_below: int = 0,
    **fields: Unpack[PresetFields],
) -> MonarchSession:
    """Replace a pipeline's self-attention until ``disable_monarch``; arguments and errors are those of ``monarch``."""
    chosen = _preset(preset, dict(fields))
    for name, count in (("dense_every", dense_every), ("dense_below", dense_below)):
        if type(count) is not int or count < 0:
            raise PresetError(f"{name} takes a whole number from 0, got {shown(count)}")
    if type(fuse) is not bool:
        raise PresetError(f"fuse takes True or False, got {shown(fuse)}")
    if dense_attention not in DENSE_NAMES:
        raise PresetError(f"dense_attention takes {', '.join(DENSE_NAMES)}, got {shown(dense_attention)}")
    if tuned is not None and not isinstance(tuned, str | os.PathLike):
        raise ModelError(f"tuned takes the path of an adapter's file, got {type(tuned).__name__}")
    if not hasattr(pipeline, "scheduler"):
        raise ModelError(f"{type(pipeline).__name__} is no diffusers pipeline with a transformer and a scheduler")
    with ExitStack() as undo:
        for transformer in transformers_of(pipeline) if fuse else ():
            undo.enter_context(fused(transformer, "auto"))
        adapter = None if tuned is None else undo.enter_context(with_tuned(pipeline, os.fspath(tuned), chosen))
        how: dict[str, Any] = {"sample_dense_every": dense_every, "dense": (dense_attention,), "adapter": adapter}
        attention = undo.enter_context(swapped(pipeline, chosen, **how, small=SmallCalls(dense_below)))
        session = MonarchSession(attention, undo.pop_all())
    setattr(pipeline, _OURS, session)
    return session


def disable_monarch(pipeline: Any) -> MonarchSession:
    """Put a pipeline's own attention back; returns the session, whose figures stay. ModelError without one."""
    session = getattr(pipeline, "__dict__", {}).get(_OURS)
    if not isinstance(session, MonarchSession):
        raise ModelError(f"the attention of this {type(pipeline).__name__} is its own: there is nothing to disable")
    delattr(pipeline, _OURS)
    session._end()
    return session


def _preset(preset: str | os.PathLike[str] | Preset, fields: dict[str, Any]) -> Preset:
    if isinstance(preset, str):
        found = load_preset(preset)
    elif isinstance(preset, os.PathLike):
        found = read_preset(user_path(str(preset), "preset file", PresetError))
    elif isinstance(preset, Preset):
        found = preset
    else:
        raise PresetError(f"preset takes a name, a path or a Preset, got {type(preset).__name__}")
    return apply_overrides(found, {name: (f"monarch(..., {name}=)", value) for name, value in fields.items()})
