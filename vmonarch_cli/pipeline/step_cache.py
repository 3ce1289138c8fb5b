"""Step caches of diffusers: one state for every guidance branch, and a fresh one for every clip."""

from __future__ import annotations

from typing import Any

_BROADCAST = "pyramid_attention_broadcast"


def separate_branches(transformer: Any) -> None:
    """Give pyramid attention broadcast a state for each guidance branch.

    Its hooks have one state for all forwards: with two forwards in a step the second would always get the attention of
    the first, and a forward of another batch would get a tensor that does not fit.
    """
    from diffusers.hooks.hooks import HookRegistry, StateManager
    from diffusers.hooks.pyramid_attention_broadcast import PyramidAttentionBroadcastState

    class BranchStates(StateManager):  # type: ignore[misc]
        """Stands in for the one state: the running forward's, which the pipeline names by ``cache_context``.

        Pipelines that name none have one forward in a step.
        """

        def _state(self) -> Any:
            name = "" if self._context is None else self._context.name
            return self._state_cache.setdefault(name, PyramidAttentionBroadcastState())

        @property
        def iteration(self) -> int:
            count: int = self._state().iteration
            return count

        @iteration.setter
        def iteration(self, value: int) -> None:
            self._state().iteration = value

        @property
        def cache(self) -> Any:
            return self._state().cache

        @cache.setter
        def cache(self, value: Any) -> None:
            self._state().cache = value

    for module in transformer.modules():
        registry: HookRegistry | None = getattr(module, "_diffusers_hook", None)
        hook = None if registry is None else registry.get_hook(_BROADCAST)
        if hook is not None:
            hook.state = BranchStates(PyramidAttentionBroadcastState)


def forget(pipeline: Any) -> None:
    """Empty the caches of a pipeline's transformers: a clip that was stopped leaves its state behind."""
    for name in ("transformer", "transformer_2"):
        transformer = getattr(pipeline, name, None)
        if transformer is not None and getattr(transformer, "is_cache_enabled", False):
            transformer._reset_stateful_cache()
