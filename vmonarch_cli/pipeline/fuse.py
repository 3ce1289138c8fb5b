"""Swap the blocks of a transformer for their fused form, and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch

from vmonarch_cli.errors import InputError
from vmonarch_cli.families.fusing import ATTRIBUTE, Forward, FusedBlock
from vmonarch_cli.families.registry import FAMILIES
from vmonarch_cli.pipeline.parts import transformers_of
from vmonarch_cli.text import with_article


def fuse(transformer: Any, impl: str) -> None:
    """Run the arithmetic between the products of a transformer's blocks in fused passes, until `unfuse`.

    impl: "triton" or "torch", as `vmonarch_kernels.resolve_fused_impl` says. Goes before anything that wraps a
    module's forward (offloading, context parallelism, step caches), which then wraps the fused one. Raises InputError
    for a transformer whose blocks are not known, or that has something else in the place of a forward.
    """
    blocks = _blocks(transformer)
    replaced = [(module, forward) for block, facts in blocks for module, forward in _forwards(block, facts)]
    for module, _ in replaced:
        if "forward" in vars(module) and not hasattr(module, ATTRIBUTE):
            raise InputError(
                f"{with_article(type(module).__name__)} of this {_name(transformer)} has a forward of its own "
                "already: fuse before offloading, caches and context parallelism"
            )
    for module, forward in replaced:
        setattr(module, ATTRIBUTE, impl)
        if "forward" not in vars(module):
            module.forward = MethodType(forward, module)
    for block, facts in blocks:
        for path in facts.attentions:
            setattr(block.get_submodule(path), ATTRIBUTE, impl)


def unfuse(transformer: Any) -> None:
    """Give a transformer its stock blocks again; nothing to do for one that has them.

    Where something has wrapped a fused forward since, that stays and runs the class's own arithmetic.
    """
    for module in transformer.modules():
        if getattr(module, ATTRIBUTE, None) is None:
            continue
        forward = vars(module).get("forward")
        if isinstance(forward, MethodType) and getattr(forward.__func__, "fused", False):
            del module.forward
        if "forward" in vars(module):
            setattr(module, ATTRIBUTE, None)
        else:
            delattr(module, ATTRIBUTE)


def switch(pipeline: Any, impl: str | None) -> None:
    """Give the next clip of a pipeline its blocks: fused with `impl`, or (None) stock ones, to the bit.

    Fused ones only where `fuse` was before offloading and caches, which keep what they have wrapped; a compiled block
    has a graph of each.
    """
    for transformer in transformers_of(pipeline):
        if impl is None:
            unfuse(transformer)
        else:
            fuse(transformer, impl)


@contextmanager
def fused(transformer: Any, impl: str) -> Iterator[None]:
    """`fuse` for the block, `unfuse` afterwards, also after an error."""
    fuse(transformer, impl)
    try:
        yield
    finally:
        unfuse(transformer)


def fused_impl(transformer: Any) -> str | None:
    """The implementation that a transformer's fused blocks run with; None for stock blocks."""
    found = (getattr(module, ATTRIBUTE, None) for module in transformer.modules())
    return next((impl for impl in found if impl is not None), None)


def _name(transformer: Any) -> str:
    return type(getattr(transformer, "_orig_mod", transformer)).__name__


def _blocks(transformer: Any) -> list[tuple[Any, FusedBlock]]:
    name = _name(transformer)
    known = FAMILIES[name].fused if name in FAMILIES else {}
    found = [(m, known[type(m).__name__]) for m in transformer.modules() if type(m).__name__ in known]
    if not found:
        classes = ", ".join(sorted({kind for family in FAMILIES.values() for kind in family.fused}))
        raise InputError(f"this {name} has no blocks with a fused form, which are {classes}")
    return found


def _forwards(block: Any, facts: FusedBlock) -> Iterator[tuple[torch.nn.Module, Forward]]:
    """The modules of a block whose forward is replaced, and by what."""
    yield block, facts.forward
    for path, forward in facts.parts.items():
        try:
            module = block.get_submodule(path)
        except AttributeError:
            continue
        if not isinstance(module, torch.nn.Identity):
            yield module, forward
