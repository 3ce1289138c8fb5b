"""What may be done to a pipeline beside its attention, with the swap: narrow weights, tiles, caches, compilation."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from loading import EXACT, PAPER, facts_of, load
from tiny_families import TINY, image, latents_of

from vmonarch_cli.errors import InputError
from vmonarch_cli.models.base import CACHES
from vmonarch_cli.models.catalogue import ENTRIES
from vmonarch_cli.models.lora_files import parse_lora
from vmonarch_cli.models.wan import WAN21_1_3B, WAN22_5B
from vmonarch_cli.pipeline import apply_setup
from vmonarch_cli.pipeline.swap import swapped
from vmonarch_cli.plan import checks
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve
from vmonarch_cli.plan.setup import Setup, check_additions
from vmonarch_cli.text import with_article
from vmonarch_cli.timing import Coverage

Record = Callable[[str, object], None]
families = pytest.mark.parametrize("name", TINY)
pytestmark = pytest.mark.usefixtures("one_thread")


@families
@pytest.mark.parametrize("kind", ["fp8-storage", "int8-storage"])
def test_narrow_weights_run_and_are_close(folders: dict[str, Path], name: str, kind: str) -> None:
    tiny, plain = TINY[name], load(folders[name])
    pipeline = load(folders[name], setup=Setup(offload="none", quantize=kind))
    narrow = torch.float8_e4m3fn if kind == "fp8-storage" else torch.int8
    assert narrow in {dtype for p in pipeline.transformer.parameters() for dtype in stored_dtypes(p)}
    stock = latents_of(plain, tiny)
    with swapped(pipeline, EXACT) as session:
        latents = latents_of(pipeline, tiny)
    assert 0 < float((latents - stock).norm() / stock.norm()) < 0.2
    assert session.coverage() == Coverage(dense={"the structure is exact": tiny.layers * tiny.forwards * 2})


def stored_dtypes(parameter: torch.Tensor) -> set[torch.dtype]:
    """Of a parameter, or of the tensors inside one of torchao's."""
    names = parameter.__tensor_flatten__()[0] if hasattr(parameter, "__tensor_flatten__") else []
    return {parameter.dtype, *(getattr(parameter, name).dtype for name in names)}


def test_a_quiet_run_with_int8_prints_its_path_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    """In a process of its own: libraries warn when they are imported."""
    tiny = TINY["wan"]
    shape = ["--size", f"{tiny.width}x{tiny.height}", "--num-frames", str(tiny.num_frames), "--steps", "1"]
    command = [sys.executable, "-m", "vmonarch_cli", "generate", "-m", str(folders["wan"]), "-p", "a red circle"]
    command += ["--preset", "paper"]
    done = subprocess.run(
        [*command, *shape, "--quantize", "int8-storage", "--device", "cpu", "--quiet", "-o", str(tmp_path / "x.gif")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path / 'x.gif'}\n", "")


def test_int8_without_torchao_says_what_to_install(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "torchao" else found(name, *a))
    with pytest.raises(InputError, match=r"needs torchao: pip install \"vmonarch\[quantize\]\", or use fp8-storage"):
        load(folders["wan"], setup=Setup(offload="none", quantize="int8-storage"))


def test_vae_tiling_is_switched_on(folders: dict[str, Path]) -> None:
    assert load(folders["wan"], setup=Setup(offload="none", vae_tiling=True)).vae.use_tiling


@families
@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_skips_calls_that_are_counted_apart(
    folders: dict[str, Path], name: str, cache: str, monkeypatch: pytest.MonkeyPatch, record_property: Record
) -> None:
    tiny, facts, steps = TINY[name], facts_of(folders[name]), 12
    if cache not in facts.caches:
        record_property("refused", True)
        with pytest.raises(
            InputError, match=f"--cache {cache} does not run in {with_article(facts.name)} of diffusers: "
        ):
            check_additions(Setup(cache=cache), facts)
        return
    monkeypatch.setattr(apply_setup, "FIRST_BLOCK_THRESHOLD", 0.8)  # steps of a random model differ more
    pipeline = load(folders[name], setup=Setup(offload="none", cache=cache))
    with swapped(pipeline, PAPER) as session:
        latents = latents_of(pipeline, tiny, steps=steps)
    assert torch.isfinite(latents).all()
    coverage = session.coverage()
    assert coverage.structured == coverage.calls
    assert coverage.calls + session.skipped_calls == tiny.layers * tiny.forwards * steps
    assert session.skipped_calls > 0


def test_what_a_family_cannot_do_is_said_before_anything_loads(
    folders: dict[str, Path], lora: Path, tmp_path: Path
) -> None:
    for name, flags, sentence in (
        ("cogvideox-5b", {"compile": True}, "--compile: diffusers names no repeated blocks for CogVideoXTransformer3D"),
        ("allegro", {"loras": (str(lora),)}, "--lora: diffusers loads no LoRA into an AllegroPipeline"),
        ("hunyuan-video-i2v", {"cache": "first-block"}, r"--cache first-block does not run in a .*: only pab can"),
        ("ltx-2", {"cache": "first-block"}, "LTX2Pipeline of diffusers: only pab and taylorseer can"),
        ("kandinsky-5", {"cache": "pab"}, "--cache pab does not run in a Kandinsky5T2VPipeline of .*: no cache can"),
    ):
        first = tmp_path / "first.png"
        image().save(first)
        taken = {"image": str(first)} if "image" in TINY[name].options else {}
        shape = {"height": TINY[name].height, "width": TINY[name].width, "num_frames": TINY[name].num_frames}
        wanted: dict[str, Any] = {"model": str(folders[name]), "prompt": "a red circle", **shape, **taken, **flags}
        with pytest.raises(InputError, match=sentence):
            resolve(GenerateRequest(**wanted))


@families
def test_blocks_are_compiled_where_diffusers_names_them(folders: dict[str, Path], name: str) -> None:
    facts = facts_of(folders[name])
    assert facts.compiles == bool(getattr(diffusers, facts.transformer)._repeated_blocks)


def test_flags_say_what_is_valid(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--cache takes first-block, pab or taylorseer, got 'firstblock' \(did you"):
        checks.one_of("--cache", "firstblock", ("first-block", "pab", "taylorseer"))
    with pytest.raises(InputError, match=r"there is no LoRA nowhere\.safetensors: --lora takes a \.safetensors file"):
        parse_lora("nowhere.safetensors:0.5")
    pickle = tmp_path / "lora.bin"
    pickle.write_bytes(b"")
    with pytest.raises(InputError, match=r"is not a \.safetensors file: pickled weights can run code"):
        parse_lora(str(pickle))
    assert parse_lora("someone/some-lora:0.75") == ("someone/some-lora", 0.75, None)


def test_images_are_checked_before_anything_loads(tmp_path: Path) -> None:
    entries = {entry.alias: entry for entry in ENTRIES}
    with pytest.raises(InputError, match=r"wan2\.1-i2v-480p continues a picture and none was given: add --image FILE"):
        checks.image(entries["wan2.1-i2v-480p"], None)
    with pytest.raises(InputError, match=r"wan2\.1-1\.3b makes clips from text alone: leave out --image"):
        checks.image(WAN21_1_3B, "x.png")
    with pytest.raises(InputError, match=r"there is no image /nowhere/x\.png"):
        checks.image(WAN22_5B, "/nowhere/x.png")
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"not a picture")
    with pytest.raises(InputError, match=r"bad\.png cannot be read: give a PNG, JPEG or WebP file"):
        checks.image(WAN22_5B, str(bad))
