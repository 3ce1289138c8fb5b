"""One clip by several processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapters import write
from loading import CLOSE, EXACT, PAPER, load
from tiny_families import TINY, latents_of

from vmonarch_cli.errors import InputError
from vmonarch_cli.pipeline.swap import swapped
from vmonarch_cli.plan.setup import Setup
from vmonarch_cli.plan.tuned import read
from vmonarch_cli.presets import Preset

WARM = Preset(name="warm", warm_start=True, band=1)
pytestmark = pytest.mark.usefixtures("one_thread")


_WORKER = """
import sys
import torch
sys.path.insert(0, {here!r})
from tiny_families import TINY, latents_of
from vmonarch_cli.pipeline.swap import swapped
from vmonarch_cli.pipeline.load import load_pipeline
from vmonarch_cli.presets import Preset
from vmonarch_cli.machine.torchrun import read_rank
torch.set_num_threads(1)
tiny = TINY[{name!r}]
pipeline = load_pipeline({folder!r}, device=torch.device("cpu"), dtype=torch.float32, share_clip=True)
made = {{}}
for preset in (Preset(name="exact", band=1024), Preset(name="paper"), Preset(name="warm", warm_start=True, band=1)):
    with swapped(pipeline, preset) as session:
        made[preset.name] = latents_of(pipeline, tiny)
    found = session.coverage()
    made[preset.name + " calls"] = torch.tensor([found.structured + found.dense.get("the structure is exact", 0)])
if read_rank().is_main:
    torch.save(made, {out!r})
"""

_TUNED_WORKER = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, {here!r})
from tiny_families import TINY, latents_of
from vmonarch_cli.pipeline.swap import swapped
from vmonarch_cli.pipeline.load import load_pipeline
from vmonarch_cli.plan.setup import Setup
from vmonarch_cli.plan.tuned import read
from vmonarch_cli.machine.torchrun import read_rank
torch.set_num_threads(1)
adapter = read(Path({adapter!r}))
setup = Setup(offload="none", tuned=(adapter,))
pipeline = load_pipeline(
    {folder!r}, device=torch.device("cpu"), dtype=torch.float32, share_clip=True, setup=setup
)
made = {{}}
for steps in (0, 1):
    preset = adapter.adapter.made_for.model_copy(update={{"dense_steps": steps}})
    with swapped(pipeline, preset, adapter=adapter.layer_name):
        made[str(steps)] = latents_of(pipeline, TINY[{name!r}])
if read_rank().is_main:
    torch.save(made, {out!r})
"""


@pytest.mark.parametrize(
    "name",
    [
        *("wan", "ltx-video"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("wan-two-stage", "wan-i2v", "ltx-video-i2v")),
    ],
)
def test_two_processes_equal_one(folders: dict[str, Path], name: str, tmp_path: Path) -> None:
    tiny = TINY[name]
    made = by_two_processes(tmp_path, _WORKER, name=name, folder=str(folders[name]))
    pipeline = load(folders[name])
    for preset in (EXACT, PAPER, WARM):
        with swapped(pipeline, preset):
            alone = latents_of(pipeline, tiny)
        torch.testing.assert_close(made[preset.name], alone, **CLOSE)
        assert int(made[f"{preset.name} calls"]) == tiny.layers * tiny.forwards * 2


def test_a_tuned_adapter_works_in_two_processes_as_in_one(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folders["wan"]
    adapter = read(write(folder, tmp_path / "warm.safetensors", WARM))
    pipeline = load(folder, setup=Setup(offload="none", tuned=(adapter,)))
    made = by_two_processes(tmp_path, _TUNED_WORKER, name="wan", folder=str(folder), adapter=adapter.path)
    for steps in (0, 1):
        with swapped(pipeline, WARM.model_copy(update={"dense_steps": steps}), adapter=adapter.layer_name):
            alone = latents_of(pipeline, TINY["wan"])
        torch.testing.assert_close(made[str(steps)], alone, **CLOSE)
    assert not torch.allclose(made["0"], made["1"], **CLOSE)


def by_two_processes(place: Path, script: str, **words: str) -> dict[str, torch.Tensor]:
    """What two processes of a script save as `out`."""
    out, file = place / "latents.pt", place / "worker.py"
    here = str(Path(__file__).parents[1] / "support")
    file.write_text(script.format(here=here, out=str(out), **words))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    base = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, str(file)],
            env={**base, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [worker.communicate(timeout=120)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], errors
    made: dict[str, torch.Tensor] = torch.load(out)
    return made


def test_a_family_without_a_plan_says_so(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="diffusers has no context-parallel plan for it"):
        load(folders["hunyuan-video"], share_clip=True)
    with pytest.raises(
        InputError, match="LTX2VideoTransformer3DModel cannot be split over 2 processes: its sound attends to all"
    ):
        load(folders["ltx-2"], share_clip=True)
    with pytest.raises(InputError, match="over 2 processes: its sequence packs text and sound with the video"):
        load(folders["minimax-h3"], share_clip=True)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InputError, match="3 processes cannot share the 2 heads of WanTransformer3DModel evenly"):
        load(folders["wan"], share_clip=True)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(InputError, match="4 processes cannot share the 2 heads of WanTransformer3DModel evenly"):
        load(folders["wan"], share_clip=True)
