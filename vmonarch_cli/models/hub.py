"""Hub repositories: a model's configs before its weights, and every failure of a download in one sentence.

HF_HUB_OFFLINE, HF_TOKEN, HF_HOME and HF_ENDPOINT work as in all of Hugging Face's tools. Imports no torch.
"""

from __future__ import annotations

import functools
import logging
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from vmonarch_cli.errors import ModelError
from vmonarch_cli.models.base import ModelEntry
from vmonarch_cli.models.folder import INDEX, MODULAR_INDEX, read_folder, read_index
from vmonarch_cli.models.weights import count_parameters, has_weights, weight_files
from vmonarch_cli.text import binary_size, causes, first_line


class NotFoundError(ModelError):
    """A repository that is neither in the local cache nor on the hub, or that the hub could not be asked for."""


def read_repository(repo: str, revision: str | None) -> ModelEntry:
    """Describe a repository from its configs and the headers of its weight files, of which only the headers are read.

    What the local cache has is read there, without the network. Raises ModelError where the hub must be asked and does
    not answer, or where the repository is no model that can be used.
    """
    import huggingface_hub

    quiet_hub()
    try:
        folder = Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=["*.json"]))
    except Exception as error:
        raise explain(error, repo, revision) from error
    if not any((folder / name).is_file() for name in (INDEX, MODULAR_INDEX)):
        raise ModelError(f"{repo} is not a diffusers model: it has no {INDEX}")
    try:
        entry = read_folder(folder, functools.partial(_count, repo, revision))
    except ModelError:
        raise
    except Exception as error:
        raise explain(error, repo, revision) from error
    return entry.model_copy(update={"alias": repo, "title": repo, "hub_id": repo})


def quiet_hub() -> None:
    """Keep the hub's client from printing its retries: what it finds out comes as an error."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def _count(repo: str, revision: str | None, component: Path) -> int:
    """Parameters of one component of a snapshot in the cache; the hub is asked for what is not there."""
    if has_weights(component):
        return count_parameters(component)
    import huggingface_hub

    api = huggingface_hub.HfApi()
    prefix = f"{component.name}/"
    names = [name.removeprefix(prefix) for name in _files(repo, revision) if name.startswith(prefix)]
    headers = [
        api.parse_safetensors_file_metadata(repo, prefix + name, revision=revision) for name in weight_files(names)
    ]
    return sum(sum(header.parameter_count.values()) for header in headers)


@functools.lru_cache(maxsize=4)
def _files(repo: str, revision: str | None) -> tuple[str, ...]:
    import huggingface_hub

    return tuple(huggingface_hub.HfApi().list_repo_files(repo, revision=revision))


def cached_folder(repo: str, revision: str | None) -> Path | None:
    """The snapshot in the local cache where the hub does not answer; None where it does and there is room to download.

    Raises ModelError when nothing is cached either, or the disk of the cache is too full for the weights.
    """
    import huggingface_hub

    quiet_hub()
    try:
        info = huggingface_hub.HfApi().model_info(repo, revision=revision, files_metadata=True)
    except Exception as error:
        try:
            return Path(huggingface_hub.snapshot_download(repo, revision=revision, local_files_only=True))
        except Exception:
            raise explain(error, repo, revision) from error
    files = info.siblings or ()
    if not _is_modular(file.rfilename for file in files):  # of a modular pipeline not all is downloaded
        _check_disk(repo, files)
    return None


def download_modular(repo: str, revision: str | None) -> Path | None:
    """The snapshot of a modular pipeline, with the components that are used downloaded; None for another pipeline.

    Such repositories hold more than one model: what another one needs is left there. Raises what the hub's client
    raises, and ModelError when the disk of the cache is too full.
    """
    import huggingface_hub

    folder = Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=["*.json"]))
    if not _is_modular(path.name for path in folder.iterdir()):
        return None
    parts = [f"{name}/" for name, value in read_index(folder).items() if isinstance(value, list)]
    info = huggingface_hub.HfApi().model_info(repo, revision=revision, files_metadata=True)
    _check_disk(repo, [file for file in info.siblings or () if file.rfilename.startswith(tuple(parts))])
    wanted = ["*.json", *(f"{part}*" for part in parts)]
    pickles = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.py"]
    return Path(
        huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=wanted, ignore_patterns=pickles)
    )


def _is_modular(names: Iterable[str]) -> bool:
    """Whether a repository with these files holds a modular pipeline."""
    found = set(names)
    return MODULAR_INDEX in found and INDEX not in found


def snapshot_at_hand(repo: str, revision: str | None) -> Path | None:
    """The snapshot of a model in the local cache, if its transformer's weights are in it; the hub is not asked."""
    from huggingface_hub import constants

    home = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    commit = revision or "main"
    with suppress(OSError, ValueError):  # no such branch or tag in the cache: then it is a commit
        commit = (home / "refs" / commit).read_text(encoding="utf-8").strip()
    folder = home / "snapshots" / commit
    return folder if has_weights(folder / "transformer") else None


