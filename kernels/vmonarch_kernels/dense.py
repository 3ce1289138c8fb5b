"""Dense attention on (B, N, H, D) tensors: the baseline, and the exact parts with their log-sum-exp."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vmonarch_kernels import dense_packages
from vmonarch_kernels.dense_facts import PACKAGES
from vmonarch_kernels.dense_packages import DenseUnavailable

_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_CHUNK_ELEMENTS = 1 << 24  # scores held at once by the portable path: 64 MB in float32


def dense_backends(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """Names of the SDPA backends worth trying on a device, the expected fastest first."""
    if device.type != "cuda":
        return ("flash",) if device.type == "cpu" else ("math",)
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip:
        return ("flash", "efficient")
    if dtype not in (torch.float16, torch.bfloat16) or capability < (8, 0):
        return ("efficient",)
    # cuDNN leads on Hopper and Blackwell; before them FlashAttention-2 does.
    return ("cudnn", "flash", "efficient") if capability >= (9, 0) else ("flash", "cudnn", "efficient")


AUTO, SDPA = "auto", "sdpa"
"""The name of whichever is expected to be the fastest, and of torch's own with the backend that suits the device."""

DENSE_NAMES = (AUTO, SDPA, *_BACKENDS, *PACKAGES)


def dense_obstacle(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why a dense attention cannot take such tensors, as the end of a sentence; None when it can.

    name: "sdpa", a backend of it ("cudnn", "flash", "efficient", "math"), or a package ("fa4", "fa3", "fa2", "sage").
    ValueError for any other. Nothing is imported: whether an installed package works shows at its first use.
    """
    if name in PACKAGES:
        return dense_packages.obstacle(name, device, dtype, head_dim)
    if name not in (SDPA, *_BACKENDS):
        valid = ", ".join(DENSE_NAMES)
        raise ValueError(f"backend is {name!r}; valid are {valid}")
    if name in (SDPA, "math") or name in dense_backends(device, dtype):
        return None
    if device.type != "cuda":
        return f"it needs a GPU and the device is {device.type}"
    return f"this GPU has no such kernel for {str(dtype).removeprefix('torch.')}"


def dense_choices(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, ...]:
    """The dense attention that a name stands for on such tensors, and then those that are worth comparing with it.

    "auto" is the expected fastest of all that are installed and fit, quantised ones aside; it is compared with the
    other packages and with torch's two fastest backends. A named one is compared with itself alone, a quantised one
    with "sdpa". DenseUnavailable when a named one cannot run, ValueError for an unknown name.
    """
    if name != AUTO:
        obstacle = dense_obstacle(name, device, dtype, head_dim)
        if obstacle is not None:
            raise DenseUnavailable(f"dense attention {name} cannot run: {obstacle}")
        return (name, SDPA) if is_quantised(name) else (name,)
    if device.type != "cuda" or torch.version.hip:
        return (SDPA,)
    major = torch.cuda.get_device_capability(device)[0]
    fitting = [
        package
        for package, facts in PACKAGES.items()
        if not facts.quantised and dense_packages.obstacle(package, device, dtype, head_dim) is None
    ]
    first = [package for package in fitting if major in PACKAGES[package].recommended]
    rest = [package for package in fitting if package not in first]
    # torch's first backend is what "sdpa" takes.
    return (*first, SDPA, *dense_backends(device, dtype)[1:2], *rest)


def is_quantised(name: str) -> bool:
    """Whether a dense attention computes in 8 bit, so that its result is another one."""
    return name in PACKAGES and PACKAGES[name].quantised


def dense_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, backend: str = SDPA) -> Tensor:
    """Softmax attention; (B, N, H, D) in and out, any float dtype.

    ``backend``: "sdpa" is torch's, with the fastest backend of the device and the next ones where it cannot;
    "cudnn", "flash", "efficient" or "math" is that backend of it alone (RuntimeError of torch when it cannot take the
    tensors); "fa4", "fa3", "fa2" or "sage" is an installed package; "auto" is the first of ``dense_choices``.
    DenseUnavailable when a package does not work or is wrong on small tensors at its first use.
    """
    if backend == AUTO:
        backend = dense_choices(backend, q.device, q.dtype, q.shape[-1])[0]
    if backend in PACKAGES:
        return dense_packages.run(backend, q, k, v, scale)
    with _preference(q, backend):
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale)
    return out.transpose(1, 2)


@contextmanager
def _preference(q: Tensor, backend: str) -> Iterator[None]:
    if backend != SDPA:
        if backend not in _BACKENDS:
            valid = ", ".join(DENSE_NAMES)
            raise ValueError(f"backend is {backend!r}; valid are {valid}")
        with sdpa_kernel(_BACKENDS[backend]):
            yield
    elif q.device.type == "cuda":
        order = [_BACKENDS[name] for name in dense_backends(q.device, q.dtype)]
        with sdpa_kernel([*order, SDPBackend.MATH], set_priority=True):
            yield
    else:
        yield


LseKernel = Literal["cpu", "flash", "efficient", "eager"]


def lse_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> LseKernel:
    """The kernel of torch that ``attention_lse`` calls; "eager" is none, but products and softmax, chunk by chunk.

    FlashAttention-2 runs from compute capability 8.0 on, up to a head dimension of 256; the efficient kernel takes
    bfloat16 from there on too. Which of them AMD's GPUs have depends on the build, so there neither is called.
    """
    if device.type == "cpu":
        return "cpu"
    if device.type != "cuda" or torch.version.hip or head_dim % 8:
        return "eager"
    from_8_0 = torch.cuda.get_device_capability(device) >= (8, 0)
    if dtype in (torch.float16, torch.bfloat16) and from_8_0 and head_dim <= 256:
        return "flash"
    if dtype in (torch.float32, torch.float16) or (dtype == torch.bfloat16 and from_8_0):
        return "efficient"
    return "eager"


def attention_lse(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """Attention with its natural log-sum-exp: q (B, H, S, D), k and v (B, H, S', D), any strides.

    Returns (out (B, H, S, D) in q's dtype, lse (B, H, S) float32 or wider). Uses a fused kernel of torch
    where the device has one (``lse_kernel``) and a chunked eager path elsewhere; never holds S * S' scores.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    kernel = lse_kernel(q.device, q.dtype, q.shape[-1])
    if kernel == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, scale=scale)
    elif kernel == "flash":
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        out, lse, *_ = flash(q, k, v, 0.0, False, False, scale=scale)
    elif kernel == "efficient":
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        out, lse, *_ = efficient(q, k, v, None, True, 0.0, False, scale=scale)
        lse = lse[..., : q.shape[2]]
    else:
        out, lse = _chunked(q, k, v, scale)
    return out, lse


def _chunked(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:-1], dtype=wide)
    keys, values = k.mT.to(wide), v.to(wide)
    rows = max(1, _CHUNK_ELEMENTS // (q.shape[0] * q.shape[1] * k.shape[2]))
    for first in range(0, q.shape[2], rows):
        part = slice(first, first + rows)
        scores = scale * (q[:, :, part].to(wide) @ keys)
        lse[:, :, part] = torch.logsumexp(scores, dim=-1)
        out[:, :, part] = (torch.softmax(scores, dim=-1) @ values).to(q.dtype)
    return out, lse
