"""`--quantize`: projections that compute in 8 bits, what they leave alone, and machines that cannot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from loading import CPU, EXACT, PAPER, load
from tiny_families import TINY, latents_of
from typer.testing import CliRunner, Result

from vmonarch_cli.cli.app import app
from vmonarch_cli.clip.record import plan_again
from vmonarch_cli.errors import DeviceError, InputError
from vmonarch_cli.media.paths import record_path
from vmonarch_cli.models.catalogue import ENTRIES, PIPELINES
from vmonarch_cli.models.wan import WAN21_14B
from vmonarch_cli.pipeline import load as loading_module
from vmonarch_cli.pipeline.doctor import EXAMINATIONS
from vmonarch_cli.pipeline.preflight import check_machine
from vmonarch_cli.pipeline.quantize import compute_in, projections
from vmonarch_cli.pipeline.swap import swapped
from vmonarch_cli.plan import memory
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve
from vmonarch_cli.plan.setup import Setup

pytestmark = pytest.mark.usefixtures("one_thread")
pytest.importorskip("torchao")
ON_CPU = "which needs an NVIDIA GPU of compute capability 8.9 or later, and this run is on the CPU"


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the CPU had 8-bit arithmetic of its own; torch computes it, slowly."""
    monkeypatch.setattr(loading_module, "check_quantize", lambda *arguments: None)
    monkeypatch.setattr("torchao.quantization.quant_api._check_hardware_support", lambda granularity: None)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Pretends that there is a GPU of a compute capability."""

    def of(major: int, minor: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 << 30, 80 << 30))
        monkeypatch.setattr(torch.version, "cuda", "13.0")

    return of


@pytest.mark.parametrize("name", [name for name in TINY if not name.startswith("minimax")])
def test_projections_compute_in_8_bits_and_are_close(folders: dict[str, Path], name: str) -> None:
    tiny = TINY[name]
    pipeline = load(folders[name])
    stock = latents_of(pipeline, tiny)
    count = sum(compute_in(transformer, "int8", CPU) for transformer in _transformers(pipeline))
    assert count == sum(len(projections(transformer)) for transformer in _transformers(pipeline)) > 0
    with swapped(pipeline, EXACT):
        latents = latents_of(pipeline, tiny)
    assert 0 < float((latents - stock).norm() / stock.norm()) < 0.05


def _transformers(pipeline: Any) -> list[Any]:
    return [pipeline.transformer, *filter(None, [getattr(pipeline, "transformer_2", None)])]


def test_what_is_converted_and_what_stays(folders: dict[str, Path], able: None) -> None:
    loaded = load(folders["hunyuan-video"], setup=Setup(offload="none", quantize="int8"))
    converted = {
        name
        for name, layer in loaded.transformer.named_modules()
        if isinstance(layer, torch.nn.Linear) and type(layer.weight.data) is not torch.Tensor
    }
    assert converted == set(projections(loaded.transformer))
    assert {
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.0.ff.net.2",
        "single_transformer_blocks.0.proj_mlp",
    } <= converted
    for part in ("norm", "embed", "context_embedder"):
        assert not [name for name in converted if part in name]
    assert "proj_out" not in converted
    assert "norm1.linear" in " ".join(name for name, _ in loaded.transformer.named_modules()), (
        "there is one to leave out"
    )


def test_fp8_has_scales_for_rows_and_computes_beside_bfloat16(folders: dict[str, Path], able: None) -> None:
    tiny = TINY["wan"]
    options: dict[str, Any] = {"device": CPU, "dtype": torch.bfloat16}
    plain = loading_module.load_pipeline(str(folders["wan"]), **options)
    pipeline = loading_module.load_pipeline(str(folders["wan"]), **options, setup=Setup(offload="none", quantize="fp8"))
    weight = pipeline.transformer.blocks[0].ffn.net[2].weight
    assert (weight.qdata.dtype, tuple(weight.scale.shape)) == (torch.float8_e4m3fn, (weight.shape[0], 1))
    latents, stock = latents_of(pipeline, tiny).float(), latents_of(plain, tiny).float()
    assert 0 < float((latents - stock).norm() / stock.norm()) < 0.1


def test_fp8_is_the_same_within_compiled_blocks(able: None) -> None:
    """There torchao's operations take the place of the kernel that quantises activations."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.GELU(), torch.nn.Linear(96, 32, bias=False))
    blocks = torch.nn.Module()
    blocks.blocks = torch.nn.ModuleList([layers.to(torch.bfloat16).requires_grad_(False)])
    x = torch.randn(2, 40, 64, dtype=torch.bfloat16)
    stock = layers(x)
    assert compute_in(blocks, "fp8", CPU) == 2
    eager, compiled = layers(x), torch.compile(layers, backend="aot_eager", fullgraph=True)(x)
    errors = [float((found - stock).float().norm() / stock.float().norm()) for found in (eager, compiled)]
    assert all(0.01 < error < 0.1 for error in errors)
    assert errors[0] == pytest.approx(errors[1], rel=0.1)


