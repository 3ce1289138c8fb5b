"""README.md: its measured tables are what the records give, and no figure stands outside of them."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest
from scripts import bench_script

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
GUIDE = ROOT / "vmonarch_cli" / "cli" / "README.md"
FIGURE = re.compile(r"\d[\d.,]*\s?(?:x|ms|s|GiB|GB|MB|dB|%|seconds|minutes)\b|\d+ %")
GENERATED = re.compile(r"<!-- measured: .*?<!-- end -->", re.DOTALL)
CODE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(?:\]\(|srcset=\"|src=\")([^)\"#]+)")


@pytest.fixture(scope="module")
def readme() -> ModuleType:
    return bench_script("readme")


def test_tables_are_what_the_records_give(readme: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert readme.main(["--check"]) == 0, capsys.readouterr().err
    assert set(re.findall(r"<!-- measured: ([a-z-]+) -->", README.read_text())) == set(readme.TABLES)


def test_a_changed_figure_is_found_and_put_right(readme: ModuleType, tmp_path: Path) -> None:
    copy = tmp_path / "README.md"
    text = README.read_text()
    speedup = re.search(r"\*\*\d+\.\dx\*\*", text)
    assert speedup is not None
    copy.write_text(text.replace(speedup[0], "**99.9x**", 1))
    assert readme.main(["--check", "--readme", str(copy)]) == 1
    records = dict(readme.load(readme.HERE / "results"))
    assert readme.filled(copy.read_text(), records) == text


def test_rows_with_an_adapter_have_columns_of_their_own(
    readme: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readme, "shipped_adapters", lambda folder: [])
    records = {name: record for name, record in readme.load(readme.HERE / "results") if name != readme.LONG}
    rows = [row for row in records[readme.QUALITY]["quality"]["rows"] if not row["name"].endswith(readme.TUNED)]
    fast = next(row for row in rows if row["name"] == "fast")
    tuned = {**fast, "name": "fast, tuned", "latent_error": 0.0123, "psnr": 45.6}
    quality = {**records[readme.QUALITY]["quality"], "rows": [*rows, tuned]}
    records[readme.QUALITY] = {**records[readme.QUALITY], "quality": quality}
    lines = readme.closeness(records)
    assert "| 0.012 | 45.6\u00a0dB |" in next(line for line in lines if line.startswith("| `fast`"))
    assert next(line for line in lines if line.startswith("| `paper`")).endswith("| - | - |")
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")
    pytest.importorskip("matplotlib")
    readme.draw(records, tmp_path)


def test_an_adapter_without_a_row_shows_what_its_own_training_measured(readme: ModuleType) -> None:
    records = dict(readme.load(readme.HERE / "results"))
    rows = [row for row in records[readme.QUALITY]["quality"]["rows"] if not row["name"].endswith(readme.TUNED)]
    records[readme.QUALITY] = {
        **records[readme.QUALITY], "quality": {**records[readme.QUALITY]["quality"], "rows": rows},
    }  # fmt: skip
    after = readme.read_adapter(readme.WEIGHTS_DIR.parent / "tuned" / "paper.safetensors").evaluation["after"]
    line = next(line for line in readme.closeness(records) if line.startswith("| `paper`"))
    assert f"| {after['latent_error_mean']:.3f} | {after['psnr']:.1f}\u00a0dB |" in line


def test_longer_clips_have_columns_where_there_is_a_record_of_them(readme: ModuleType) -> None:
    records = {name: record for name, record in readme.load(readme.HERE / "results") if name != readme.LONG}
    assert "193 frames" not in readme.closeness(records)[0]
    rows = [row for row in records[readme.QUALITY]["quality"]["rows"] if row["name"] in ("paper", "fast")]
    rows = [{**row, "latent_error": 0.3456} for row in rows] + [{**rows[0], "name": "fast, tuned", "latent_error": 0.2}]
    quality = {**records[readme.QUALITY]["quality"], "size": [96, 96, 193], "rows": rows}
    records[readme.LONG] = {**records[readme.QUALITY], "quality": quality}
    lines = readme.closeness(records)
    assert lines[0].endswith("| 193 frames: error | with its adapter |")
    assert next(line for line in lines if line.startswith("| `fast`")).endswith("| 0.346 | 0.200 |")
    assert next(line for line in lines if line.startswith("| `paper`")).endswith("| 0.346 | - |")
    assert next(line for line in lines if line.startswith("| `quality`")).endswith("| - | - |")
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")


def test_no_figure_stands_outside_the_tables() -> None:
    prose = CODE.sub("", GENERATED.sub("", README.read_text()))
    assert not FIGURE.findall(prose)


def test_a_newcomer_reads_it_to_the_end() -> None:
    assert len(README.read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", [README, GUIDE], ids=["readme", "guide"])
def test_links_lead_somewhere(page: Path) -> None:
    local = [link for link in LINK.findall(page.read_text()) if not link.startswith("http")]
    assert local
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_the_plot_has_a_light_and_a_dark_side(readme: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    readme.draw(dict(readme.load(readme.HERE / "results")), tmp_path)
    corner = {}
    for name in ("overview.png", "overview-dark.png"):
        assert (ROOT / "kernels" / "bench" / name).is_file()
        with Image.open(tmp_path / name) as picture:
            corner[name] = sum(picture.convert("RGB").getpixel((0, 0)))
            assert picture.width > 2 * picture.height
    assert corner["overview.png"] > 700 > 100 > corner["overview-dark.png"]
