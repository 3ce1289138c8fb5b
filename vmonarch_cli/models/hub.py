"""Hub repositories: a model's configs before its weights, and every failure of a download in one sentence.

HF_HUB_OFFLINE, HF_TOKEN, HF_HOME and HF_ENDPOINT work as in all of Hugging Face's tools. Imports no torch.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from vmonarch_cli.errors import ModelError
from vmonarch_cli.models.base import ModelEntry
from vmonarch_cli.models.folder import read_folder
from vmonarch_cli.text import binary_size


def read_repository(repo: str, revision: str | None) -> ModelEntry:
    """Describe a repository from its configs, which are downloaded; parameters come from the weight files' headers."""
    import huggingface_hub

    try:
        folder = Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=["*.json"]))
    except Exception as error:
        raise explain(error, repo, revision) from error
    if not (folder / "model_index.json").is_file():
        raise ModelError(f"{repo} is not a diffusers model: it has no model_index.json")
    api = huggingface_hub.HfApi()

    def count(component: Path) -> int:
        files = [name for name in weights if name.startswith(f"{component.name}/")]
        return sum(
            sum(api.parse_safetensors_file_metadata(repo, name, revision=revision).parameter_count.values())
            for name in files
        )

    try:
        weights = [name for name in api.list_repo_files(repo, revision=revision) if name.endswith(".safetensors")]
        entry = read_folder(folder, count)
    except ModelError:
        raise
    except Exception as error:
        raise explain(error, repo, revision) from error
    return entry.model_copy(update={"alias": repo, "title": repo, "hub_id": repo})


def check_disk(repo: str, revision: str | None) -> None:
    """ModelError when the cache's disk has no room for the weights; says nothing where the hub does not answer."""
    import huggingface_hub
    from huggingface_hub import constants

    try:
        info = huggingface_hub.HfApi().model_info(repo, revision=revision, files_metadata=True)
    except Exception:
        return
    cached = {Path(name).name for name in _cached_blobs(repo, constants.HF_HUB_CACHE)}
    files = [file for file in info.siblings or () if file.rfilename.endswith(".safetensors")]
    need = sum(file.size or 0 for file in files if (file.lfs is None or file.lfs.sha256 not in cached))
    cache = Path(constants.HF_HUB_CACHE)
    while not cache.exists():
        cache = cache.parent
    free = shutil.disk_usage(cache).free
    if need > free:
        raise ModelError(
            f"the disk of {constants.HF_HUB_CACHE} is too full: {repo} needs {binary_size(need)} and "
            f"{binary_size(free)} are free; HF_HOME names another place"
        )


def _cached_blobs(repo: str, cache: str) -> list[str]:
    blobs = Path(cache) / f"models--{repo.replace('/', '--')}" / "blobs"
    return [path.name for path in blobs.iterdir()] if blobs.is_dir() else []


def explain(error: Exception, repo: str, revision: str | None = None) -> ModelError:
    """What a failed access to a repository means and what to do about it."""
    from huggingface_hub import errors

    at = f" at revision {revision}" if revision else ""
    known: list[tuple[type[Any] | tuple[type[Any], ...], str]] = [
        (
            errors.GatedRepoError,
            f"{repo} is gated: ask for access at https://huggingface.co/{repo} and set HF_TOKEN to a token of yours",
        ),
        (errors.RevisionNotFoundError, f"{repo} has no revision '{revision}': give a branch, a tag or a commit"),
        (
            errors.RepositoryNotFoundError,
            f"there is no model {repo} on the hub, or it is private: check the name, or set HF_TOKEN",
        ),
        (errors.EntryNotFoundError, f"{repo}{at} is not a diffusers model: a file that every one has is missing"),
        (
            errors.OfflineModeIsEnabled,
            f"{repo}{at} is not in the local cache and HF_HUB_OFFLINE is set: unset it once to download the model",
        ),
    ]
    # A missing cache entry hides why the hub was not asked, so the whole chain is looked at, the cause first.
    chain: list[BaseException] = []
    step: BaseException | None = error
    while step is not None:
        chain.append(step)
        step = step.__cause__ or step.__context__
    for kind, sentence in known:
        if any(isinstance(link, kind) and not isinstance(link, errors.LocalEntryNotFoundError) for link in chain):
            return ModelError(sentence)
    if any(isinstance(link, OSError) and link.errno == 28 for link in chain):
        return ModelError(f"the disk became full while {repo} was downloaded: free some room, or set HF_HOME")
    network = ("connect", "resolve", "timed out", "timeout", "network", "unreachable", "offline")
    words = " ".join(f"{type(link).__name__} {link}" for link in chain).lower()
    if isinstance(error, errors.LocalEntryNotFoundError) or any(word in words for word in network):
        return ModelError(
            f"{repo}{at} cannot be downloaded: the hub cannot be reached and the model is not in the local cache; "
            "check the network, or give --model a local folder"
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ModelError(f"{repo}{at} cannot be downloaded: {(lines or [type(error).__name__])[0].rstrip('.')[:300]}")