@pytest.mark.parametrize("mode", ["model", "group"])
def test_converted_weights_are_offloaded(folders: dict[str, Path], able: None, mode: str) -> None:
    latents = []
    for setup in (Setup(offload="none"), Setup(offload=mode, quantize="int8")):
        pipeline = load(folders["wan"], setup=setup)
        with swapped(pipeline, PAPER):
            latents.append(latents_of(pipeline, TINY["wan"]))
    assert 0 < float((latents[1] - latents[0]).norm() / latents[0].norm()) < 0.03


def test_a_lora_keeps_its_own_matrices(folders: dict[str, Path], lora: Path, able: None) -> None:
    found = {}
    for kind in (None, "int8"):
        for loras in ((), (str(lora),)):
            pipeline = load(folders["wan"], setup=Setup(offload="none", quantize=kind, loras=loras))
            found[kind, bool(loras)] = latents_of(pipeline, TINY["wan"])
    layer = pipeline.transformer.blocks[0].attn1.to_q
    assert type(layer.base_layer.weight.data) is not torch.Tensor
    assert type(layer.lora_A["lora_0"].weight.data) is torch.Tensor
    plain, tuned = found[None, True], found["int8", True]
    assert float((tuned - plain).norm() / plain.norm()) < 0.05
    change = [found[kind, True] - found[kind, False] for kind in (None, "int8")]
    assert float((change[1] - change[0]).norm() / change[0].norm()) < 0.5, "the LoRA does what it does in 16 bits"


def test_a_transformer_of_odd_sides_has_nothing_to_convert(folders: dict[str, Path]) -> None:
    with pytest.raises(InputError, match=r"--quantize int8: this MiniMaxH3Transformer3DModel has no projections"):
        compute_in(load(folders["minimax-h3"]).transformer, "int8", CPU)


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_a_cpu_is_refused_before_anything_loads(tmp_path: Path, tiny_wan_folder: Path, kind: str) -> None:
    command = ("generate", "-m", str(tiny_wan_folder), "-p", "a", "--quantize", kind, "--device", "cpu")
    result = call(*command, "-o", str(tmp_path / "x.png"))
    assert result.exit_code == 2
    sentence = " ".join(result.stderr.split())
    assert f"--quantize {kind} computes in {kind}, which needs an NVIDIA GPU of compute capability" in sentence
    assert "this run is on the CPU: valid here are fp8-storage and int8-storage" in sentence
    assert not list(tmp_path.iterdir())


def test_a_card_says_what_it_can(card: Callable[[int, int], None]) -> None:
    def machine(kind: str, **more: Any) -> None:
        check_machine(resolve(GenerateRequest(prompt="a", model="wan2.1-1.3b", device="cuda", quantize=kind, **more)))

    card(8, 0)
    with pytest.raises(DeviceError, match=r"and this GPU has 8\.0: valid here are int8, fp8-storage and int8-storage"):
        machine("fp8")
    machine("int8")
    card(7, 5)
    with pytest.raises(
        DeviceError, match=r"capability 8\.0 or later, and this GPU has 7\.5: valid here are fp8-storage"
    ):
        machine("int8")
    card(9, 0)
    machine("fp8")
    with pytest.raises(InputError, match=r"fp8 computes beside bfloat16, and --dtype is float16: valid beside float16"):
        machine("fp8", dtype="float16")
    with pytest.raises(
        InputError, match=r"--offload sequential moves single tensors, .*: valid are auto, none, model and"
    ):
        machine("fp8", offload="sequential")


def test_the_library_is_refused_too(folders: dict[str, Path]) -> None:
    with pytest.raises(DeviceError, match=ON_CPU):
        load(folders["wan"], setup=Setup(offload="none", quantize="fp8"))


