"""Write tests/families/LORAS.md: every way to write a LoRA, with a tick for each family that it changed rightly.

Run it from the repository root: ``python tests/support/lora_table.py``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]
CASES = "test_a_format_gives_what_diffusers_own_gives"
ALONE = {
    "test_a_parameter_that_is_changed_outright": "`.diff`, `.diff_b`, `.diff_m`: weights, biases, norms, modulation, "
    "the patch embedding",
    "test_a_dora_is_what_peft_makes_of_it": "DoRA (`.dora_scale`, `lora_magnitude_vector`)",
    "test_alpha_and_rank_are_applied": "`.alpha` beside the pairs, or alpha and rank in the metadata",
    "test_every_way_to_write_a_lora_gives_the_same_latents": "files of some layers only, kohya's among them",
    "test_one_of_two_transformers_is_chosen_by_a_word_or_a_name": "`high:`, `low:`, HIGH and LOW files",
    "test_a_lora_of_the_second_transformer_goes_there": "`transformer_2.`",
    "test_peft_settings_beside_a_file_are_applied": "`adapter_config.json` beside the file",
    "test_a_file_inside_a_repository_is_named": "a file inside a repository of the hub: `OWNER/NAME/FILE.safetensors`",
    "test_what_is_not_supported_is_named": "one sentence that names it: LoHa, LoKr, parts of a text encoder",
}
"""Tests of one family, Wan, and what they show."""
FILES = (
    TESTS / "families" / "test_lora_formats.py",
    TESTS / "pipeline" / "test_lora_formats.py",
    TESTS / "pipeline" / "test_lora_parameters.py",
    TESTS / "models" / "test_lora_files.py",
)
PAGE = TESTS / "families" / "LORAS.md"
Signs = dict[str, dict[str, bool]]
"""Format -> family -> whether it changes the latents as it should."""


class Collector:
    """A pytest plugin: outcome of every test, by name and parameters."""

    def __init__(self) -> None:
        self.parameters: dict[str, dict[str, Any]] = {}
        self.passed: dict[str, bool] = {}

    def pytest_itemcollected(self, item: Any) -> None:
        self.parameters[item.nodeid] = dict(item.callspec.params) if hasattr(item, "callspec") else {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.passed[report.nodeid] = self.passed.get(report.nodeid, True) and bool(report.passed)


def page(signs: Signs, alone: dict[str, bool]) -> str:
    """The text of the page; `alone`: whether each test of ALONE passed."""
    families = list(dict.fromkeys(name for row in signs.values() for name in row))
    rows = [[form, *(_sign(row.get(name)) for name in families)] for form, row in signs.items()]
    lines = [
        "# Formats of LoRA files and the families they were tried in",
        "",
        "Written by `python tests/support/lora_table.py`. A tick: the file changes the latents as the same weights in "
        "diffusers' own format do. A dot: the model's own code names layers as diffusers does, or diffusers has no "
        "table of its names.",
        "",
        "| format | " + " | ".join(families) + " |",
        "|---" * (len(families) + 1) + "|",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        "| beside the pairs of matrices (Wan) | |",
        "|---|---|",
        *(f"| {words} | {_sign(alone.get(test, False))} |" for test, words in ALONE.items()),
    ]
    return "\n".join(lines) + "\n"


def _sign(passed: bool | None) -> str:
    return "·" if passed is None else "✓" if passed else "✗"


def main() -> int:
    """Run the tests, in one process, which the collector is in, and write the table; pytest's exit code."""
    collector = Collector()
    code = pytest.main([*map(str, FILES), "-q", "-n", "0", "-m", "slow or not slow"], plugins=[collector])
    signs: Signs = {}
    alone: dict[str, bool] = {}
    for node, passed in collector.passed.items():
        test, given = node.split("::")[-1].split("[")[0], collector.parameters[node]
        if test == CASES:
            signs.setdefault(given["form"], {})[given["name"]] = passed
        elif test in ALONE:
            alone[test] = alone.get(test, True) and passed
    PAGE.write_text(page(signs, alone), encoding="utf-8")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
