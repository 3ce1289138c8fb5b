"""Hub ids: looked up in the cache and on the hub before anything is guessed, and usable without a network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from hub_cache import cache_repository
from huggingface_hub.errors import RepositoryNotFoundError
from typer.testing import CliRunner

from vmonarch_cli.cli.app import app
from vmonarch_cli.errors import ModelError
from vmonarch_cli.models import hub
from vmonarch_cli.models.registry import find_model

FAST = "FastVideo/FastWan2.1-T2V-1.3B-Diffusers"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; the hub is not asked (HF_HUB_OFFLINE is set for the whole suite)."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def test_a_cached_repository_is_found_though_a_known_name_is_near(home: Path, tiny_wan_folder: Path) -> None:
    cache_repository(home, FAST, tiny_wan_folder)
    entry, source = find_model(FAST)
    assert (entry.alias, entry.hub_id, source, entry.heads) == (FAST, FAST, FAST, 2)
    assert entry.transformer_params == find_model(str(tiny_wan_folder))[0].transformer_params


@pytest.mark.parametrize("command", [["plan", "-p", "a cat", "-m"], ["models", "show"]])
def test_plan_and_models_show_what_is_cached(home: Path, tiny_wan_folder: Path, command: list[str]) -> None:
    cache_repository(home, "someone/tiny-wan", tiny_wan_folder)
    result = CliRunner().invoke(app, [*command, "someone/tiny-wan"])
    assert (result.exit_code, result.stderr) == (0, "")
    assert "someone/tiny-wan" in result.stdout


def test_generate_runs_a_cached_model_without_a_network(home: Path, tiny_wan_folder: Path) -> None:
    """In a process of its own: the libraries read the cache's place when they are imported."""
    cache_repository(home, "someone/tiny-wan", tiny_wan_folder)
    shape = ["--size", "48x32", "--num-frames", "5", "--steps", "2", "--device", "cpu", "-q", "-o", "clip.gif"]
    command = [sys.executable, "-m", "vmonarch_cli", "generate", "-m", "someone/tiny-wan", "-p", "a red circle", *shape]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=home,
        env={**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "clip.gif\n", "")


def test_a_hint_comes_after_the_miss(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError) as offline:
        find_model(FAST)
    assert offline.value.message == (
        f"{FAST} is not complete in the local cache and HF_HUB_OFFLINE is set: unset it once to download the model "
        "(did you mean wan2.1-1.3b or wan2.1-14b or wan2.1-vace-1.3b?)"
    )

    def missing(repo: str, **_: Any) -> str:
        response: Any = SimpleNamespace(headers={}, request=None)
        raise RepositoryNotFoundError("404 Client Error", response=response)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", missing)
    with pytest.raises(ModelError) as online:
        find_model("Wan-AI/Wan2.2-TI2V-5B")
    assert online.value.message == (
        "there is no model Wan-AI/Wan2.2-TI2V-5B on the hub, or it is private: check the name, or set HF_TOKEN "
        "(did you mean wan2.2-5b or wan2.2-a14b or wan2.2-i2v-a14b?)"
    )
    with pytest.raises(ModelError) as other:
        find_model("someone/flux-pipeline")
    assert "did you mean" not in other.value.message


def test_configs_without_weights_are_no_model_in_the_cache(home: Path, tiny_wan_folder: Path) -> None:
    snapshot = cache_repository(home, "someone/tiny-wan", tiny_wan_folder)
    for path in snapshot.rglob("*.safetensors"):
        path.unlink()
    with pytest.raises(ModelError, match="someone/tiny-wan is not complete in the local cache and HF_HUB_OFFLINE"):
        find_model("someone/tiny-wan")


def test_of_a_modular_pipeline_only_what_is_used_is_downloaded(
    home: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its repository has other partitions beside it, and the authors' own files."""
    from tiny_families import TINY

    folder = tmp_path_factory.mktemp("models") / "h3"
    TINY["minimax-h3"].build().save_pretrained(folder)
    snapshot = cache_repository(home, "someone/h3", folder)
    asked: list[dict[str, Any]] = []

    def download(repo: str, **options: Any) -> str:
        asked.append(options)
        return str(snapshot)

    def about(name: str, size: int) -> Any:
        return SimpleNamespace(rfilename=name, size=size, lfs=None)

    files = [about("transformer/a.safetensors", 8), about("transformer_ref/a.safetensors", 1 << 60)]
    files.append(about("modular_model_index.json", 1))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: SimpleNamespace(siblings=files))
    assert hub.cached_folder("someone/h3", None) is None, "the disk need not have room for all of it"
    assert hub.download_modular("someone/h3", None) == snapshot
    assert {"transformer/*", "audio_vae/*", "audio_scheduler/*", "processor/*"} <= set(asked[-1]["allow_patterns"])
    assert "transformer_ref/*" not in asked[-1]["allow_patterns"]
    files[0].size = 1 << 60
    with pytest.raises(ModelError, match=r"is too full: someone/h3 needs 1073741824\.0 GiB"):
        hub.download_modular("someone/h3", None)


def test_an_ordinary_pipeline_is_downloaded_by_diffusers(
    home: Path, tiny_wan_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = cache_repository(home, "someone/tiny-wan", tiny_wan_folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(snapshot))
    assert hub.download_modular("someone/tiny-wan", None) is None
