"""Files of strangers: what is no regular file, too large, too deep, too long or not text is refused in one sentence."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from vmonarch_cli.errors import InputError, PresetError
from vmonarch_cli.text import printable
from vmonarch_cli.untrusted.files import (
    limited,
    read_bytes,
    read_json,
    read_text,
    read_toml,
    regular_bytes,
    require_regular,
    user_path,
)
from vmonarch_cli.untrusted.values import Malformed, parse_json, parse_text, parse_toml
from vmonarch_cli.untrusted.yaml_nodes import parse_yaml, yaml_scalar

ODD_SPLIT = '"\\ud83d \\ude00"'
DEEP = 100_000


@pytest.fixture
def odd_files(tmp_path: Path) -> dict[str, Path]:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "socket"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    return {
        "a pipe": tmp_path / "pipe",
        "a socket": tmp_path / "socket",
        "a folder": tmp_path / "folder",
        "a device": Path("/dev/zero"),
        "symbolic links": tmp_path / "loop",
        "name too long": tmp_path / ("x" * 256),
        "no file has such a name": tmp_path / "a\0b",
        "does not exist": tmp_path / "none",
    }


def test_only_regular_files_are_read(odd_files: dict[str, Path]) -> None:
    for reason, path in odd_files.items():
        with pytest.raises(PresetError) as raised:
            read_bytes(path, "preset file x.toml", PresetError)
        assert raised.value.message.startswith("preset file x.toml ")
        assert reason in raised.value.message.lower()
        with pytest.raises(InputError) as raised_too:
            require_regular(path, "weights x")
        assert reason in raised_too.value.message.lower()


def test_a_file_above_the_limit_is_refused_and_one_at_the_limit_is_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 2048)
    assert read_bytes(tmp_path / "a", "file a", limit=2048) == b"x" * 2048
    with pytest.raises(InputError, match=r"^file a is larger than 1 KiB$"):
        read_bytes(tmp_path / "a", "file a", limit=1024)
    with (tmp_path / "a").open("rb") as stream, pytest.raises(Malformed, match="larger than 1 KiB"):
        limited(stream.read, 1024)


def test_a_caller_may_say_what_a_missing_file_means(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^there is no record here$"):
        read_json(tmp_path / "a.json", "record a.json", missing="there is no record here")


def test_a_pipe_of_the_shell_is_read_where_a_caller_takes_one() -> None:
    reading, writing = os.pipe()
    os.write(writing, b"a prompt\n")
    os.close(writing)
    path = Path(f"/dev/fd/{reading}")
    with pytest.raises(Malformed, match="is a pipe"):
        regular_bytes(path)
    assert regular_bytes(path, shell_pipes=True) == b"a prompt\n"
    os.close(reading)


def test_text_is_utf8_without_nul(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\ntwo")
    assert read_text(path, "file a.txt") == "one\ntwo"
    for content, sentence in (
        (b"one\n\xff", "file a.txt line 2: is not UTF-8 text"),
        (b"one\n\ntwo\0", "file a.txt line 3: holds a NUL character"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError) as raised:
            read_text(path, "file a.txt")
        assert raised.value.message == sentence
    assert parse_text(b"\xf0\x9f\x98\x80") == "\U0001f600"


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ('{"a": 1,\n}', 2, "not valid JSON"),
        ('{"a":\n' + "9" * 5000 + "}", 2, "more than 100 digits"),
        ('{"a":\n0.' + "1" * 5000 + "}", 2, "more than 100 digits"),
        ('{"a":\n\n1e999}', 3, "too large"),
        ('{"a":\nNaN}', 2, "NaN is not JSON"),
        ('{"a":\n-Infinity}', 2, "-Infinity is not JSON"),
        ('{"a":\n"\\u0000"}', 2, "NUL"),
        ('{"a": 1,\n"\\ud800": 2}', 2, "half of a surrogate pair"),
        (ODD_SPLIT, 1, "half of a surrogate pair"),
        ("[" * DEEP, None, "nested too deeply"),
        ("[" * 70 + "]" * 70, None, "nested too deeply"),
        ('{"a":' * 70 + "1" + "}" * 70, None, "nested too deeply"),
    ],
)
def test_json(text: str, line: int | None, reason: str) -> None:
    with pytest.raises(Malformed) as raised:
        parse_json(text)
    assert raised.value.line == line
    assert reason in raised.value.reason


def test_json_that_is_well_formed() -> None:
    assert parse_json('{"a": [1, -2.5, 1e3, "\\ud83d\\ude00", true, null]}') == {
        "a": [1, -2.5, 1000.0, "\U0001f600", True, None]
    }
    assert parse_json('{"a": 1, "a": 2}', pairs=tuple) == (("a", 1), ("a", 2))
    assert parse_json("[Infinity, -Infinity]", constants=True) == [float("inf"), float("-inf")]
    with pytest.raises(Malformed, match="NUL"):
        parse_json('{"a": "\\u0000"}', pairs=tuple)


@pytest.mark.parametrize(
    ("text", "line", "reason", "syntax"),
    [
        ("a = 1\nb = = 2", None, "line 2", True),
        ("a = 1\nb = " + "9" * 5000, 2, "more than 100 digits", False),
        ("a = 1\nb = " + "9" * 200, 2, "more than 100 digits", False),
        ("a = 1\nb = 0x" + "f" * 6000, 2, "more than 100 digits", False),
        ("a = 1\nb = 0b" + "1" * 6000, 2, "more than 100 digits", False),
        ("a = 1\nb = 0." + "1" * 6000, 2, "more than 100 digits", False),
        ("a = 1\nb = 1e999", 2, "too large", False),
        ('a = 1\nb = "\\u0000"', 2, "NUL", False),
        ("a = " + "[" * DEEP, None, "nested too deeply", False),
        ("a = " + "[" * 70 + "]" * 70, None, "nested too deeply", False),
        ("a" + ".a" * 70 + " = 1", None, "nested too deeply", False),
    ],
)
def test_toml(text: str, line: int | None, reason: str, syntax: bool) -> None:
    with pytest.raises(Malformed) as raised:
        parse_toml(text)
    assert (raised.value.line, raised.value.syntax) == (line, syntax)
    assert reason in raised.value.reason


def test_toml_that_is_well_formed(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('a = 0x10\nb = 1_000.5\nc = inf\nd = "\\u00e9"')
    assert read_toml(tmp_path / "a.toml", "preset") == {"a": 16, "b": 1000.5, "c": float("inf"), "d": "é"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", 42),
        ("-7", -7),
        ("0", 0),
        ("042", "042"),
        ("1:30", "1:30"),
        ("0x1F", "0x1F"),
        ("0o17", "0o17"),
        ("0b11", "0b11"),
        ("1_000", "1_000"),
        ("1:30.5", "1:30.5"),
        ("2.5", 2.5),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("04.5", "04.5"),
        (".inf", ".inf"),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("2025-11-28", "2025-11-28"),
        ("~", None),
        ("", None),
        ("'42'", "42"),
        ('"\\ud83d\\ude00"', "\U0001f600"),
        ("!!str 42", "42"),
        ("!!int 42", 42),
    ],
)
def test_yaml_scalars_are_what_their_text_looks_like(text: str, value: object) -> None:
    root = parse_yaml(f"- {text}")
    assert root is not None
    found = yaml_scalar(root.value[0])
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "text",
    ["!!int 042", "!!int 0x1F", "!!float 1:30", "!!timestamp 2025-11-28", "!!python/name:os.system x", "!str x"],
)
def test_a_yaml_tag_makes_no_other_value(text: str) -> None:
    root = parse_yaml(f"- a\n- {text}")
    assert root is not None
    with pytest.raises(Malformed, match="does not fit its tag") as raised:
        yaml_scalar(root.value[1])
    assert raised.value.line == 2


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ('- red\n- "\\UFFFFFFFF"', 2, "a character that does not exist"),
        ('- red\n- blue\n- "\\U00110000"', 3, "a character that does not exist"),
        ("- red\n- {", 2, "not valid YAML"),
        ("- red\n- a\0b", 2, "a character that YAML does not allow"),
        ("[" * DEEP, None, "nested too deeply"),
    ],
)
def test_yaml_that_does_not_parse(text: str, line: int | None, reason: str) -> None:
    with pytest.raises(Malformed) as raised:
        parse_yaml(text)
    if line is not None:
        assert raised.value.line == line
    assert reason in raised.value.reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('- red\n- "\\ud800"', "half of a surrogate pair"),
        ('- red\n- "a\\0b"', "NUL"),
        ("- red\n- " + "9" * 5000, "more than 100 digits"),
        ("- red\n- 0." + "9" * 5000, "more than 100 digits"),
        ("- red\n- 1e999", "too large"),
        ("- red\n- [1]", "a list or mapping"),
    ],
)
def test_yaml_scalars_that_are_not_taken(text: str, reason: str) -> None:
    root = parse_yaml(text)
    assert root is not None
    with pytest.raises(Malformed, match=reason) as raised:
        yaml_scalar(root.value[1])
    assert raised.value.line == 2


def test_paths_that_no_file_system_holds() -> None:
    for text, reason in (("a\0b", "NUL"), ("\ud800/b", "surrogate"), ("~nosuchuser/a", "home folder of a user")):
        with pytest.raises(InputError, match=reason) as raised:
            user_path(text, "image")
        assert printable(raised.value.message) == raised.value.message
    assert user_path("~/a", "image") == Path.home() / "a"


def test_text_that_could_steer_a_terminal_is_shown_as_escapes() -> None:
    assert printable("\x1b[31mX\x1b]0;pwned\x07") == "\\x1b[31mX\\x1b]0;pwned\\x07"
    assert printable("a\u202eb\ud800\x00\x9b") == "a\\u202eb\\ud800\\x00\\x9b"
    assert printable("猫 [/red]\n\té") == "猫 [/red]\n\té"
