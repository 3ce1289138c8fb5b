"""Fixtures of the whole suite. Without a GPU the real Triton kernels run under the interpreter."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# One worker a core: threads of torch would only wait for those of the other workers. Child processes inherit it.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Triton reads this when a kernel module is imported, so it must be set before any test imports one.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# No test may reach a hub: what a test needs, it makes.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Nor may one write to the user's cache.
os.environ["VMONARCH_CACHE"] = tempfile.mkdtemp(prefix="vmonarch-tests-")
# Nor may the user's own defaults change what a test does.
os.environ["VMONARCH_CONFIG"] = ""
# Rich and typer size their output by these; a test that cares sets its own.
for name in ("COLUMNS", "FORCE_COLOR", "CLICOLOR_FORCE"):
    os.environ.pop(name, None)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For modules whose tensors are so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A WanPipeline of random weights as a diffusers folder (safetensors); 64x64 and 17 frames take a second."""
    from tiny_wan import tiny_pipeline

    folder = tmp_path_factory.mktemp("models") / "tiny-wan"
    tiny_pipeline().save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def tiny_wan_two_stage_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with two transformers, as Wan 2.2 A14B has."""
    from tiny_wan import tiny_pipeline

    folder = tmp_path_factory.mktemp("models") / "tiny-wan-two-stage"
    tiny_pipeline(two_stages=True).save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def tiny_record(tiny_wan_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The record of a clip of the tiny model: preset fast with a band of 1, seed 7, beside clip.mp4."""
    from typer.testing import CliRunner

    from vmonarch_cli.cli.app import app

    folder = tmp_path_factory.mktemp("record")
    flags = "--size 48x32 --num-frames 17 --steps 3 --fps 8 --preset fast --set band=1 --seed 7 --guidance-scale 3 -q"
    result = CliRunner().invoke(
        app, ["generate", "-m", str(tiny_wan_folder), "-p", "a red circle", *flags.split(), "-o", f"{folder}/clip.mp4"]
    )
    assert result.exit_code == 0, result.stderr
    return folder / "clip.json"
