"""Everything the family files say, put together: the known models, and the pipelines that a model may come as."""

from __future__ import annotations

from vmonarch_cli.models import (
    allegro,
    anyflow,
    cogvideox,
    cosmos,
    hunyuan,
    kandinsky,
    ltx,
    minimax,
    mochi,
    motif,
    skyreels,
    wan,
)
from vmonarch_cli.models.base import ModelEntry, PipelineFacts
from vmonarch_cli.models.demo import DEMO

_FAMILIES = (wan, skyreels, hunyuan, cogvideox, ltx, mochi, allegro, kandinsky, motif, minimax, cosmos, anyflow)

PUBLISHED: tuple[ModelEntry, ...] = tuple(entry for family in _FAMILIES for entry in family.ENTRIES)
"""The models that are on the hub."""
ENTRIES: tuple[ModelEntry, ...] = (DEMO, *PUBLISHED)
"""Every model that has a name of its own."""
PIPELINES: dict[str, PipelineFacts] = {facts.name: facts for family in _FAMILIES for facts in family.PIPELINES}
"""Class name of a diffusers pipeline -> what a run must know of it."""
