"""Preset files and overrides: what is accepted, and the exact sentence for what is not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from vmonarch_cli.errors import PresetError
from vmonarch_cli.presets import (
    FIELD_DOCS,
    Preset,
    apply_overrides,
    load_preset,
    parse_assignment,
    parse_preset,
    shipped_names,
)

EVIDENCE = "mine.toml: field 'evidence' takes a list of up to 50 lines of up to 500 printable characters, or \"none\", "
FIELDS = (
    "attention, num_steps, warm_start, c_floor, first_frame, band, refresh, shared_refresh, first_turns, step_refresh, "
    "layer_refresh, dense_steps, dense_layers, few_steps, impl"
)


def sentence(text: str) -> str:
    with pytest.raises(PresetError) as caught:
        parse_preset(text, source="mine.toml", stem="mine")
    return caught.value.message


def test_shipped_presets_are_the_documented_ones() -> None:
    assert shipped_names() == ["paper", "fast", "balanced", "quality", "exact", "dense"]
    fields = {name: load_preset(name) for name in shipped_names()}
    assert (fields["paper"].num_steps, fields["paper"].band, fields["paper"].warm_start) == (2, None, False)
    assert [(fields[n].warm_start, fields[n].band) for n in ("fast", "balanced", "quality")] == [(True, 0)] * 3
    assert fields["paper"].refresh == 0
    assert fields["fast"].refresh < fields["balanced"].refresh < fields["quality"].refresh
    assert fields["quality"].dense_steps > 0
    assert fields["exact"].band is not None
    assert fields["exact"].band >= 1024
    assert fields["dense"].attention == "dense"
    assert all(preset.description.endswith(".") for preset in fields.values())


def test_every_field_is_documented() -> None:
    assert set(FIELD_DOCS) == set(Preset.model_fields)


def test_a_preset_is_frozen() -> None:
    with pytest.raises(ValidationError):
        load_preset("paper").band = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("num_steps = 9", "mine.toml: field 'num_steps' takes a whole number from 1 to 8, got 9"),
        ('num_steps = "2"', "mine.toml: field 'num_steps' takes a whole number from 1 to 8, got \"2\""),
        ("num_steps = 2.0", "mine.toml: field 'num_steps' takes a whole number from 1 to 8, got 2.0"),
        ("num_steps = true", "mine.toml: field 'num_steps' takes a whole number from 1 to 8, got true"),
        ("warm_start = 1", "mine.toml: field 'warm_start' takes true or false, got 1"),
        ("c_floor = 0.0", "mine.toml: field 'c_floor' takes a number above 0 and at most 1, got 0.0"),
        ("c_floor = nan", "mine.toml: field 'c_floor' takes a number above 0 and at most 1, got nan"),
        ("band = -1", "mine.toml: field 'band' takes a whole number from 0 to 4096, or \"none\", got -1"),
        ('impl = "cuda"', 'mine.toml: field \'impl\' takes "auto", "reference", "torch" or "triton", got "cuda"'),
        ("bannd = 1", f"mine.toml: there is no field 'bannd' (did you mean band?), fields are {FIELDS}"),
        ("xyz = 1", f"mine.toml: there is no field 'xyz', fields are {FIELDS}"),
        (
            "num_steps = 0\nband = -2",
            "mine.toml: field 'num_steps' takes a whole number from 1 to 8, got 0 (and 1 more problem)",
        ),
        ("num_steps =", "mine.toml: is not valid TOML: Invalid value (at end of document)"),
    ],
)
def test_wrong_files_get_one_sentence(text: str, expected: str) -> None:
    assert sentence(text) == expected


def test_a_whole_number_is_a_valid_c_floor_and_none_is_a_valid_band() -> None:
    preset = parse_preset('c_floor = 1\nband = "none"', source="mine.toml", stem="mine")
    assert (preset.c_floor, preset.band, preset.name) == (1.0, None, "mine")


def test_unknown_names_get_near_matches() -> None:
    with pytest.raises(PresetError) as caught:
        load_preset("blanced")
    assert caught.value.message == (
        "there is no preset 'blanced' (did you mean balanced?): shipped are paper, fast, balanced, quality, exact, "
        "dense, and a path to a .toml file works too"
    )


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(PresetError, match=r"preset file .*none\.toml does not exist"):
        load_preset(str(tmp_path / "none.toml"))
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PresetError, match="is not UTF-8 text"):
        load_preset(str(binary))
    with pytest.raises(PresetError, match="is a folder, not a file"):
        load_preset(f"{tmp_path}/")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("band=1", ("band", 1)),
        ("band = none", ("band", "none")),
        ("dense-steps=4", ("dense_steps", 4)),
        ("impl=triton", ("impl", "triton")),
        ('impl="triton"', ("impl", "triton")),
        ("warm_start=True", ("warm_start", True)),
        ("c_floor=0.5", ("c_floor", 0.5)),
    ],
)
def test_assignments(text: str, expected: tuple[str, Any]) -> None:
    assert parse_assignment(text) == expected


@pytest.mark.parametrize("text", ["band", "=1", "band=", ""])
def test_assignments_that_are_none(text: str) -> None:
    with pytest.raises(PresetError) as caught:
        parse_assignment(text)
    assert caught.value.message == f"--set: '{text}' is not of the form field=value; fields are {FIELDS}"


def test_overrides_are_validated_like_files() -> None:
    paper = load_preset("paper")
    assert apply_overrides(paper, {"band": ("--set", 1)}).band == 1
    assert apply_overrides(load_preset("fast"), {"band": ("--set", "none")}).band is None
    with pytest.raises(PresetError) as caught:
        apply_overrides(paper, {"band": ("--set", 5000)})
    assert caught.value.message == "--set: field 'band' takes a whole number from 0 to 4096, or \"none\", got 5000"
    with pytest.raises(PresetError, match="--set: field 'name' is a label and cannot be overridden"):
        apply_overrides(paper, {"name": ("--set", "x")})


@given(st.text(max_size=200))
def test_any_text_is_a_preset_or_one_sentence(text: str) -> None:
    try:
        parse_preset(text, source="x.toml", stem="x")
    except PresetError as error:
        assert error.message.startswith("x.toml: ")
        assert error.exit_code == 2


@given(st.text(max_size=60))
def test_any_override_is_taken_or_one_sentence(text: str) -> None:
    try:
        name, value = parse_assignment(text)
        apply_overrides(load_preset("paper"), {name: ("--set", value)})
    except PresetError as error:
        assert error.message.startswith("--set: ")


# Values of strangers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("num_steps = " + "9" * 200, "mine.toml line 1: holds a number of more than 100 digits"),
        ("num_steps = " + "9" * 5000, "mine.toml line 1: holds a number of more than 100 digits"),
        ("num_steps = 0x" + "f" * 5000, "mine.toml line 1: holds a number of more than 100 digits"),
        ("band = " + "[" * 500 + "]" * 500, "mine.toml: is nested too deeply"),
        (
            'name = "\\u001b[31mX"',
            "mine.toml: field 'name' takes 1 to 60 printable characters without brackets, got \"\x1b[31mX\"",
        ),
        (
            'name = "[/red]"',
            "mine.toml: field 'name' takes 1 to 60 printable characters without brackets, got \"[/red]\"",
        ),
        (
            'evidence = ["fine", "a\\u001bb"]',
            EVIDENCE + 'got ["fine", "a\x1bb"]',
        ),
        (
            "evidence = 3",
            EVIDENCE + "got 3",
        ),
    ],
)
def test_hostile_values_get_one_sentence(text: str, expected: str) -> None:
    assert sentence(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("num_steps=" + "9" * 5000, "--set: the value of 'num_steps' holds a number of more than 100 digits"),
        ("num_steps=0x" + "f" * 5000, "--set: the value of 'num_steps' holds a number of more than 100 digits"),
        ("band=" + "[" * 500 + "]" * 500, "--set: the value of 'band' is nested too deeply"),
        ('impl="\\u0000"', "--set: the value of 'impl' holds a NUL character"),
    ],
)
def test_hostile_assignments_get_one_sentence(text: str, expected: str) -> None:
    with pytest.raises(PresetError) as caught:
        parse_assignment(text)
    assert caught.value.message == expected


def test_an_assignment_is_one_value() -> None:
    assert parse_assignment("band=1\nimpl='torch'") == ("band", "1\nimpl='torch'")


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/null/x.toml", "a\0/b.toml", "\ud800/b.toml", "~nosuchuser/b.toml"])
def test_paths_that_are_no_preset(name: str) -> None:
    with pytest.raises(PresetError) as caught:
        load_preset(name)
    assert len(caught.value.message.splitlines()) == 1


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    with pytest.raises(PresetError, match="is a pipe, not a file"):
        load_preset(str(tmp_path / "pipe.toml"))


def test_evidence_is_kept_and_changes_nothing_of_what_is_computed() -> None:
    told = parse_preset('evidence = ["demo: 0.1"]\nrefresh = 2', source="mine.toml", stem="mine")
    assert told.evidence == ("demo: 0.1",)
    assert told.computed_fields() == parse_preset("refresh = 2", source="other.toml", stem="other").computed_fields()
    with pytest.raises(PresetError, match="'evidence' is a label and cannot be overridden"):
        apply_overrides(told, {"evidence": ("--set", "none")})
