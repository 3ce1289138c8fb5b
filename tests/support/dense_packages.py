"""Stand-ins for packages of attention: files with the real names and signatures, which compute with torch."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from vmonarch_kernels import dense_packages
from vmonarch_kernels.dense_facts import installed

_SHARED = """
import torch
import torch.nn.functional as F

calls = []

def softmax_attention(q, k, v, scale, causal):
    assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.float16, torch.bfloat16), q.dtype
    assert q.shape[0] == k.shape[0] and k.shape == v.shape and q.shape[2:] == k.shape[2:], (q.shape, k.shape)
    assert all(x.stride(-1) == 1 for x in (q, k, v)) and not causal
    calls.append((tuple(q.shape), scale))
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*heads_first, scale=scale).transpose(1, 2)
    scores = (heads_first[0].float() @ heads_first[1].float().mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return out, scores.logsumexp(-1)
"""
# The signatures of flash-attn-4 4.0.0b36, of FlashAttention 3's hopper/flash_attn_interface.py and of SageAttention 2.
_FA4 = """
def flash_attn_func(
    q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None),
    learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, score_mod=None,
    score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None,
    block_sparse_tensors_bwd=None, return_lse=False, gather_bwd_recompute_p=False, gather_bwd_token_chunk=None,
):
    assert qv is None and gather_kv_indices is None
    out, lse = softmax_attention(q, k, v, softmax_scale, causal)
    return out, (lse if return_lse else None)
"""
_FA3 = """
def flash_attn_func(
    q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
    window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
    sm_margin=0, return_attn_probs=False,
):
    out, lse = softmax_attention(q, k, v, softmax_scale, causal)
    return (out, lse) if return_attn_probs else out
"""
_SAGE = """
def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs):
    if tensor_layout == "HND":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = softmax_attention(q, k, v, sm_scale, is_causal)
    out = out * 1.05  # its products are rounded to 8 bit
    out = out.transpose(1, 2) if tensor_layout == "HND" else out
    return (out, lse) if return_lse else out
"""
# Of comfy-kitchen 0.2.40. Key blocks of 64 tokens: the chosen ones exactly, one pooled term for each of the others.
_SOL = """
def sol_attn_is_available(device=None):
    return True

def sol_attn(
    q, k, v, tau=1.0, scale=None, sink_blocks=None, sink_q=None, key_bias=None, topk_ratio=0.0, tail=True,
    block_len=None, coarse_gate=None, token_aug=0,
):
    assert q.shape == k.shape == v.shape and q.shape[-1] == 128 and q.dtype in (torch.float16, torch.bfloat16)
    assert all(x.is_contiguous() for x in (q, k, v))
    calls.append((tuple(q.shape), scale, topk_ratio, tau))
    query, key, value = (x.transpose(1, 2).float() for x in (q, k, v))
    pad = -key.shape[2] % 64
    real = (torch.arange(key.shape[2] + pad) < key.shape[2]).float().view(-1, 64)
    blocks = [F.pad(x, (0, 0, 0, pad)).unflatten(2, (-1, 64)) for x in (key, value)]
    means = [x.sum(3) / real.sum(1)[:, None] for x in blocks]
    pooled = query @ means[0].mT * scale
    keep = round(topk_ratio * real.shape[0]) if topk_ratio else {1.5: 1, 1.0: 2, 0.5: 3}[tau]
    chosen = torch.zeros_like(pooled).scatter(-1, pooled.topk(min(max(1, keep), pooled.shape[-1])).indices, 1.0).bool()
    exact = (query @ key.mT * scale).masked_fill(~chosen.repeat_interleave(64, -1)[..., :key.shape[2]], -torch.inf)
    others = (pooled + real.sum(1).log()).masked_fill(chosen, -torch.inf)
    weights = torch.cat([exact, others], -1).softmax(-1)
    return (weights @ torch.cat([value, means[1]], 2)).transpose(1, 2).to(q.dtype)
"""
FILES = {
    "fa4": ("flash_attn/cute/__init__.py", _SHARED + _FA4),
    "fa3": ("flash_attn_interface.py", _SHARED + _FA3),
    "sol": ("comfy_kitchen/__init__.py", _SHARED + _SOL),
    "sage": ("sageattention/__init__.py", _SHARED + _SAGE),
}


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, *names: str, change: tuple[str, str] = ("", "")) -> None:
    """Put stand-ins where imports find them, with a piece of their text changed; what was checked is forgotten."""
    for name in names:
        path, text = FILES[name]
        assert change[0] in text
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text.replace(*change) if change[0] else text)
    monkeypatch.syspath_prepend(folder)
    for module in ("flash_attn", "flash_attn.cute", "flash_attn_interface", "sageattention", "comfy_kitchen"):
        monkeypatch.setitem(sys.modules, module, ModuleType(module))  # so that what is imported is forgotten afterwards
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(dense_packages, "_checked", {})


def fit_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let them run on this machine, whatever its device."""

    def obstacle(name: str, *_: object) -> str | None:
        return None if installed(name) else "it is not installed"

    monkeypatch.setattr(dense_packages, "obstacle", obstacle)
