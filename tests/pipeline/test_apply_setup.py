"""What may be done to a pipeline beside its attention, with the swap: memory, LoRA, caches, several processes."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from tiny_families import TINY, image, latents_of

from vmonarch_cli.errors import InputError, ModelError
from vmonarch_cli.models.base import CACHES, PipelineFacts
from vmonarch_cli.models.catalogue import ENTRIES, PIPELINES
from vmonarch_cli.models.registry import find_model
from vmonarch_cli.models.wan import WAN21_1_3B, WAN21_14B, WAN22_5B
from vmonarch_cli.pipeline import apply_setup, offload
from vmonarch_cli.pipeline.load import load_pipeline
from vmonarch_cli.pipeline.swap import swapped
from vmonarch_cli.plan import checks, memory
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve
from vmonarch_cli.plan.setup import Setup, check_additions, parse_lora
from vmonarch_cli.presets import Preset
from vmonarch_cli.timing import Coverage

CPU = torch.device("cpu")
EXACT = Preset(name="exact", band=1024)
PAPER = Preset(name="paper")
WARM = Preset(name="warm", warm_start=True, band=1)
CLOSE: dict[str, Any] = {"rtol": 2e-4, "atol": 2e-4}
GB = 2**30
Record = Callable[[str, object], None]
families = pytest.mark.parametrize("name", TINY)


pytestmark = pytest.mark.usefixtures("one_thread")


class Folders(dict[str, Path]):
    """Every family's checkpoint on disk, written when a test first asks for it."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        super().__init__()
        self.factory = factory

    def __missing__(self, name: str) -> Path:
        self[name] = self.factory.mktemp("models") / name
        TINY[name].build().save_pretrained(self[name], safe_serialization=True)
        return self[name]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory)


def facts_of(folder: Path) -> PipelineFacts:
    """What is known of a folder's pipeline class."""
    return PIPELINES[find_model(str(folder))[0].pipeline]


def load(folder: Path, **options: Any) -> Any:
    return load_pipeline(str(folder), device=CPU, dtype=torch.float32, **options)


# Memory


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
    assert mode != "group" or not any(hasattr(module, "_diffusers_hook") for module in pipeline.vae.modules())
    with swapped(pipeline, PAPER) as session:
        latents = latents_of(pipeline, tiny)
    torch.testing.assert_close(latents, expected, **CLOSE)
    assert session.coverage() == Coverage(structured=tiny.layers * tiny.forwards * 2)


@families
@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_narrow_weights_run_and_are_close(folders: dict[str, Path], name: str, kind: str) -> None:
    tiny, plain = TINY[name], load(folders[name])
    pipeline = load(folders[name], setup=Setup(offload="none", quantize=kind))
    narrow = torch.float8_e4m3fn if kind == "fp8" else torch.int8
    assert narrow in {dtype for p in pipeline.transformer.parameters() for dtype in stored_dtypes(p)}
    stock = latents_of(plain, tiny)
    with swapped(pipeline, EXACT) as session:
        latents = latents_of(pipeline, tiny)
    assert 0 < float((latents - stock).norm() / stock.norm()) < 0.2
    assert session.coverage() == Coverage(structured=tiny.layers * tiny.forwards * 2)


def stored_dtypes(parameter: torch.Tensor) -> set[torch.dtype]:
    """Of a parameter, or of the tensors inside one of torchao's."""
    names = parameter.__tensor_flatten__()[0] if hasattr(parameter, "__tensor_flatten__") else []
    return {parameter.dtype, *(getattr(parameter, name).dtype for name in names)}


