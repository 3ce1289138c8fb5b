"""What the program prints and writes is what was recorded; `record.py` says how, and how to record it anew."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
GROUPS = sorted(path.stem for path in (HERE / "expected").glob("*.json") if path.stem != "environment")
SLOW_GROUPS = ("doctor",)

if sys.platform != "linux" or Path("/proc/driver/nvidia/gpus").exists():
    pytest.skip("the record is of a Linux machine without a GPU", allow_module_level=True)


def check(folder: Path, *flags: str) -> dict[str, Any]:
    """The report of `record.py --check`."""
    report = folder / "report.json"
    command = [sys.executable, str(HERE / "record.py"), "--check", "--report", str(report), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert report.is_file(), done.stderr
    found: dict[str, Any] = json.loads(report.read_text())
    return found


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return check(tmp_path_factory.mktemp("behaviour"), "--quick")


@pytest.mark.parametrize("group", [group for group in GROUPS if group not in SLOW_GROUPS])
def test_is_as_recorded(group: str, quick: dict[str, Any]) -> None:
    assert quick["entries"][group], "nothing of this group ran"
    found = {title: lines for title, lines in quick["differences"].items() if title.startswith(f"{group}: ")}
    assert not found, "\n".join(line for lines in found.values() for line in lines)


@pytest.mark.slow
def test_everything_is_as_recorded(tmp_path: Path) -> None:
    found = check(tmp_path)["differences"]
    assert not found, "\n".join(line for lines in found.values() for line in lines)
