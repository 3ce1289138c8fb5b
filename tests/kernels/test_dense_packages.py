"""Dense attention of other packages: how they are called, which one is chosen, and that a broken one is refused."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_packages import install

from vmonarch_kernels import DenseUnavailable, dense_attention, dense_choices, dense_obstacle

HALF = torch.bfloat16
MODULES = {"fa4": "flash_attn.cute", "fa3": "flash_attn_interface", "sage": "sageattention"}
every_package = pytest.mark.parametrize("name", MODULES)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make torch see one GPU of a compute capability, of AMD's with a version of HIP."""

    def see(capability: tuple[int, int], hip: str | None = None) -> torch.device:
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        return torch.device("cuda", 0)

    return see


def qkv(tokens: int = 50, keys: int = 70) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, count, 3, 32, dtype=HALF) for count in (tokens, keys, keys))
    return q, k, v


@every_package
@pytest.mark.parametrize("scale", [None, 0.3])
def test_a_package_computes_softmax_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, scale: float | None
) -> None:
    install(tmp_path, monkeypatch, name)
    q, k, v = qkv()
    out = dense_attention(q, k, v, scale=scale, backend=name)
    wide = dense_attention(q.float(), k.float(), v.float(), scale=scale)
    assert out.shape == q.shape
    assert out.dtype == HALF
    assert (out.float() - wide).norm() < (0.06 if name == "sage" else 0.01) * wide.norm()
    (check, call) = importlib.import_module(MODULES[name]).calls
    assert check[0] != call[0] == (2, 50, 3, 32), "one check on small tensors, then the call"
    dense_attention(q, k, v, backend=name)
    assert len(importlib.import_module(MODULES[name]).calls) == 3, "the check is made once"


@every_package
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("scale=scale)", "scale=None)"), "is wrong"),
        (("import torch\n", "import torch_of_another_version\n"), "No module named 'torch_of_another_version'"),
        (("    calls.append", "    raise RuntimeError('no kernel image')\n    calls.append"), "no kernel image"),
        (("v)]\n    out = F", "v)]\n    out = float('nan') * F"), "is wrong"),
    ],
    ids=["scale", "import", "kernel", "nan"],
)
def test_a_broken_installation_is_refused_at_its_first_use_and_ever_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, change: tuple[str, str], said: str
) -> None:
    install(tmp_path, monkeypatch, name, change=change)
    for _ in range(2):
        with pytest.raises(DenseUnavailable, match=f"dense attention {name} .*{said}.*choose another"):
            dense_attention(*qkv(), backend=name)


def test_a_package_that_is_not_there_is_no_choice(card: Any) -> None:
    for name in MODULES:
        with pytest.raises(DenseUnavailable, match=rf"{name} cannot run: it is not installed \(pip install "):
            dense_choices(name, card((9, 0)), HALF, 128)
    assert dense_choices("auto", card((9, 0)), HALF, 128) == ("sdpa", "flash")
    assert dense_choices("auto", card((8, 6)), HALF, 128) == ("sdpa", "cudnn")
    assert dense_choices("auto", torch.device("cpu"), HALF, 128) == ("sdpa",)
    with pytest.raises(ValueError, match=r"backend is 'fa5'; valid are auto, sdpa, cudnn, .*, sage"):
        dense_choices("fa5", torch.device("cpu"), HALF, 128)


def test_auto_takes_the_fastest_that_fits_and_never_a_quantised_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, card: Any
) -> None:
    install(tmp_path, monkeypatch, *MODULES)
    assert dense_choices("auto", card((9, 0)), HALF, 128) == ("fa4", "fa3", "sdpa", "flash")
    assert dense_choices("auto", card((10, 0)), HALF, 128) == ("fa4", "sdpa", "flash")
    assert dense_choices("auto", card((8, 0)), HALF, 128)[0] == "sdpa", "where nobody measured them"
    assert dense_choices("auto", card((9, 0)), torch.float32, 128) == ("sdpa",)
    assert dense_choices("auto", card((9, 0), hip="6.4"), HALF, 128) == ("sdpa",)
    assert dense_choices("auto", torch.device("cpu"), HALF, 128) == ("sdpa",)
    assert dense_choices("sage", card((9, 0)), HALF, 128) == ("sage", "sdpa"), "compared with an exact one"
    assert dense_choices("fa3", card((9, 0)), HALF, 128) == ("fa3",)


@pytest.mark.parametrize(
    ("name", "capability", "dtype", "head_dim", "said"),
    [
        ("fa4", (9, 0), HALF, 256, None),
        ("fa4", (10, 0), HALF, 256, None),
        ("fa4", (10, 0), HALF, 192, "multiples of 8 up to 128 and 256 and this is 192"),
        ("fa4", (9, 0), HALF, 100, "multiples of 8 up to 256 and this is 100"),
        ("fa4", (7, 5), HALF, 128, r"this GPU has 7\.5"),
        ("fa4", (9, 0), torch.float32, 128, "the dtype is float32"),
        ("fa3", (10, 0), HALF, 128, r"capability 8\.x, 9\.x and this GPU has 10\.0"),
        ("sage", (9, 0), HALF, 256, "up to 128 and this is 256"),
        ("cudnn", (7, 5), torch.float16, 128, "no such kernel for float16"),
        ("sdpa", (7, 5), torch.float16, 128, None),
    ],
)
def test_what_does_not_fit_is_said(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    card: Any,
    name: str,
    capability: tuple[int, int],
    dtype: torch.dtype,
    head_dim: int,
    said: str | None,
) -> None:
    install(tmp_path, monkeypatch, *MODULES)
    obstacle = dense_obstacle(name, card(capability), dtype, head_dim)
    if said is None:
        assert obstacle is None
        return
    assert obstacle is not None
    with pytest.raises(DenseUnavailable, match=said):
        dense_choices(name, card(capability), dtype, head_dim)


def test_on_a_cpu_nothing_but_torch_s_own_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, *MODULES)
    for name in ("fa4", "cudnn"):
        with pytest.raises(DenseUnavailable, match=r"needs an NVIDIA GPU|needs a GPU"):
            dense_choices(name, torch.device("cpu"), HALF, 128)
