"""Where the weights are: modes, their estimated peaks, and the choice between them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from loading import CLOSE, PAPER, load
from tiny_families import TINY, latents_of

from vmonarch_cli.clip.make import generate
from vmonarch_cli.clip.record import plan_again
from vmonarch_cli.clip.record_model import read_record
from vmonarch_cli.errors import ModelError
from vmonarch_cli.models.catalogue import ENTRIES
from vmonarch_cli.models.wan import WAN21_1_3B, WAN21_14B, WAN22_5B
from vmonarch_cli.pipeline import offload
from vmonarch_cli.pipeline.preflight import check_machine
from vmonarch_cli.pipeline.swap import swapped
from vmonarch_cli.plan import memory
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve
from vmonarch_cli.plan.setup import Setup
from vmonarch_cli.timing import Coverage

GB = 2**30
families = pytest.mark.parametrize("name", TINY)
pytestmark = pytest.mark.usefixtures("one_thread")


# accelerate's sequential mode fails when the device it offloads to is the one it offloads from, so not on a CPU.
@pytest.mark.parametrize("mode", ["model", "group"])
@families
def test_offload_changes_nothing_but_where_weights_are(folders: dict[str, Path], name: str, mode: str) -> None:
    tiny = TINY[name]
    plain = load(folders[name])
    with swapped(plain, PAPER):
        expected = latents_of(plain, tiny)
    pipeline = load(folders[name], setup=Setup(offload=mode))
    # Hooks on forward would never fetch it for its encode and decode.
    decoders = [getattr(pipeline, part) for part in ("vae", "audio_vae") if hasattr(pipeline, part)]
    hooked = [module for part in decoders for module in part.modules() if hasattr(module, "_diffusers_hook")]
    assert mode != "group" or not hooked
    with swapped(pipeline, PAPER) as session:
        latents = latents_of(pipeline, tiny)
    torch.testing.assert_close(latents, expected, **CLOSE)
    assert session.coverage() == Coverage(structured=tiny.layers * tiny.forwards * 2)


def test_estimated_peaks_fall_from_mode_to_mode() -> None:
    for entry in ENTRIES:
        d = entry.defaults
        peaks = list(memory.peaks(entry, (d.height, d.width, d.num_frames), "bfloat16").values())
        assert peaks == sorted(peaks, reverse=True)


def test_auto_picks_the_fastest_mode_that_fits() -> None:
    def mode(entry: Any, free: int, wanted: str = "auto") -> str:
        d = entry.defaults
        peaks = memory.peaks(entry, (d.height, d.width, d.num_frames), "bfloat16")
        return offload.choose(wanted, peaks, free)[0]

    assert mode(WAN21_1_3B, 80 * GB) == "none"
    assert mode(WAN21_1_3B, 23 * GB) in ("none", "model")
    assert mode(WAN21_1_3B, 11 * GB) in ("group", "sequential")
    assert mode(WAN22_5B, 23 * GB) in ("model", "group")
    assert mode(WAN21_14B, 11 * GB, "model") == "model", "a mode that was asked for is never changed"
    with pytest.raises(ModelError, match=r"does not fit the memory in any offload mode: it needs about .* are free"):
        mode(WAN21_14B, 1 * GB)
    with pytest.raises(ModelError, match=r"are free; with --set refresh=0 it needs about .*, or choose a smaller size"):
        offload.choose("auto", {"none": 2 * GB}, GB, lighter={"shared_refresh=true": 2 * GB, "refresh=0": GB // 2})


def test_tiles_are_taken_where_full_frames_do_not_fit_and_tiles_do() -> None:
    tiled, whole = {"none": 20 * GB, "model": 10 * GB}, {"none": 60 * GB, "model": 50 * GB}

    def placed(free: int, wanted: str = "auto") -> tuple[str, bool]:
        found = offload.choose(wanted, tiled, free, whole=whole)
        assert ("decoding in tiles (full frames: " in found.words) is found.tiles
        return found.mode, found.tiles

    assert placed(80 * GB) == ("none", False)
    assert placed(40 * GB) == ("none", True), "rather tiles than weights that wait off the card"
    assert placed(15 * GB) == ("model", True)
    assert placed(55 * GB, "model") == ("model", False)
    assert placed(15 * GB, "model") == ("model", True)
    assert placed(5 * GB, "model") == ("model", False), "neither fits: the user asked for it"
    with pytest.raises(ModelError, match=r"it needs about 10\.0 GiB"):
        placed(5 * GB)


def test_a_decoder_alone_takes_tiles_by_the_same_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = resolve(GenerateRequest(prompt="a cat", model="mochi-1"))
    weights = memory.weight_bytes(plan.model, "bfloat16", to_decode=True)
    whole, tiles = memory.decoding_bytes(plan.model, (480, 848, 85), "bfloat16")
    for free, expected in ((weights + whole, False), (weights + tiles, True), (weights, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        assert offload.tiles_to_decode(plan, "cuda:0", "bfloat16") is expected


def test_the_record_says_that_tiles_were_taken_and_a_rerun_takes_them(tiny_wan_folder: Path, tmp_path: Path) -> None:
    request = GenerateRequest(
        model=str(tiny_wan_folder), prompt="red", size="48x32", num_frames=17, steps=1, output=str(tmp_path / "x.mp4")
    )
    plan = resolve(request)
    for tiles in (False, True):
        machine = replace(check_machine(plan), tiles=tiles)
        decided = machine.decided(plan)
        assert decided.vae_tiling is tiles
    generate(plan, machine)
    clip, beside = tmp_path / "x.mp4", tmp_path / "x.json"
    for _ in (beside, "the clip's own record"):
        record = read_record(clip)
        assert record.decoded_in_tiles
        assert record.setting("vae_tiling") is False, "nobody asked for them"
        assert plan_again(clip, str(tmp_path / "y.mp4")).setup.vae_tiling
        beside.unlink(missing_ok=True)


def test_a_clip_that_fits_with_fewer_corrections_alone_is_told_so() -> None:
    request: dict[str, Any] = {"prompt": "a cat", "model": "wan2.1-14b"}
    balanced = resolve(GenerateRequest(**request, preset="balanced"))
    lighter, least = memory.lighter_peaks([balanced], "bfloat16"), min(memory.peaks_of(balanced, "bfloat16").values())
    assert list(lighter) == ["shared_refresh=true", "refresh=0"]
    assert lighter["refresh=0"] < 24 * GB < least
    assert lighter["refresh=0"] < lighter["shared_refresh=true"] < least
    assert not memory.lighter_peaks([resolve(GenerateRequest(**request, preset="paper"))], "bfloat16")


def test_what_is_kept_between_steps_counts_in_every_mode_that_denoises_with_it() -> None:
    shape: Any = (WAN21_14B, (720, 1280, 81), "bfloat16")
    without, with_it = memory.peaks(*shape), memory.peaks(*shape, kept=31 * GB)
    assert with_it["none"] - without["none"] == 31 * GB
    assert all(with_it[mode] > without[mode] for mode in without)
