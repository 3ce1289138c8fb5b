"""The operation counts against the algorithm's unit table, and the torch-free import."""

import subprocess
import sys

import pytest

from vmonarch_kernels.cost import (
    dense_flops,
    is_exact,
    l_bytes,
    monarch_flops,
    window_frames,
)
from vmonarch_kernels.spec import Options

GRID = (13, 12, 12)
UNIT = 13 * 144 * 144 * 64 * 4
L_PRODUCT = 2 * 13 * 13 * 144 * 64 * 4


def test_dense_is_4_t_units() -> None:
    assert dense_flops(GRID, 4, 64) == 4 * 13 * UNIT


@pytest.mark.parametrize(
    ("options", "units", "l_products"),
    [
        (Options(num_steps=2), 14, 4),
        (Options(num_steps=2, first_frame=False), 10, 4),
        (Options(num_steps=3), 18, 6),
        (Options(num_steps=1, band=0), 14, 3),
        (Options(num_steps=1, band=1), 22, 3),
        (Options(num_steps=1, band=2), 30, 3),
    ],
    ids=str,
)
def test_structured_counts_follow_the_unit_table(options: Options, units: int, l_products: int) -> None:
    expected, warm = units * UNIT + l_products * L_PRODUCT, options.num_steps == 1
    assert monarch_flops(GRID, 4, 64, options=options, warm=warm) == expected
    assert monarch_flops(GRID, 4, 64, 3, options=options, warm=warm) == 3 * expected


def test_exact_structures_cost_dense() -> None:
    assert monarch_flops(GRID, 4, 64, options=Options(band=12)) == dense_flops(GRID, 4, 64)
    assert monarch_flops((1, 12, 12), 4, 64) == dense_flops((1, 12, 12), 4, 64)
    assert is_exact(13, 6)
    assert not is_exact(13, 5)
    assert window_frames(13, None) == 0


def test_the_papers_longest_clip_costs_a_tenth() -> None:
    """The figures of kernels/README.md at T = 36, P = 1456: the paper's formula gives 17.5."""
    grid = (36, 1, 1456)
    dense = dense_flops(grid, 12, 128)
    assert dense / monarch_flops(grid, 12, 128, options=Options(first_frame=False)) == pytest.approx(14.1, abs=0.1)
    assert dense / monarch_flops(grid, 12, 128) == pytest.approx(10.1, abs=0.1)


def test_l_of_wan_1_3b_at_480p() -> None:
    assert l_bytes((21, 30, 52), 12) == 1560 * 12 * 21 * 24, "rows on multiples of 8"


def test_counting_imports_no_torch() -> None:
    code = "import sys, vmonarch_kernels.cost; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
