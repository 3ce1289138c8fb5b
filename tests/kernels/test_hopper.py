"""The Hopper kernels: that they compile for their chip is shown on any machine (the backward ones: `test_backward.py`),
that they compute the right thing on that chip alone (they have no interpreter).
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from vmonarch_kernels import Inputs, Options, attend, monarch_factors
from vmonarch_kernels.configs import chip, hopper_config

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
triton = pytest.importorskip("triton")

# Compiled in a process of its own: the suite's has Triton's interpreter switched on where there is no GPU.
COMPILE = """
import json, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from vmonarch_kernels._hopper import attend_hopper_kernel as kernel
from vmonarch_kernels.configs import hopper_config

with_k, with_v, split, head_dim = json.loads(sys.argv[1])
config = hopper_config(head_dim, torch.bfloat16, (9, 0), with_k=with_k, with_v=with_v)
constants = dict(
    BLOCK_N=config.block_n, BLOCK_D=head_dim, TAIL=32, WITH_K=with_k, WITH_V=with_v, WITH_LSE=not with_k, SPLIT=split,
    STAGES=config.stages, Q_STAGES=config.query_stages,
)
# The launch has None for what is not written.
unused = [] if with_k else ["p_rk", "p_c"]
unused += [] if with_v else ["p_o"]
unused += ["p_lse"] if with_k else []
constants.update(dict.fromkeys(unused))
signature, attributes = {}, {}
for i, name in enumerate(kernel.arg_names):
    if name in constants:
        signature[name] = "constexpr"
    elif name.startswith("d_"):
        block = [64 if name == "d_q" else config.block_n, head_dim]
        signature[name] = f"tensordesc<bf16{block},{gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)!r}>"
    elif name.startswith("p_"):
        signature[name] = "*fp32" if name in ("p_c", "p_lse") or (split and name == "p_o") else "*bf16"
        attributes[(i,)] = [["tt.divisibility", 16]]
    else:
        signature[name] = "fp32" if name == "qk_scale" else "i32"