def test_a_quiet_run_with_int8_prints_its_path_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    """In a process of its own: libraries warn when they are imported."""
    tiny = TINY["wan"]
    shape = ["--size", f"{tiny.width}x{tiny.height}", "--num-frames", str(tiny.num_frames), "--steps", "1"]
    command = [sys.executable, "-m", "vmonarch_cli", "generate", "-m", str(folders["wan"]), "-p", "a red circle"]
    done = subprocess.run(
        [*command, *shape, "--quantize", "int8", "--device", "cpu", "--quiet", "-o", str(tmp_path / "x.gif")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path / 'x.gif'}\n", "")


def test_int8_without_torchao_says_what_to_install(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "torchao" else found(name, *a))
    with pytest.raises(InputError, match=r"needs torchao: pip install \"vmonarch\[int8\]\", or use --quantize fp8"):
        load(folders["wan"], setup=Setup(offload="none", quantize="int8"))


def test_vae_tiling_is_switched_on(folders: dict[str, Path]) -> None:
    assert load(folders["wan"], setup=Setup(offload="none", vae_tiling=True)).vae.use_tiling


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


# LoRA


def write_lora(folder: Path, target: Path) -> Path:
    """A LoRA of random weights for a checkpoint, in the format of its own pipeline; the file."""
    import peft

    torch.manual_seed(0)
    pipeline = load(folder)
    wanted = r".*\.(to_q|to_v|to_query|to_value)"
    pipeline.transformer.add_adapter(peft.LoraConfig(r=4, target_modules=wanted, init_lora_weights=False))
    type(pipeline).save_lora_weights(
        target, transformer_lora_layers=peft.get_peft_model_state_dict(pipeline.transformer)
    )
    return target / "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def lora(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lora(folders["wan"], tmp_path_factory.mktemp("lora"))


@families
def test_a_lora_changes_the_result_by_its_scale(
    folders: dict[str, Path], name: str, tmp_path: Path, record_property: Record
) -> None:
    tiny, facts = TINY[name], facts_of(folders[name])
    assert facts.lora == hasattr(getattr(diffusers, facts.name), "load_lora_weights")
    if not facts.lora:
        record_property("refused", True)
        with pytest.raises(InputError, match=f"--lora: diffusers loads no LoRA into a {facts.name}"):
            check_additions(Setup(loras=("any.safetensors",)), facts)
        return
    lora = write_lora(folders[name], tmp_path)

    def made(*texts: str) -> torch.Tensor:
        pipeline = load(folders[name], setup=Setup(offload="none", loras=texts))
        stock = latents_of(pipeline, tiny)
        with swapped(pipeline, EXACT):
            torch.testing.assert_close(latents_of(pipeline, tiny), stock, **CLOSE)
        return stock

    plain = made()
    full = made(str(lora))
    torch.testing.assert_close(made(f"{lora}:0"), plain, **CLOSE)
    torch.testing.assert_close(made(f"{lora}:0.5", f"{lora}:0.5"), full, **CLOSE)
    assert not torch.allclose(full, plain, **CLOSE)


def test_a_lora_of_another_model_is_refused(folders: dict[str, Path], lora: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(lora)
    other = tmp_path / "other.safetensors"
    save_file({key.replace("blocks.1.", "blocks.31."): value for key, value in tensors.items()}, other)
    with pytest.raises(ModelError, match=r"belongs to another model: this one has no layer blocks\.31\.attn1\.to_q"):
        load(folders["wan"], setup=Setup(offload="none", loras=(str(other),)))
    wide = tmp_path / "wide.safetensors"
    save_file({k: torch.cat([v, v], dim=-1) if "lora_A" in k else v for k, v in tensors.items()}, wide)
    with pytest.raises(ModelError, match=r"LoRA .*wide\.safetensors does not fit this model"):
        load(folders["wan"], setup=Setup(offload="none", loras=(str(wide),)))
    nothing = tmp_path / "nothing.safetensors"
    save_file({"weight": torch.zeros(2)}, nothing)
    with pytest.raises(ModelError, match=r"nothing\.safetensors"):
        load(folders["wan"], setup=Setup(offload="none", loras=(str(nothing),)))


# Caches and compilation


@families
@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_skips_calls_that_are_counted_apart(
    folders: dict[str, Path], name: str, cache: str, monkeypatch: pytest.MonkeyPatch, record_property: Record
) -> None:
    tiny, facts, steps = TINY[name], facts_of(folders[name]), 12
    if cache not in facts.caches:
        record_property("refused", True)
        with pytest.raises(InputError, match=f"--cache {cache} does not run in a {facts.name} of diffusers: "):
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
        ("allegro", {"loras": (str(lora),)}, "--lora: diffusers loads no LoRA into a AllegroPipeline"),
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


# Several processes

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
    made[preset.name + " calls"] = torch.tensor([session.coverage().structured])
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


# Flags


def test_flags_say_what_is_valid(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--cache takes first-block, pab or taylorseer, got 'firstblock' \(did you"):
        checks.one_of("--cache", "firstblock", ("first-block", "pab", "taylorseer"))
    with pytest.raises(InputError, match=r"there is no LoRA nowhere\.safetensors: --lora takes a \.safetensors file"):
        parse_lora("nowhere.safetensors:0.5")
    pickle = tmp_path / "lora.bin"
    pickle.write_bytes(b"")
    with pytest.raises(InputError, match=r"is not a \.safetensors file: pickled weights can run code"):
        parse_lora(str(pickle))
    assert parse_lora("someone/some-lora:0.75") == ("someone/some-lora", 0.75)


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
