"""Tiny checkpoints of every family, for the tests of what is done to a pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
from loading import write_lora
from tiny_families import TINY


class Folders(dict[str, Path]):
    """Every family's checkpoint on disk, written when a test first asks for it."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        super().__init__()
        self.factory = factory

    def __missing__(self, name: str) -> Path:
        self[name] = self.factory.mktemp("models") / name
        TINY[name].build().save_pretrained(self[name], safe_serialization=True)
        return self[name]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory)


@pytest.fixture(scope="session")
def lora(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lora(folders["wan"], tmp_path_factory.mktemp("lora"))
