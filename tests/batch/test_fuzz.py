"""Any prompts file at all, through the whole command: lines or sentences, never another exception."""

from __future__ import annotations

import json
import string
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from vmonarch_cli.batch.lines import LINE_FIELDS
from vmonarch_cli.batch.prompts import FORMATS
from vmonarch_cli.cli.app import app

SEEDS = [
    'prompt,seed,preset.band\n"a",1,2\n',
    '{"prompt": "a", "seed": 1, "preset": "fast"}\n',
    "- prompt: a\n  seed: 1\n- b\n",
    "- &a [*a]\n",
    "- !!int x\n- !!float .\n- !!timestamp y\n- !!binary z\n- !!set {a}\n",
    "- 1:60:60\n- 0b\n- 0x\n- 1_000\n",
]
odd = st.text(alphabet=string.ascii_letters[:6] + "0123456789{}[]\":,-_#&*!|>%@?'\\.\n\r\t \0\u2028é", max_size=80)
damaged = st.builds(
    lambda seed, at, piece: seed[: at % (len(seed) + 1)] + piece + seed[at % (len(seed) + 1) :],
    st.sampled_from(SEEDS),
    st.integers(0, 1000),
    odd,
)
values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.sampled_from(
        ["", "~nobody/x", "a\0b", "\ud800", "../x", "48x32", "fast", "x" * 300, "/dev/zero", ".", "[bold]"]
    ),
    st.text(max_size=40),
    st.lists(st.integers(), max_size=2),
)
names = st.sampled_from([*LINE_FIELDS, "preset.band", "preset.refresh", "preset.impl", "preset.no", "model", "--seed"])
objects = st.lists(st.dictionaries(names, values, max_size=5), min_size=1, max_size=4).map(
    lambda rows: "\n".join(json.dumps({"prompt": "red", **row}) for row in rows)
)
files = st.one_of(
    st.tuples(st.one_of(damaged, odd, st.text(max_size=60)), st.sampled_from(FORMATS)),
    st.tuples(objects, st.just("jsonl")),
)


def check(tmp_path: Path, text: str, format: str) -> None:
    """`generate --dry-run` of a file that says `text`."""
    file = tmp_path / "prompts"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    shape = ["--num-frames", "17", "--steps", "2", "--device", "cpu", "-o", str(tmp_path / "out")]
    command = ["generate", *shape, "--dry-run", "--quiet", "--prompts-file", str(file), "--prompts-format", format]
    result = CliRunner().invoke(app, command)
    assert result.exit_code in (0, 2), result.stderr
    assert "error: unexpected " not in result.stderr
    assert "Traceback" not in result.stderr
    if result.exit_code == 2:
        assert result.stdout == ""
        assert all(line.startswith(("error: ", "note: ", "warning: ")) for line in result.stderr.splitlines())
    assert not (tmp_path / "out").exists()


allowed = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@settings(max_examples=60, deadline=None, suppress_health_check=allowed)
@given(file=files)
@example(file=("- 1" + "0" * 5000, "yaml"))
@example(file=("- =\n- <<\n- {<<: a}\n", "yaml"))
@example(file=("prompt\n" + "x" * 200_000, "csv"))
@example(file=('{"prompt": "a", "guidance": 1e999}', "jsonl"))
@example(file=('{"prompt": "a", "flow_shift": NaN}', "jsonl"))
@example(file=('{"prompt": "\\ud800"}', "jsonl"))
def test_any_prompts_file_is_lines_or_sentences(tmp_path: Path, file: tuple[str, str]) -> None:
    check(tmp_path, *file)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None, suppress_health_check=allowed)
@given(file=files)
def test_two_thousand_prompts_files(tmp_path: Path, file: tuple[str, str]) -> None:
    check(tmp_path, *file)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("img_tilde.jsonl", '{"prompt": "red", "image": "~nobodyxx/x.png"}', "leave out image"),
        ("nul_preset.jsonl", '{"prompt": "red", "preset": "a\\u0000/b.toml"}', "preset holds a NUL character"),
        ("sur_neg.jsonl", '{"prompt": "red", "negative_prompt": "\\ud800"}', "negative_prompt is not valid UTF-8 text"),
        ("sur_preset.jsonl", '{"prompt": "red", "preset": "\\ud800/b.toml"}', "preset is not valid UTF-8 text"),
        (
            "seeds.yaml",
            "- {prompt: red, seed: 042}\n- {prompt: red, seed: 1:30}\n",
            "line 2: seed takes a whole number",
        ),
        ("yaml_U.yaml", '- red\n- "\\UFFFFFFFF"\n', "line 2: is not valid YAML"),
        ("yaml_U110000.yaml", '- red\n- blue\n- "\\U00110000"\n', "line 3: is not valid YAML"),
        ("yaml_hex_seed.yaml", f"- prompt: red\n  seed: 0x{'f' * 4000}\n", "seed takes a whole number"),
        ("nested.yaml", "- " + "[" * 20_000, "prompts"),
        ("nested.jsonl", "[" * 100_000, "nested too deeply"),
    ],
)
def test_files_that_showed_a_fault(tmp_path: Path, name: str, content: str, words: str) -> None:
    file = tmp_path / name
    file.write_text(content)
    result = CliRunner().invoke(app, ["generate", "-o", str(tmp_path / "out"), "--prompts-file", str(file), "--quiet"])
    assert (result.exit_code, result.stdout, len(result.stderr.splitlines())) == (2, "", 1), result.stderr
    assert words in result.stderr
    assert "unexpected" not in result.stderr
    assert len(result.stderr) < 600