def test_doctor_says_what_computes(card: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    def said() -> str:
        return EXAMINATIONS["8-bit weights"]()[0].value

    assert said() == "none computes on cpu, fp8-storage and int8-storage store"
    card(8, 6)
    assert said().startswith("int8 computes on cuda:0, ")
    card(9, 0)
    assert said().startswith("fp8 and int8 compute on cuda:0, ")
    monkeypatch.setattr("vmonarch_cli.pipeline.imports.installed", lambda name: False)
    assert 'pip install "vmonarch[quantize]"' in said()


def test_a_plan_counts_what_stays_in_16_bits() -> None:
    def plan(kind: str | None) -> Any:
        return resolve(GenerateRequest(prompt="a", model="hunyuan-video", quantize=kind))

    sizes = {
        kind: memory.transformer_bytes(plan(None).model, "bfloat16", kind) for kind in (None, "fp8", "fp8-storage")
    }
    assert sizes["fp8-storage"] < sizes["fp8"] < sizes[None]
    saved = memory.peaks_of(plan(None), "bfloat16")["none"] - memory.peaks_of(plan("fp8"), "bfloat16")["none"]
    assert saved == sizes[None] - sizes["fp8"]
    assert [*memory.peaks_of(plan("fp8"), "bfloat16")] == ["none", "model", "group"]
    shown = " ".join(call("plan", "-m", "wan2.1-14b", "-p", "a", "--quantize", "fp8").stdout.split())
    assert "projections of the blocks compute in fp8, a scale for each token and each output channel" in shown
    assert "channel; not here, without an NVIDIA GPU of compute capability 8.9 or later" in shown
    shown = " ".join(call("plan", "-m", "wan2.1-14b", "-p", "a", "--quantize", "fp8-storage").stdout.split())
    assert "the transformer's wait in fp8: less memory, no gain in time" in shown


def test_int8_without_a_compiler_is_warned_of() -> None:
    def warned(**flags: Any) -> str:
        return " ".join(resolve(GenerateRequest(prompt="a", **{"model": "wan2.1-1.3b", **flags})).warnings)

    assert "int8 saves memory and, without --compile, no time: add --compile, or take fp8" in warned(quantize="int8")
    assert "diffusers compiles no CogVideoXTransformer3DModel" in warned(quantize="int8", model="cogvideox-5b")
    for flags in ({"quantize": "int8", "compile": True}, {"quantize": "fp8"}, {"quantize": "int8-storage"}):
        assert "no time" not in warned(**flags)


def test_every_transformer_has_its_share_of_projections() -> None:
    assert set(memory.PROJECTIONS) == {facts.transformer for facts in PIPELINES.values()}


BUILT = [entry for entry in ENTRIES if PIPELINES[entry.pipeline].transformer_config and entry.alias != "demo"]


@pytest.mark.parametrize("entry", BUILT, ids=lambda entry: entry.alias)
def test_the_share_of_projections_is_that_of_the_class(entry: Any) -> None:
    """Or a little less, where a class has models of several sizes."""
    facts = PIPELINES[entry.pipeline]
    assert facts.transformer_config is not None
    with torch.device("meta"):
        transformer = getattr(diffusers, facts.transformer)(**facts.transformer_config(entry))
    share = sum(layer.weight.numel() for layer in projections(transformer).values()) / entry.transformer_params
    assert 0 <= share - memory.PROJECTIONS[facts.transformer] < 0.1


def test_records_of_what_was_only_stored_keep_their_meaning(tmp_path: Path, tiny_wan_folder: Path) -> None:
    shape = ["--size", "64x64", "--num-frames", "17", "--steps", "1", "--device", "cpu"]
    made = tmp_path / "x.gif"
    command = ["generate", "-m", str(tiny_wan_folder), "-p", "a", *shape, "-o", str(made)]
    assert call(*command, "--quantize", "fp8-storage").exit_code == 0
    record = json.loads(record_path(made).read_text())
    assert (record["settings"]["quantize"]["value"], "linear_dtype" in record) == ("fp8-storage", False)
    record["settings"]["quantize"]["value"] = record["setup"]["quantize"] = "fp8"  # as earlier versions wrote it
    record_path(made).write_text(json.dumps(record))
    assert plan_again(record_path(made), None).setup.quantize == "fp8-storage"
    record["linear_dtype"] = "float8_e4m3fn"
    record_path(made).write_text(json.dumps(record))
    assert plan_again(record_path(made), None).setup.quantize == "fp8"


def test_a_clip_says_what_its_projections_computed_in(
    tmp_path: Path, tiny_wan_folder: Path, able: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmonarch_cli.pipeline.preflight._check_quantize", lambda plan, machine: None)
    shape = ["--size", "64x64", "--num-frames", "17", "--steps", "1", "--device", "cpu"]
    made = tmp_path / "x.gif"
    result = call("generate", "-m", str(tiny_wan_folder), "-p", "a", *shape, "--quantize", "int8", "-o", str(made))
    assert result.exit_code == 0, result.stderr
    assert "projections of the blocks compute in int8" in " ".join(result.stdout.split())
    assert json.loads(record_path(made).read_text())["linear_dtype"] == "int8"


def test_the_estimate_of_14b_falls_by_nearly_half() -> None:
    sixteen, eight = (memory.transformer_bytes(WAN21_14B, "bfloat16", kind) for kind in (None, "fp8"))
    assert 0.48 < 1 - eight / sixteen < 0.5


def test_profile_model_measures_it(
    tiny_wan_folder: Path, tmp_path: Path, able: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["profile", "model", "-m", str(tiny_wan_folder), "--size", "64x64", "--num-frames", "17", "--steps", "1"]
    command += ["--device", "cpu", "--json", str(tmp_path / "x.json"), "--quantize"]
    refused = call(*command, "fp8-storage")
    assert (refused.exit_code, "--quantize takes fp8 or int8, got 'fp8-storage'" in refused.stderr) == (2, True)
    refused = call(*command, "fp8")
    assert (refused.exit_code, ON_CPU in " ".join(refused.stderr.split())) == (2, True)
    monkeypatch.setattr("vmonarch_cli.pipeline.quantize.check_quantize", lambda *arguments: None)
    result = call(*command, "int8")
    assert result.exit_code == 0, result.stderr
    found = json.loads((tmp_path / "x.json").read_text())
    assert "projections of the blocks compute in int8, in every row" in found["model"]["notes"]
    assert found["settings"]["quantize"] == "int8"
