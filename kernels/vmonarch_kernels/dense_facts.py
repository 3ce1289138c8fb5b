"""Which packages compute dense attention, and what they take. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec


@dataclass(frozen=True)
class DensePackage:
    """A package whose attention takes (B, N, heads, D) in float16 or bfloat16, and returns the same."""

    module: str
    function: str
    distribution: str
    """Its name in the package index."""
    title: str
    majors: tuple[int, ...]
    """Major compute capabilities that it has kernels for."""
    recommended: tuple[int, ...] = ()
    """Those where it is chosen by "auto": it is the fastest there."""
    max_head_dim: int = 256
    other_head_dims: tuple[int, ...] = ()
    """Head dimensions above ``max_head_dim`` that it takes as well."""
    quantised: bool = False
    """Its products are computed in 8 bit, so its result is another one."""

    @property
    def version(self) -> str:
        """The installed version, or "unknown version"."""
        try:
            return metadata.version(self.distribution)
        except metadata.PackageNotFoundError:
            return "unknown version"


# Signatures and limits: flash_attn/cute/interface.py of flash-attn-4 4.0.0b36, hopper/flash_attn_interface.py of
# FlashAttention, sageattention/core.py. FlashAttention 4 was the fastest on an H100 (../bench); for it and
# FlashAttention 3 the order on other chips is the one that their authors give.
PACKAGES = {
    "fa4": DensePackage(
        "flash_attn.cute",
        "flash_attn_func",
        "flash-attn-4",
        "FlashAttention 4",
        majors=(8, 9, 10, 11, 12),
        recommended=(9, 10),
        max_head_dim=128,
        other_head_dims=(256,),
    ),
    "fa3": DensePackage(
        "flash_attn_interface", "flash_attn_func", "flash_attn_3", "FlashAttention 3", majors=(8, 9), recommended=(9,)
    ),
    "fa2": DensePackage("flash_attn", "flash_attn_func", "flash-attn", "FlashAttention 2", majors=(8, 9, 10, 11, 12)),
    "sage": DensePackage(
        "sageattention",
        "sageattn",
        "sageattention",
        "SageAttention",
        majors=(8, 9, 10, 12),
        max_head_dim=128,
        quantised=True,
    ),
}
"""By name, the expected fastest first."""


def installed(name: str) -> bool:
    """Whether the package is there, working or not; it is not imported."""
    package = PACKAGES[name]
    try:
        # FlashAttention 2 and 4 share the folder flash_attn, which is there when either is.
        spec = find_spec(package.module)
    except (ImportError, ValueError):  # a parent package that is missing or broken
        return False
    return spec is not None and (name != "fa2" or spec.origin is not None)
