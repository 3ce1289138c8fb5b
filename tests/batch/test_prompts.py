"""Files of prompts: what each format may say, and that anything wrong is one sentence with its line."""

from __future__ import annotations

import csv
import io
import json
import string
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vmonarch_cli.batch.lines import LINE_FIELDS, Line
from vmonarch_cli.batch.prompts import FORMATS, parse_prompts, read_prompts
from vmonarch_cli.errors import InputError, InputErrors


def parse(text: str | bytes, format: str) -> list[Line]:
    return parse_prompts(text.encode() if isinstance(text, str) else text, format, "p").checked()


def errors(text: str | bytes, format: str) -> list[str]:
    with pytest.raises(InputErrors) as caught:
        parse(text, format)
    assert caught.value.exit_code == 2
    return list(caught.value.sentences)


def test_txt_has_a_prompt_a_line() -> None:
    assert parse("\ufeff# comment\r\n\r\n a cat \r\n  # another\na dog, # not one", "txt") == [
        Line(3, {"prompt": "a cat"}),
        Line(5, {"prompt": "a dog, # not one"}),
    ]


def test_csv_has_a_column_a_setting_and_empty_cells_say_nothing() -> None:
    text = 'prompt,Negative Prompt,seed,guidance,name\n"a cat, ""big""",,7,4.5,x\n\n"two\nlines",bad,,,\nlast\n'
    assert parse(text, "csv") == [
        Line(2, {"prompt": 'a cat, "big"', "seed": 7, "guidance_scale": 4.5, "output": "x"}),
        Line(4, {"prompt": "two\nlines", "negative_prompt": "bad"}),
        Line(6, {"prompt": "last"}),
    ]


def test_jsonl_has_an_object_or_a_text_a_line() -> None:
    text = (
        '{"prompt": "a cat", "num-frames": 17, "size": "64x64", "seed": null}\n\n"a dog"\n{"prompt": "x", "steps": 3.0}'
    )
    assert parse(text, "jsonl") == [
        Line(1, {"prompt": "a cat", "num_frames": 17, "size": "64x64"}),
        Line(3, {"prompt": "a dog"}),
        Line(4, {"prompt": "x", "steps": 3}),
    ]


def test_yaml_has_a_list_of_texts_or_mappings() -> None:
    text = "# all of them\n- a cat\n- prompt: a dog\n  steps: 5\n  preset: dense\n-\n  prompt: >\n    long\n    text\n"
    assert parse(text, "yaml") == [
        Line(2, {"prompt": "a cat"}),
        Line(3, {"prompt": "a dog", "steps": 5, "preset": "dense"}),
        Line(7, {"prompt": "long text\n"}),
    ]


def test_every_field_can_be_set_in_every_structured_format() -> None:
    texts = (
        *("prompt", "negative_prompt", "size", "preset", "image", "output", "sampler", "recipe", "tuned"),
        *("transformer", "transformer_2", "last_image", "video"),
    )
    values = {
        name: "t" if name in texts else 3
        for name in LINE_FIELDS
        if name != "sigmas"  # a list, see tests/plan/test_noise_levels.py
    }
    table = io.StringIO()
    writer = csv.DictWriter(table, list(values))
    writer.writeheader()
    writer.writerow(values)
    for text, format in ((table.getvalue(), "csv"), (json.dumps(values), "jsonl"), (yaml.safe_dump([values]), "yaml")):
        (line,) = parse(text, format)
        assert line.fields == values
    assert {
        "prompt",
        "negative_prompt",
        "seed",
        "size",
        "num_frames",
        "steps",
        "guidance_scale",
        "preset",
        "output",
    } <= set(LINE_FIELDS)


