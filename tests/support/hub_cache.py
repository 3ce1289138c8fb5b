"""A hub's local cache with one repository in it, laid out as the hub's client lays it out."""

from __future__ import annotations

import shutil
from pathlib import Path

_COMMIT = "0" * 39 + "1"


def cache_repository(home: Path, repo: str, files: Path) -> Path:
    """Put the files of a folder into `home`/hub (what HF_HOME names) as a repository; its snapshot's folder."""
    folder = home / "hub" / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / _COMMIT
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(_COMMIT)
    (folder / "blobs").mkdir()
    for number, path in enumerate(sorted(path for path in files.rglob("*") if path.is_file())):
        blob = folder / "blobs" / f"{number:040x}"
        shutil.copy(path, blob)
        link = snapshot / path.relative_to(files)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    return snapshot
