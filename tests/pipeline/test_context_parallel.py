"""One clip by several processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loading import CLOSE, EXACT, PAPER, load
from tiny_families import TINY, latents_of

from vmonarch_cli.errors import InputError
from vmonarch_cli.pipeline.swap import swapped
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


@pytest.mark.parametrize("name", ["wan", "wan-two-stage", "wan-i2v", "ltx-video", "ltx-video-i2v"])
def test_two_processes_equal_one(folders: dict[str, Path], name: str, tmp_path: Path) -> None:
    out, tiny = tmp_path / "latents.pt", TINY[name]
    script = tmp_path / "worker.py"
    here, folder = str(Path(__file__).parents[1] / "support"), str(folders[name])
    script.write_text(_WORKER.format(here=here, name=name, folder=folder, out=str(out)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    base = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, str(script)],
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
    made = torch.load(out)
    pipeline = load(folders[name])
    for preset in (EXACT, PAPER, WARM):
        with swapped(pipeline, preset):
            alone = latents_of(pipeline, tiny)
        torch.testing.assert_close(made[preset.name], alone, **CLOSE)
        assert int(made[f"{preset.name} calls"]) == tiny.layers * tiny.forwards * 2


def test_a_family_without_a_plan_says_so(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="diffusers has no context-parallel plan for it"):
        load(folders["hunyuan-video"], share_clip=True)
    with pytest.raises(
        InputError, match="LTX2VideoTransformer3DModel cannot be split over 2 processes: its sound attends to all"
    ):
        load(folders["ltx-2"], share_clip=True)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InputError, match="3 processes cannot share the 2 heads of WanTransformer3DModel evenly"):
        load(folders["wan"], share_clip=True)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(InputError, match="4 processes cannot share the 2 heads of WanTransformer3DModel evenly"):
        load(folders["wan"], share_clip=True)
