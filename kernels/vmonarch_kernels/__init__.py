"""Monarch-structured attention for video tokens: one public call and its oracle.

``monarch_attention`` implements VMonarch (arXiv 2601.22275) on (B, N, heads, D) tensors, with the
exact band, the warm start and the frame refresh that this project adds; ``../README.md`` holds the derivation.
Importing this package does not import torch: names load on first use, so that
``vmonarch_kernels.cost`` serves a command line that only counts.

What is public; all else may change between versions:

- ``monarch_attention``: structured attention of one call.
- ``attend``, ``Inputs``, ``Options``: the same from a call's tensors and its options as objects.
- ``Residual``: what the frame refresh keeps from one call to the next.
- ``resolve_impl``, ``ImplUnavailable``: the implementation that a device and dtype get, and the error without one.
- ``dense_attention``, ``attention_lse``, ``dense_backends``: dense attention, also with its log-sum-exp.
- ``dense_choices``, ``dense_obstacle``, ``DenseUnavailable``: which dense attention fits a call, why another one does
  not, and the error.
- ``frame_attention``: exact attention within frames, with its log-sum-exp.
- ``monarch_factors``, ``Factors``: the factors L and R themselves, from the reference.
- ``qk_norm_rope``, ``layer_norm_modulate``, ``gated_residual``, ``residual_norm``: norms, rotation and gates between a
  block's products, each in one pass.
- ``gelu_tanh_``, ``gated_activation``: activations, in place, or of half the channels.
- ``linear_gelu_tanh``: a linear layer's product with GELU in its epilogue.
- ``quantize_rows``, ``linear_e4m3``: rows in e4m3 with a scale each, and a linear layer whose product takes them.
- ``gelu_tanh_rows``, ``Rows``: rows of an activation, and what a product takes in the place of a tensor.
- ``HeadNorm``, ``Rotation``, ``Norm``, ``Term``: what these take beside their tensors.
- ``resolve_fused_impl``: the implementation of these that a device and dtype get.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vmonarch_kernels.api import ImplUnavailable, attend, frame_attention, monarch_attention, resolve_impl
    from vmonarch_kernels.dense import attention_lse, dense_attention, dense_backends, dense_choices, dense_obstacle
    from vmonarch_kernels.dense_packages import DenseUnavailable
    from vmonarch_kernels.fused import (
        gated_activation,
        gated_residual,
        gelu_tanh_,
        layer_norm_modulate,
        linear_gelu_tanh,
        qk_norm_rope,
        residual_norm,
        resolve_fused_impl,
    )
    from vmonarch_kernels.fused_spec import HeadNorm, Norm, Rotation, Rows, Term
    from vmonarch_kernels.linear8 import gelu_tanh_rows, linear_e4m3, quantize_rows
    from vmonarch_kernels.reference import Factors, monarch_factors
    from vmonarch_kernels.residual import Residual
    from vmonarch_kernels.spec import Inputs, Options

_HOMES = {
    "monarch_attention": "api",
    "attend": "api",
    "Inputs": "spec",
    "Options": "spec",
    "resolve_impl": "api",
    "frame_attention": "api",
    "ImplUnavailable": "api",
    "attention_lse": "dense",
    "dense_attention": "dense",
    "dense_backends": "dense",
    "dense_choices": "dense",
    "dense_obstacle": "dense",
    "DenseUnavailable": "dense_packages",
    "monarch_factors": "reference",
    "Factors": "reference",
    "Residual": "residual",
    "gated_activation": "fused",
    "gated_residual": "fused",
    "gelu_tanh_": "fused",
    "layer_norm_modulate": "fused",
    "linear_gelu_tanh": "fused",
    "qk_norm_rope": "fused",
    "residual_norm": "fused",
    "resolve_fused_impl": "fused",
    "quantize_rows": "linear8",
    "gelu_tanh_rows": "linear8",
    "linear_e4m3": "linear8",
    "HeadNorm": "fused_spec",
    "Norm": "fused_spec",
    "Rotation": "fused_spec",
    "Rows": "fused_spec",
    "Term": "fused_spec",
}

__all__ = [
    "DenseUnavailable",
    "Factors",
    "HeadNorm",
    "ImplUnavailable",
    "Inputs",
    "Norm",
    "Options",
    "Residual",
    "Rotation",
    "Rows",
    "Term",
    "attend",
    "attention_lse",
    "dense_attention",
    "dense_backends",
    "dense_choices",
    "dense_obstacle",
    "frame_attention",
    "gated_activation",
    "gated_residual",
    "gelu_tanh_",
    "gelu_tanh_rows",
    "layer_norm_modulate",
    "linear_e4m3",
    "linear_gelu_tanh",
    "monarch_attention",
    "monarch_factors",
    "qk_norm_rope",
    "quantize_rows",
    "residual_norm",
    "resolve_fused_impl",
    "resolve_impl",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
