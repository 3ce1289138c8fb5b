"""What a run imports of other packages, and why an import failed: installed versions often do not fit each other."""

from __future__ import annotations

import importlib
import logging
import os
import re
from importlib import metadata
from importlib.util import find_spec

from vmonarch_cli.text import innermost_line

NEEDED = (
    "torch",
    "transformers:AutoTokenizer",
    "transformers:T5TokenizerFast",
    "transformers:UMT5EncoderModel",
    "transformers:CLIPImageProcessor",
    "diffusers:DiffusionPipeline",
    "diffusers:WanPipeline",
    "diffusers:AutoencoderKLWan",
)
"""module or module:name; the libraries import their parts when a name is first asked for."""
OPTIONAL = ("peft", "torchao")
"""Imported where they are installed, also by runs that do not ask for them."""


def quiet_imports() -> None:
    """Keep the libraries from printing while they are imported, which must come after this; what they raise they raise,
    and their errors they still log.
    """
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Where torchao is installed, transformers imports it, and it warns of its CUDA files on a machine without CUDA.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def import_parts(package: str) -> None:
    """Import, quietly, what a run takes from a package; whatever it raises is raised."""
    quiet_imports()
    for part in (*NEEDED, *OPTIONAL):
        module, _, name = part.partition(":")
        if module == package:
            loaded = importlib.import_module(module)
            if name:
                getattr(loaded, name)


def installed(package: str) -> bool:
    """Whether a package is there, working or not."""
    return find_spec(package) is not None


def why_import_failed(error: BaseException) -> str:
    """The first cause of a failed import, and what to do about it."""
    cause = innermost_line(error).rstrip(".")[:300]
    if "torchvision" in cause:
        return f"{cause}: torchvision{_version('torchvision')} does not fit torch{_version('torch')}; {_TORCHVISION}"
    named = re.search(r"cannot import name '\w+' from '(\w+)|No module named '(\w+)", cause)
    if named is not None:
        package = named[1] or named[2]
        return (
            f"{cause}: {package}{_version(package)} does not fit the others; pip install --upgrade {package} may help"
        )
    return cause


_TORCHVISION = "pip uninstall torchvision (vmonarch does without), or install the version for this torch"


def _version(package: str) -> str:
    try:
        return f" {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return ""
