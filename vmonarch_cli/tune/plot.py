"""The plot of the loss, with matplotlib, which is an optional extra."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

_SMOOTH = 0.9
_COLOUR = "#0072B2"


def plot_losses(losses: Sequence[float], caption: str, path: Path) -> None:
    """Loss over steps, every step as a dot and a moving average as a line."""
    import matplotlib
    from matplotlib.figure import Figure

    smooth: list[float] = []
    for loss in losses:
        smooth.append(loss if not smooth else _SMOOTH * smooth[-1] + (1 - _SMOOTH) * loss)
    steps = range(1, len(losses) + 1)
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axis = figure.subplots()
    axis.plot(steps, losses, ".", color="#999999", markersize=3, label="step")
    axis.plot(steps, smooth, color=_COLOUR, linewidth=1.4, label="moving average")
    axis.set_yscale("log")
    axis.set_xlabel("step of training")
    axis.set_ylabel("relative squared difference of velocities")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.legend(frameon=False, fontsize=8)
    figure.supxlabel(caption, fontsize=7, color="#777777", x=0.01, ha="left")
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(path, dpi=160)
