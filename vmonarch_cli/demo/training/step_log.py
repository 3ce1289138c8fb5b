"""What the steps of a training measured, logged from time to time with their speed."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vmonarch_cli.demo.training import loop


@dataclass
class StepLog:
    """Means over the steps since the last line of the log.

    Args:
        log: where the lines go.

    """

    log: loop.JsonLog
    loss: float = float("nan")
    """The mean loss of the last line."""
    _measured: list[tuple[str, dict[str, Tensor]]] = field(default_factory=list)
    _since: tuple[float, int, int] = (0.0, 0, 0)

    def start(self, step: int, clips: int) -> None:
        """Count from here on: `step` steps are done and `clips` clips seen. What was measured before is left out."""
        self._measured.clear()
        self._since = time.monotonic(), step, clips

    def add(self, kind: str, measured: dict[str, Tensor]) -> None:
        """Keep what a step measured (scalars on the device) on clips of a kind."""
        self._measured.append((kind, measured))

    def write(self, step: int, clips: int, **values: Any) -> None:
        """Log the means, and count from here on; waits for the device."""
        means = self.mean()
        began, first, first_clips = self._since
        took = time.monotonic() - began
        self.log.write(
            "step", step=step, **means, **values, seconds_per_step=took / (step - first),
            clips_per_second=(clips - first_clips) / took,
        )  # fmt: skip
        self.start(step, clips)

    def mean(self) -> dict[str, Any]:
        """Means of what is not logged yet, empty where there is nothing; waits for the device."""
        if not self._measured:
            return {}
        means = loop.mean_losses(self._measured)
        self.loss = means["loss"]
        return means
