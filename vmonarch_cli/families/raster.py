"""Read the grid of a clip off the positions of its tokens, which some models' forwards take in the place of a shape."""

from __future__ import annotations

import torch

from vmonarch_cli.models.base import Grid


def raster_grid(positions: torch.Tensor) -> Grid | None:
    """(T, H, W) of rows at positions (N, 3) in time, height and width that are a whole grid in raster order, else None.

    Times rise from frame to frame, heights from row to row and widths from column to column; all frames, rows and
    columns have the same.
    """
    time, height, width = positions.unbind(1)
    count = len(positions)
    per_frame = _run_length(time)
    per_row = _run_length(height[:per_frame])
    if count % per_frame or per_frame % per_row:
        return None
    grid = count // per_frame, per_frame // per_row, per_row
    axes = time[::per_frame], height[:per_frame:per_row], width[:per_row]
    if not all(bool((axis[1:] > axis[:-1]).all()) for axis in axes):
        return None
    expected = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)
    return grid if torch.equal(expected, positions) else None


def _run_length(values: torch.Tensor) -> int:
    """How many values in front are equal."""
    others = (values != values[0]).nonzero()
    return int(others[0]) if len(others) else len(values)
