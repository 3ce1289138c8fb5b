"""Dense attention of other packages: which of them fits a call, how it is called, and a check at its first use."""

from __future__ import annotations

import threading
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

from vmonarch_kernels.dense_facts import PACKAGES, installed

_HALF = (torch.float16, torch.bfloat16)
_CHECK_TOKENS, _CHECK_HEADS = 320, 2
_EXACT_BOUND, _QUANTISED_BOUND = 0.02, 0.1
"""Relative L2 error against float32 that a first use may have: rounding to 16 bit gives 0.002 to 0.004."""


class DenseUnavailable(ValueError):
    """A dense attention that was asked for cannot run, or is wrong; one sentence with the reason."""


_checked: dict[tuple[str, torch.device, torch.dtype, int], str | None] = {}
_checking = threading.Lock()


def obstacle(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why a package cannot take such tensors, as the end of a sentence; None when it can."""
    package = PACKAGES[name]
    if not installed(name):
        return f"it is not installed (pip install {package.distribution})"
    if device.type != "cuda" or torch.version.hip:
        return f"it needs an NVIDIA GPU and the device is {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability[0] not in package.majors:
        valid = ", ".join(f"{major}.x" for major in package.majors)
        return f"it has kernels for compute capability {valid} and this GPU has {capability[0]}.{capability[1]}"
    if dtype not in _HALF:
        return f"it takes float16 and bfloat16 and the dtype is {str(dtype).removeprefix('torch.')}"
    # On Hopper FlashAttention 4 takes every multiple of 8 up to 256, elsewhere fewer.
    most = 256 if (name, capability[0]) == ("fa4", 9) else package.max_head_dim
    if head_dim % 8 or not (head_dim <= most or head_dim in package.other_head_dims):
        others = "".join(f" and {other}" for other in package.other_head_dims if other > most)
        return f"it takes head dimensions that are multiples of 8 up to {most}{others} and this is {head_dim}"
    return None


def call(name: str, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Attention (B, N, heads, D) by a package, unchecked; whatever it raises is raised."""
    package = PACKAGES[name]
    function = getattr(import_module(package.module), package.function)
    if package.quantised:
        out = function(q, k, v, tensor_layout="NHD", is_causal=False, sm_scale=scale)
    else:
        out = function(q, k, v, softmax_scale=scale, causal=False)
    # FlashAttention 4, and 3 in some versions, return the log-sum-exp as well.
    result: Tensor = out[0] if isinstance(out, tuple) else out
    return result


def run(name: str, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Attention (B, N, heads, D) by a package, which is checked at its first use on a device; DenseUnavailable when
    that fails.
    """
    check(name, q.device, q.dtype, q.shape[-1])
    return call(name, q, k, v, scale)


def check(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """DenseUnavailable unless a package imports, runs and agrees with softmax attention in float32 on small tensors.

    It is done once for such tensors, and compiles what FlashAttention 4 compiles at its first call.
    """
    key = (name, device, dtype, head_dim)
    with _checking:
        if key not in _checked:
            _checked[key] = _fault(name, device, dtype, head_dim)
    fault = _checked[key]
    if fault is not None:
        package = PACKAGES[name]
        raise DenseUnavailable(
            f"dense attention {name} ({package.title}, {package.distribution} {package.version}) {fault}: mend the "
            "installation, or choose another one"
        )


def _fault(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    generator = torch.Generator().manual_seed(0)
    shape = (1, _CHECK_TOKENS, _CHECK_HEADS, head_dim)
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    scale = 0.8 * head_dim**-0.5  # not the default, so that one that is dropped shows
    wide_q, wide_k, wide_v = (x.transpose(1, 2).float() for x in (q, k, v))
    truth = F.scaled_dot_product_attention(wide_q, wide_k, wide_v, scale=scale).transpose(1, 2)
    try:
        with torch.no_grad():
            out = call(name, q, k, v, scale)
    except Exception as error:  # a build for another torch is an ImportError, a kernel that fails whatever it likes
        words = str(error).strip().splitlines()
        return f"does not work here ({type(error).__name__}: {words[0][:200] if words else 'no message'})"
    if out.shape != truth.shape:
        return f"returned shape {tuple(out.shape)} where {tuple(truth.shape)} is right"
    wrong = float((out.float() - truth).norm() / truth.norm())
    bound = _QUANTISED_BOUND if PACKAGES[name].quantised else _EXACT_BOUND
    return None if wrong <= bound else f"is wrong (relative error {wrong:.2g} on small tensors, {bound:g} allowed)"
