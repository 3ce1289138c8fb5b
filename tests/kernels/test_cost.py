"""The operation counts against the algorithm's unit table, and the torch-free import."""

import subprocess
import sys

import pytest

from vmonarch_kernels.cost import (
    dense_flops,
    is_exact,
    monarch_flops,
    paper_reduction,
    warm_state_bytes,
    window_frames,
)

GRID = (13, 12, 12)
UNIT = 13 * 144 * 144 * 64 * 4
L_PRODUCT = 2 * 13 * 13 * 144 * 64 * 4


def test_dense_is_4_t_units() -> None:
    assert dense_flops(GRID, 4, 64) == 4 * 13 * UNIT


@pytest.mark.parametrize(
    ("options", "units", "l_products"),
    [
        ({"num_steps": 2}, 14, 4),
        ({"num_steps": 2, "first_frame": False}, 10, 4),
        ({"num_steps": 3}, 18, 6),
        ({"num_steps": 1, "band": 0, "warm": True}, 14, 3),
        ({"num_steps": 1, "band": 1, "warm": True}, 22, 3),
        ({"num_steps": 1, "band": 2, "warm": True}, 30, 3),
    ],
    ids=str,
)
def test_structured_counts_follow_the_unit_table(options: dict[str, int], units: int, l_products: int) -> None:
    assert monarch_flops(GRID, 4, 64, **options) == units * UNIT + l_products * L_PRODUCT  # type: ignore[arg-type]
    assert monarch_flops(GRID, 4, 64, 3, **options) == 3 * (units * UNIT + l_products * L_PRODUCT)  # type: ignore[arg-type]


def test_exact_structures_cost_dense() -> None:
    assert monarch_flops(GRID, 4, 64, band=12) == dense_flops(GRID, 4, 64)
    assert monarch_flops((1, 12, 12), 4, 64) == dense_flops((1, 12, 12), 4, 64)
    assert is_exact(13, 6)
    assert not is_exact(13, 5)
    assert window_frames(13, None) == 0


def test_paper_headline_figure() -> None:
    assert paper_reduction(36, 1456) == pytest.approx(17.5, abs=0.1)


def test_warm_state_of_wan_1_3b_at_480p() -> None:
    assert warm_state_bytes((21, 30, 52), 12) == 1560 * 12 * 21 * 24, "rows on multiples of 8"


def test_counting_imports_no_torch() -> None:
    code = "import sys, vmonarch_kernels.cost; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
