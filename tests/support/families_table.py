"""Write tests/families/FAMILIES.md: every family, with a tick for each test that it passed just now.

Run it from the repository root: ``python tests/support/families_table.py``. With names of families only their rows are
written anew.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from tiny_families import TINY

from vmonarch_cli.models.unfit import UNFIT

TESTS = Path(__file__).parents[1]
TABLE = TESTS / "families" / "FAMILIES.md"
PASSED, REFUSED, FAILED = "✓", "–", "✗"
COLUMNS = {
    "test_exact_equals_the_stock_pipeline": "exact = stock",
    "test_paper_is_structured_in_every_self_attention_layer_and_nowhere_else": "paper structured in all layers",
    "test_reference_and_torch_implementations_agree": "reference = torch",
    "test_everything_is_put_back_to_the_bit": "restored to the bit",
    "test_a_run_makes_the_frames_of_the_pipelines_own_call": "run = pipeline's frames",
    "test_every_part_of_a_clip_follows_its_latents": "frames follow latents",
    "test_a_folder_describes_itself": "folder described",
    "test_offload_changes_nothing_but_where_weights_are": "offload",
    "test_narrow_weights_run_and_are_close": "fp8, int8",
    "test_a_lora_changes_the_result_by_its_scale": "LoRA",
    "test_a_cache_skips_calls_that_are_counted_apart": "caches",
    "test_a_branch_is_what_it_would_be_alone": "caches by branch",
    "test_two_processes_equal_one": "two processes",
}


class Collector:
    """A pytest plugin: outcome of every test that has a family's name in its parameters."""

    def __init__(self) -> None:
        self.families: dict[str, str] = {}
        self.outcomes: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))

    def pytest_itemcollected(self, item: Any) -> None:
        if hasattr(item, "callspec") and "name" in item.callspec.params:
            self.families[item.nodeid] = item.callspec.params["name"]

    def pytest_runtest_logreport(self, report: Any) -> None:
        test = report.nodeid.split("::")[-1].split("[")[0]
        if report.nodeid not in self.families or test not in COLUMNS or (report.when != "call" and report.passed):
            return
        outcome = REFUSED if ("refused", True) in report.user_properties else PASSED
        self.outcomes[self.families[report.nodeid]][test].append(outcome if report.passed else FAILED)


def cell(outcomes: list[str]) -> str:
    """One sign for all tests of a family and a column."""
    for sign in (FAILED, PASSED, REFUSED):
        if sign in outcomes:
            return sign
    return "·"


def kept(names: list[str]) -> dict[str, str]:
    """Rows of the table as it is, by family, without those that are written anew."""
    rows = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")][1:]
    found = {row.split("|")[1].strip(): row for row in rows}
    return {family: row for family, row in found.items() if names and family in TINY and family not in names}


def main(names: list[str]) -> int:
    """Run the tests, in one process, which the collector is in, and write the table; pytest's exit code."""
    collector = Collector()
    parts = ("apply_setup", "offload", "lora", "context_parallel", "step_cache")
    files = [TESTS / "families" / "test_families.py", *(TESTS / "pipeline" / f"test_{part}.py" for part in parts)]
    chosen = ["-k", " or ".join(names)] if names else []
    code = pytest.main([*map(str, files), "-q", "-n", "0", "-m", "slow or not slow", *chosen], plugins=[collector])
    lines = [
        "# Families and the tests they pass",
        "",
        "Written by `python tests/support/families_table.py`. A dot is a test that does not take the family; "
        "a dash is what diffusers does not have for it, and its test checks the sentence that says so.",
        "",
        "| family | " + " | ".join(COLUMNS.values()) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    rows = kept(names)
    for family, outcomes in collector.outcomes.items():
        if not names or family in names:
            cells = " | ".join(cell(outcomes.get(test, [])) for test in COLUMNS)
            rows[family] = f"| {family} | {cells} |"
    lines += [rows[family] for family in TINY if family in rows]
    lines += ["", "Pipelines of diffusers that are not supported:", "", "| pipeline | why |", "|---|---|"]
    lines += [f"| {pipeline} | {why} |" for pipeline, why in UNFIT.items()]
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