indexed = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
source = GluonASTSource(fn=kernel, signature=signature, constexprs=indexed, attrs=attributes)
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=4, maxnreg=168))
print(json.dumps({"shared": compiled.metadata.shared, "ptx": compiled.asm["ptx"]}))
"""


@pytest.mark.parametrize(
    ("with_k", "with_v", "split", "head_dim"),
    [(True, False, False, 128), (True, True, False, 128), (False, True, True, 128), (True, True, False, 64)],
)
def test_it_compiles_for_the_chip(with_k: bool, with_v: bool, split: bool, head_dim: int) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    arguments = json.dumps([with_k, with_v, split, head_dim])
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["shared"] <= chip(torch.device("cpu")).shared_memory
    assert "wgmma.mma_async" in result["ptx"]
    assert "cp.async.bulk.tensor" in result["ptx"]
    # One group more and one fewer registers than the launch gives: the compiler took the warp groups apart.
    assert "setmaxnreg.inc.sync.aligned.u32 \t240" in result["ptx"]
    assert "setmaxnreg.dec.sync.aligned.u32 \t24" in result["ptx"]


def test_other_chips_and_dtypes_take_the_plain_kernel() -> None:
    assert hopper_config(128, torch.bfloat16, (9, 0), with_k=True, with_v=False) is not None
    for head_dim, dtype, capability in (
        (128, torch.float32, (9, 0)),
        (128, torch.bfloat16, (8, 9)),
        (128, torch.bfloat16, (10, 0)),
        (96, torch.bfloat16, (9, 0)),
        (256, torch.bfloat16, (9, 0)),
    ):
        assert hopper_config(head_dim, dtype, capability, with_k=True, with_v=True) is None


@pytest.mark.skipif(not HOPPER, reason="needs compute capability 9.0")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("band", [None, 0, 1])
@pytest.mark.parametrize(
    ("frames", "positions", "heads", "head_dim", "batch"),
    # last key tiles of every width, dead warp groups (rows that end in a tile's first half), several batches
    [(2, 257, 2, 64, 1), (7, 144, 3, 128, 2), (5, 192, 2, 128, 1), (3, 1560, 2, 128, 1), (13, 250, 1, 64, 3)],
)
def test_it_computes_what_the_reference_does(
    monkeypatch: pytest.MonkeyPatch,
    frames: int,
    positions: int,
    heads: int,
    head_dim: int,
    batch: int,
    band: int | None,
    dtype: torch.dtype,
) -> None:
    from vmonarch_kernels import launch

    monkeypatch.setattr(launch, "MIN_WAVES", 0)
    generator = torch.Generator().manual_seed(0)
    size = (batch, frames * positions, heads, head_dim)
    q, k, v = (torch.randn(size, generator=generator).to("cuda", dtype) for _ in range(3))
    inputs, options = Inputs(q, k, v, (frames, 1, positions)), Options(band=band)
    expected = monarch_factors(inputs, options).out
    eager = monarch_factors(inputs, options, compute_dtype=dtype).out
    out, _ = attend(inputs, options, impl="triton")

    def error(value: torch.Tensor) -> float:
        return float((value.double() - expected).norm() / expected.norm())

    assert error(out) <= 1.5 * max(error(eager), torch.finfo(dtype).eps / 4)


@pytest.mark.skipif(not HOPPER, reason="needs compute capability 9.0")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options", [Options(), Options(1, first_frame=False), Options(1, band=0), Options(1, band=1, first_frame=False)]
)
@pytest.mark.parametrize(
    ("frames", "positions", "heads", "head_dim", "batch"),
    [(2, 257, 2, 64, 1), (7, 144, 3, 128, 2), (3, 192, 2, 128, 1), (5, 97, 1, 64, 3)],
)
def test_its_gradients_are_those_of_the_plain_kernels(
    monkeypatch: pytest.MonkeyPatch,
    frames: int,
    positions: int,
    heads: int,
    head_dim: int,
    batch: int,
    options: Options,
    dtype: torch.dtype,
) -> None:
    from vmonarch_kernels import launch_backward

    generator = torch.Generator().manual_seed(0)
    size = (batch, frames * positions, heads, head_dim)
    q, k, v, grad = (torch.randn(size, generator=generator).to("cuda", dtype) for _ in range(4))

    def gradients(tiles: float) -> list[torch.Tensor]:
        monkeypatch.setattr(launch_backward, "MIN_WAVES", tiles)
        wanted = [x.clone().requires_grad_() for x in (q, k, v)]
        out, _ = attend(Inputs(*wanted, (frames, 1, positions)), options, impl="triton")
        return list(torch.autograd.grad(out, wanted, grad))

    for found, expected in zip(gradients(0), gradients(float("inf")), strict=True):
        difference = (found.double() - expected.double()).norm() / expected.double().norm()
        assert float(difference) < 4 * torch.finfo(dtype).eps


@pytest.mark.skipif(not HOPPER, reason="needs compute capability 9.0")
@pytest.mark.parametrize(("frame", "batch"), [(2, 1), (4, 2)])
def test_its_gradients_of_one_frame_leave_what_lies_behind_it_alone(
    monkeypatch: pytest.MonkeyPatch, frame: int, batch: int
) -> None:
    from vmonarch_kernels import frame_attention, launch_backward

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, 5 * 97, 2, 128, generator=generator).to("cuda", torch.bfloat16) for _ in range(3))
    found = []
    for tiles in (0, float("inf")):
        monkeypatch.setattr(launch_backward, "MIN_WAVES", tiles)
        # Memory that torch hands out next is not finite.
        del_me = torch.full((1 << 22,), float("nan"), device="cuda", dtype=torch.bfloat16)
        del del_me
        wanted = [x.clone().requires_grad_() for x in (q, k, v)]
        out = frame_attention(*wanted, (5, 1, 97), frame, impl="triton")
        found.append(torch.autograd.grad(out.float().square().sum(), wanted))
    for ours, expected in zip(*found, strict=True):
        assert float((ours.double() - expected.double()).norm() / expected.double().norm()) < 0.03
