"""Read an HTML page as a browser would, as far as tests of self-contained pages need it."""

from __future__ import annotations

import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

_LOADS = {"src", "href", "poster", "srcset", "data", "action", "background", "cite", "xlink:href"}


class Page(HTMLParser):
    """Tags, attributes that fetch or link, and the visible text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self._hidden = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._hidden = tag == "style"
        for name, value in attrs:
            self.attributes.append((name, value or ""))
            if name in _LOADS:
                self.references.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        self._hidden = False

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.text += data

    def check_self_contained(self) -> None:
        """No script, no handler, no frame, and nothing that leaves the folder."""
        assert not {"script", "iframe", "object", "embed", "link", "base", "form"} & set(self.tags)
        assert not [name for name, _ in self.attributes if name.startswith("on")]
        for reference in self.references:
            assert reference.startswith(("data:", "./")), reference[:80]
            assert ".." not in reference.partition(",")[0]


def screenshot(page: Path, target: Path, width: int, height: int) -> Path:
    """The page as headless Chromium draws it; the test is skipped where there is none."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("Chromium is not installed")
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run hide-scrollbars disable-background-networking"
    flags += " disable-component-update disable-sync"
    command = [browser, *(f"--{flag}" for flag in flags.split()), f"--user-data-dir={target.parent / 'profile'}"]
    command += [f"--screenshot={target}", f"--window-size={width},{height}", page.resolve().as_uri()]
    subprocess.run(command, capture_output=True, timeout=120, check=True)
    return target
