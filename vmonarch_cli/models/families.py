"""Everything the family files say, put together: the known models, and the pipelines a model may come as."""

from __future__ import annotations

from vmonarch_cli.models import allegro, cogvideox, hunyuan, kandinsky, ltx, mochi, motif, skyreels, wan
from vmonarch_cli.models.base import ModelEntry, PipelineFacts

_FAMILIES = (wan, skyreels, hunyuan, cogvideox, ltx, mochi, allegro, kandinsky, motif)

ENTRIES: tuple[ModelEntry, ...] = tuple(entry for family in _FAMILIES for entry in family.ENTRIES)
PIPELINES: dict[str, PipelineFacts] = {facts.name: facts for family in _FAMILIES for facts in family.PIPELINES}