@pytest.mark.parametrize(
    ("text", "format", "expected"),
    [
        ("", "txt", ["p has no prompts: it takes one per line"]),
        ("[]", "yaml", ["p has no prompts: it takes one per item"]),
        (b"a cat\na \xff dog", "txt", ["p line 2: is not UTF-8 text"]),
        ("seed\n1\n", "csv", ["p line 1: is the header of the CSV and has no column 'prompt'"]),
        ("prompt,prompt\nx,y\n", "csv", ["p line 1: prompt is given twice"]),
        ("prompt,seed\nx,y,z\n", "csv", ["p line 2: has 3 cells, and the header names 2 columns"]),
        (
            "prompt,seed,steps\na,x,2\nb,1,2.5\nc,1,1\n",
            "csv",
            ["p line 2: seed takes a whole number, got 'x'", "p line 3: steps takes a whole number, got '2.5'"],
        ),
        ('prompt\n"open\n', "csv", ["p line 2: is not valid CSV: unexpected end of data"]),
        (
            '{"prompt": 3}\n{"prompt"\n[1]\n{"prompt": "a", "seed": true}\n'
            '{"prompt": "a", "prompt": "b"}\n{"seed": NaN}',
            "jsonl",
            [
                "p line 1: prompt takes a text, got 3",
                "p line 2: is not valid JSON: Expecting ':' delimiter at column 10",
                "p line 3: takes an object with a prompt, or a text, got a list",
                "p line 4: seed takes a whole number, got true",
                "p line 5: prompt is given twice",
                "p line 6: is not valid JSON: NaN is not JSON",
            ],
        ),
        ("prompt: a cat", "yaml", ["p line 1: takes a list, in which each item is a prompt or a clip's settings"]),
        ("- a\n- [b]\n- prompt: {c: d}\n- no\n", "yaml", [
            "p line 2: takes a text or a number here, got a list or mapping",
            "p line 3: takes a text or a number here, got a list or mapping",
            "p line 4: takes an object with a prompt, or a text, got false",
        ]),
        ("- a\n- 'open\n", "yaml", ["p line 3: is not valid YAML: found unexpected end of stream"]),
        ("- a\n- b\x07\n", "yaml", ["p line 2: holds a character that YAML does not allow"]),
        ("- !!python/object:os.system x\n", "yaml", None),
        ("- 2001-99-99\n", "yaml", None),
        ("- !!timestamp y\n", "yaml", None),
        ("[" * 5000, "yaml", None),
        ("[" * 100000, "jsonl", None),
        ('{"prompt": "a", "seed": ' + "9" * 5000 + "}", "jsonl", None),
        (
            '{"prompt": "a", "device": "cpu"}',
            "jsonl",
            ["p line 1: device is the same for all clips of a batch: give it as a flag"],
        ),
        ('{"promt": "a"}', "jsonl", None),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_for_every_line(text: str | bytes, format: str, expected: list[str] | None) -> None:
    found = errors(text, format)
    assert expected is None or found == expected
    assert all(sentence.startswith("p") and len(sentence) < 1500 for sentence in found)


def test_aliases_in_yaml_do_not_explode() -> None:
    bomb = "- &a x\n" + "".join(
        f"- &{b} [*{a}, *{a}, *{a}, *{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    assert len(errors(bomb, "yaml")) == 8


def test_files_and_formats(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("- a cat\n")
    assert read_prompts(str(path)).checked() == [Line(1, {"prompt": "- a cat"})]
    assert read_prompts(str(path), "yaml").checked() == [Line(1, {"prompt": "a cat"})]
    for source, format, words in (
        (str(tmp_path / "q.txt"), None, "does not exist"),
        (str(tmp_path), "txt", "is a folder, not a file"),
        (str(tmp_path), None, "is a folder, not a file"),
        ("p.doc", None, "valid endings are .txt"),
        ("p\0.txt", None, "holds a NUL character"),
        (str(path), "xml", "--prompts-format takes txt, csv, jsonl, yaml, got 'xml'"),
    ):
        with pytest.raises(InputError, match="(?s)" + words.replace(".", r"\.")) as caught:
            read_prompts(source, format)
        assert "\n" not in caught.value.message


# Any text at all gives lines or sentences, never another exception

SEEDS = [
    'prompt,seed\n"a",1\n',
    '{"prompt": "a", "seed": 1}\n',
    "- prompt: a\n  seed: 1\n- b\n",
    "- &a [*a]\n",
    "- !!int x\n- !!float .\n- !!timestamp y\n- !!binary z\n- !!set {a}\n",
    "? - a\n",
    "- 1:60:60\n- 0b\n- 0x\n- 1_000\n",
]
structured = st.text(
    alphabet=string.ascii_letters[:6] + "0123456789{}[]\":,-_#&*!|>%@?'\\.\n\r\t \0\u2028é", max_size=80
)
damaged = st.builds(
    lambda seed, at, piece: seed[: at % (len(seed) + 1)] + piece + seed[at % (len(seed) + 1) :],
    st.sampled_from(SEEDS),
    st.integers(0, 1000),
    structured,
)


@settings(max_examples=400, deadline=None)
@given(text=st.one_of(damaged, structured, st.text(max_size=60)), format=st.sampled_from(FORMATS))
@example(text="- 1" + "0" * 5000, format="yaml")
@example(text="- =\n- <<\n- {<<: a}\n", format="yaml")
@example(text="prompt\n" + "x" * 200_000, format="csv")
@example(text='{"prompt": "a", "guidance": 1e999}', format="jsonl")
@example(text='{"prompt": "\\ud800"}', format="jsonl")
def test_malformed_files_are_sentences(text: str, format: str) -> None:
    content = text.encode("utf-8", "surrogatepass")
    try:
        lines = parse_prompts(content, format, "p").checked()
    except InputErrors as error:
        assert error.exit_code == 2
        assert error.sentences
        assert all(sentence.startswith("p ") for sentence in error.sentences)
    else:
        assert lines
        assert all(set(line.fields) <= set(LINE_FIELDS) for line in lines)


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=80), format=st.sampled_from(FORMATS))
def test_bytes_are_sentences_too(content: bytes, format: str) -> None:
    try:
        parse_prompts(content, format, "p").checked()
    except InputErrors as error:
        assert error.exit_code == 2
