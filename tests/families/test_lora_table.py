"""The page of LoRA formats has every format and family that is tested, all of them with a tick."""

from __future__ import annotations

import ast

from lora_formats import NAMES, formats_of
from lora_table import ALONE, CASES, FILES, PAGE, Signs, page


def test_the_page_is_what_the_tests_would_write() -> None:
    signs: Signs = {}
    for name in NAMES:
        for form in formats_of(name):
            signs.setdefault(form, {})[name] = True
    assert PAGE.read_text(encoding="utf-8") == page(signs, dict.fromkeys(ALONE, True))


def test_what_the_page_speaks_of_are_tests() -> None:
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in FILES]
    found = {node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert found >= {CASES, *ALONE}
