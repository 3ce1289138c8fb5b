"""Write FAMILIES.md beside this file: every family, with a tick for each test that it passed just now.

Run it from the repository root: ``python tests/models/table.py``.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
COLUMNS = {
    "test_exact_equals_the_stock_pipeline": "exact = stock",
    "test_paper_is_structured_in_every_self_attention_layer_and_nowhere_else": "paper structured in all layers",
    "test_reference_and_torch_implementations_agree": "reference = torch",
    "test_everything_is_put_back_to_the_bit": "restored to the bit",
    "test_a_run_makes_the_frames_of_the_pipelines_own_call": "run = pipeline's frames",
    "test_a_folder_describes_itself": "folder described",
    "test_offload_changes_nothing_but_where_weights_are": "offload",
    "test_two_processes_equal_one": "two processes",
}


class Collector:
    """A pytest plugin: outcome of every test that has a family's name in its parameters."""

    def __init__(self) -> None:
        self.outcomes: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))

    def pytest_runtest_logreport(self, report: Any) -> None:
        match = re.search(r"::(\w+)\[(.+)\]$", report.nodeid)
        if match is None or match[1] not in COLUMNS or (report.when != "call" and report.passed):
            return
        family = re.sub(r"-(model|group)$", "", match[2])
        self.outcomes[family][match[1]].append(report.passed)


def main() -> int:
    """Run the tests and write the table; pytest's exit code."""
    collector = Collector()
    code = pytest.main([str(HERE / "test_families.py"), str(HERE / "test_setup.py"), "-q"], plugins=[collector])
    lines = [
        "# Families and the tests they pass",
        "",
        "Written by `python tests/models/table.py`; a dot is a test that does not take the family.",
        "",
        "| family | " + " | ".join(COLUMNS.values()) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for family, outcomes in collector.outcomes.items():
        cells = ["·" if test not in outcomes else "✓" if all(outcomes[test]) else "✗" for test in COLUMNS]
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    (HERE / "FAMILIES.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
