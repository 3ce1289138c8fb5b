"""Draw kernel.png and frontier.png, which the guide shows, from the records in results/*.json.

    python kernels/bench/plots.py            # writes them into kernels/bench

The plots are those of `vmonarch profile kernel --plot` and `vmonarch profile quality --plot`. Records are read as
`report.py` reads them: one whose checks failed is refused. Needs matplotlib (`pip install "vmonarch[plot]"`).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from report import Record, RefusedRecord, load  # noqa: E402  (the scripts of this folder are no package)

from vmonarch_cli.profile.plot import plot_kernel, plot_quality  # noqa: E402
from vmonarch_cli.profile.quality_results import QualityProfile, QualityRow  # noqa: E402
from vmonarch_cli.profile.record import MachineFacts  # noqa: E402
from vmonarch_cli.profile.results import KernelRow, KernelShape, OutputCheck, Spread  # noqa: E402

KERNEL = "h200-kernel.json"
QUALITY = ("h200-quality-demo.json", "h200-quality-demo-193.json")
"""A panel each, of those that are there."""


def kernel_shapes(record: Record) -> list[KernelShape]:
    """The shapes of a record of `profile kernel`."""
    return [
        KernelShape(shape["frames"], shape["positions"], [_kernel_row(row) for row in shape["rows"]])
        for shape in record["shapes"]
    ]


def _kernel_row(row: Record) -> KernelRow:
    check, time = row["check"], row["time"]
    made = {"check": check and OutputCheck(**_known(OutputCheck, check)), "time": time and Spread(**time)}
    return KernelRow(**{**_known(KernelRow, row), **made})


def quality_profile(record: Record) -> QualityProfile:
    """What a record of `profile quality` measured."""
    quality = _known(QualityProfile, record["quality"])
    rows = [QualityRow(**_known(QualityRow, row)) for row in quality["rows"]]
    return QualityProfile(**{**quality, "size": tuple(quality["size"]), "grid": tuple(quality["grid"]), "rows": rows})


def _known(kind: Any, values: Record) -> Record:
    """What a dataclass holds itself; a record has figures besides that follow from it."""
    return {field.name: values[field.name] for field in fields(kind) if field.name in values}


def draw(records: dict[str, Record], folder: Path) -> None:
    """Both plots, into a folder."""
    kernel = records[KERNEL]
    settings = kernel["settings"]
    size = f"batch {settings['batch']}, {settings['heads']} heads x {settings['head_dim']}"
    plot_kernel(kernel_shapes(kernel), f"{_caption(kernel)}, {size}", folder / "kernel.png")
    drawn = [records[name] for name in QUALITY if name in records]
    plot_quality([quality_profile(record) for record in drawn], _caption(drawn[0]), folder / "frontier.png")


def _caption(record: Record) -> str:
    machine = MachineFacts(record["device"]["name"], record["versions"], record["device"])
    return f"{machine.caption()}, {record['settings']['dtype']}"


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the plots")
    arguments = parser.parse_args(argv)
    try:
        records = dict(load(arguments.results))
    except RefusedRecord as refused:
        print(f"error: {refused}", file=sys.stderr)
        return 1
    draw(records, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