def hub_file(repo: str, choose: Callable[[Sequence[str]], str], thing: str = "LoRA") -> Path:
    """One file of a repository, downloaded or from the local cache; `choose` picks its name of all names."""
    import huggingface_hub

    quiet_hub()
    try:
        names = _files(repo, None)
    except Exception as error:
        try:
            snapshot = Path(huggingface_hub.snapshot_download(repo, local_files_only=True))
        except Exception:
            raise explain(error, repo, thing=thing) from error
        return snapshot / choose([path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*.safetensors")])
    name = choose(names)
    try:
        return Path(huggingface_hub.hf_hub_download(repo, name))
    except Exception as error:
        raise explain(error, repo, thing=thing) from error


def _check_disk(repo: str, files: Sequence[Any]) -> None:
    from huggingface_hub import constants

    cached = {Path(name).name for name in _cached_blobs(repo, constants.HF_HUB_CACHE)}
    weights = [file for file in files if file.rfilename.endswith(".safetensors")]
    need = sum(file.size or 0 for file in weights if (file.lfs is None or file.lfs.sha256 not in cached))
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


def explain(error: Exception, repo: str, revision: str | None = None, thing: str = "model") -> ModelError:
    """What a failed access to a repository means and what to do about it; `thing` is what it should hold."""
    from huggingface_hub import errors

    at = f" at revision {revision}" if revision else ""
    known: list[tuple[type[BaseException], type[ModelError], str]] = [
        (
            errors.GatedRepoError,
            ModelError,
            f"{repo} is gated: ask for access at https://huggingface.co/{repo} and set HF_TOKEN to a token of yours",
        ),
        (
            errors.RevisionNotFoundError,
            ModelError,
            f"{repo} has no revision '{revision}': give a branch, a tag or a commit",
        ),
        (
            errors.RepositoryNotFoundError,
            NotFoundError,
            f"there is no {thing} {repo} on the hub, or it is private: check the name, or set HF_TOKEN",
        ),
        (
            errors.EntryNotFoundError,
            ModelError,
            f"{repo}{at} is not a diffusers {thing}: a file that every one has is missing",
        ),
        (
            errors.OfflineModeIsEnabled,
            NotFoundError,
            f"{repo}{at} is not complete in the local cache and HF_HUB_OFFLINE is set: unset it once to download the "
            f"{thing}",
        ),
    ]
    # A missing cache entry hides why the hub was not asked, so the whole chain is looked at, the cause first.
    chain = list(causes(error))
    for kind, family, sentence in known:
        if any(isinstance(link, kind) and not isinstance(link, errors.LocalEntryNotFoundError) for link in chain):
            return family(sentence)
    if any(isinstance(link, OSError) and link.errno == 28 for link in chain):
        return ModelError(f"the disk became full while {repo} was downloaded: free some room, or set HF_HOME")
    network = ("connect", "resolve", "timed out", "timeout", "network", "unreachable", "offline")
    words = " ".join(f"{type(link).__name__} {link}" for link in chain).lower()
    if isinstance(error, errors.LocalEntryNotFoundError) or any(word in words for word in network):
        return NotFoundError(
            f"{repo}{at} cannot be downloaded: the hub cannot be reached and the {thing} is not complete in the local "
            f"cache; check the network, or give a local {'folder' if thing == 'model' else 'file'}"
        )
    return ModelError(f"{repo}{at} cannot be downloaded: {first_line(error).rstrip('.')[:300]}")
