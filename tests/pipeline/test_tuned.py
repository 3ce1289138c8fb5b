"""Tuned adapters in a pipeline: on where attention is structured, without a trace where it is dense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import write
from loading import CLOSE, load
from tiny_families import TINY, latents_of

from vmonarch_cli.errors import InputError, ModelError
from vmonarch_cli.pipeline.swap import swapped
from vmonarch_cli.pipeline.tuned import load_adapters, tuner_layers
from vmonarch_cli.plan.setup import AdapterFile, Setup
from vmonarch_cli.plan.tuned import read
from vmonarch_cli.presets import Preset, load_preset

pytestmark = pytest.mark.usefixtures("one_thread")
FAST = Preset(name="fast", band=0, warm_start=True)
DENSE = load_preset("dense")


@pytest.fixture(scope="module")
def adapter(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> AdapterFile:
    return read(write(folders["wan"], tmp_path_factory.mktemp("adapter") / "fast.safetensors", FAST))


@pytest.fixture(autouse=True, params=["layers", "sums"])
def kept_as(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How a LoRA is loaded that comes without a user's own: as peft's layers, or in copies of the weights."""
    if request.param == "layers":
        monkeypatch.setattr("vmonarch_cli.pipeline.tuned_weights.SUMMED_BYTES", 0)
    kind: str = request.param
    return kind


def test_a_small_lora_has_no_layers_of_its_own_on_a_cpu(
    folders: dict[str, Path], adapter: AdapterFile, kept_as: str
) -> None:
    """They would take a fifth of the forward; the clips are the same but for rounding."""
    tuned = with_adapters(folders["wan"], adapter)
    assert bool(tuner_layers([tuned.transformer])) == (kept_as == "layers")
    layered = load(folders["wan"])
    load_adapters(layered, [adapter])
    torch.testing.assert_close(made(tuned, FAST, adapter), made(layered, FAST, adapter), **CLOSE)


def made(pipeline: Any, preset: Preset, adapter: AdapterFile | None = None, name: str = "wan", **options: Any) -> Any:
    with swapped(pipeline, preset, adapter=None if adapter is None else adapter.layer_name):
        return latents_of(pipeline, TINY[name], **options)


def each_step(pipeline: Any, preset: Preset, adapter: AdapterFile | None, steps: int) -> list[torch.Tensor]:
    """Latents after every step."""
    found: list[torch.Tensor] = []

    def keep(_: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        found.append(tensors["latents"].clone())
        return tensors

    made(pipeline, preset, adapter, steps=steps, callback_on_step_end=keep)
    return found


def with_adapters(folder: Path, *adapters: AdapterFile, **setup: Any) -> Any:
    return load(folder, setup=Setup(**{"offload": "none", **setup}, tuned=adapters))


def test_it_changes_structured_attention_and_is_off_everywhere_else(
    folders: dict[str, Path], adapter: AdapterFile
) -> None:
    plain, tuned = load(folders["wan"]), with_adapters(folders["wan"], adapter)
    stock = latents_of(plain, TINY["wan"])
    assert torch.equal(latents_of(tuned, TINY["wan"]), stock), "loaded, and nobody asked for it"
    structured = made(tuned, FAST, adapter)
    assert not torch.allclose(structured, made(plain, FAST), **CLOSE)
    assert torch.equal(made(tuned, FAST, adapter), structured)
    assert torch.equal(latents_of(tuned, TINY["wan"]), stock), "off again afterwards"
    assert torch.equal(made(tuned, FAST), made(plain, FAST)), "and where no adapter was named"


def test_dense_attention_never_runs_with_it(folders: dict[str, Path], adapter: AdapterFile) -> None:
    plain, tuned = load(folders["wan"]), with_adapters(folders["wan"], adapter)
    for preset in (DENSE, load_preset("exact"), FAST.model_copy(update={"dense_steps": 2})):
        assert torch.equal(made(tuned, preset, adapter), made(plain, preset)), preset.name
    with pytest.raises(RuntimeError, match="stop"), swapped(tuned, FAST, adapter=adapter.layer_name):
        raise RuntimeError("stop")
    assert torch.equal(made(tuned, DENSE), made(plain, DENSE)), "off after an error, too"


def test_dense_steps_are_bit_identical_and_the_others_are_not(folders: dict[str, Path], adapter: AdapterFile) -> None:
    plain, tuned = load(folders["wan"]), with_adapters(folders["wan"], adapter)
    preset = FAST.model_copy(update={"dense_steps": 2})
    without, with_it = (each_step(p, preset, a, steps=4) for p, a in ((plain, None), (tuned, adapter)))
    same = [torch.equal(a, b) for a, b in zip(without, with_it, strict=True)]
    assert same == [True, True, False, False]


def test_blocks_whose_attention_is_dense_run_without_it(folders: dict[str, Path], adapter: AdapterFile) -> None:
    preset = FAST.model_copy(update={"dense_layers": 1})

    def outputs(pipeline: Any, adapter: AdapterFile | None) -> list[torch.Tensor]:
        """What each block gives in the first forward."""
        found: dict[int, torch.Tensor] = {}
        for number, block in enumerate(pipeline.transformer.blocks):
            block.register_forward_hook(lambda _m, _i, out, number=number: found.setdefault(number, out.clone()))
        made(pipeline, preset, adapter, steps=1)
        return [found[number] for number in sorted(found)]

    without = outputs(load(folders["wan"]), None)
    with_it = outputs(with_adapters(folders["wan"], adapter), adapter)
    assert [torch.equal(a, b) for a, b in zip(without, with_it, strict=True)] == [True, False]


def test_both_transformers_switch(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folders["wan-two-stage"]
    both = read(write(folder, tmp_path / "both.safetensors", FAST))
    plain, tuned = load(folder), with_adapters(folder, both)
    second = FAST.model_copy(update={"dense_steps": 3})
    for preset, same in ((FAST, False), (second, False), (DENSE, True)):
        latents = [
            made(pipeline, preset, adapter, "wan-two-stage", steps=4)
            for pipeline, adapter in ((plain, None), (tuned, both))
        ]
        assert torch.equal(*latents) == same, preset


@pytest.mark.parametrize("kind", [None, "fp8-storage", "int8-storage"])
def test_user_loras_and_narrow_weights_stay_as_they_are(
    folders: dict[str, Path], adapter: AdapterFile, lora: Path, kind: str | None
) -> None:
    setup: dict[str, Any] = {"loras": (f"{lora}:0.5",), "quantize": kind}
    alone = load(folders["wan"], setup=Setup(offload="none", **setup))
    tuned = with_adapters(folders["wan"], adapter, **setup)
    assert torch.equal(made(tuned, DENSE, adapter), made(alone, DENSE)), "dense steps have the LoRA alone"
    assert torch.equal(made(tuned, FAST), made(alone, FAST))
    assert not torch.allclose(made(tuned, FAST, adapter), made(alone, FAST), **CLOSE)
    layer = tuned.transformer.blocks[0].attn1.to_q
    assert (layer.scaling["lora_0"], layer.scaling[adapter.layer_name]) == (0.5, 1.0)
    without_lora = with_adapters(folders["wan"], adapter, quantize=kind)
    assert not torch.allclose(made(tuned, FAST, adapter), made(without_lora, FAST, adapter), **CLOSE)


@pytest.mark.parametrize("mode", ["model", "group"])
def test_offload_changes_nothing(folders: dict[str, Path], adapter: AdapterFile, mode: str) -> None:
    expected = made(with_adapters(folders["wan"], adapter), FAST, adapter)
    offloaded = with_adapters(folders["wan"], adapter, offload=mode)
    torch.testing.assert_close(made(offloaded, FAST, adapter), expected, **CLOSE)
    assert torch.equal(made(offloaded, DENSE, adapter), made(load(folders["wan"], setup=Setup(offload=mode)), DENSE))


def test_adapters_of_several_presets_take_turns(folders: dict[str, Path], adapter: AdapterFile, tmp_path: Path) -> None:
    paper = Preset(name="paper")
    other = read(write(folders["wan"], tmp_path / "paper.safetensors", paper, seed=1))
    together = with_adapters(folders["wan"], adapter, other)
    for preset, chosen in ((FAST, adapter), (paper, other), (FAST, adapter)):
        alone = with_adapters(folders["wan"], chosen)
        assert torch.equal(made(together, preset, chosen), made(alone, preset, chosen))


def test_compiled_blocks_have_a_graph_with_it_and_one_without(
    folders: dict[str, Path], adapter: AdapterFile, kept_as: str
) -> None:
    count = 2 if kept_as == "layers" else 1  # weights are inputs of a graph
    graphs: list[object] = []

    def backend(graph: Any, inputs: object) -> Any:
        graphs.append(graph)
        return graph.forward

    preset = FAST.model_copy(update={"dense_steps": 1})
    eager, compiled = (with_adapters(folders["wan"], adapter) for _ in range(2))
    torch._dynamo.reset()
    compiled.transformer.compile_repeated_blocks(backend=backend, fullgraph=True)
    torch.testing.assert_close(made(compiled, preset, adapter), made(eager, preset, adapter), **CLOSE)
    assert len(graphs) == count, "one for all blocks with it, one for all blocks without"
    torch.testing.assert_close(made(compiled, DENSE, adapter), made(eager, DENSE, adapter), **CLOSE)
    torch.testing.assert_close(made(compiled, preset, adapter), made(eager, preset, adapter), **CLOSE)
    assert len(graphs) == count, "no clip compiles anything again"
    torch._dynamo.reset()


def test_calls_that_fall_back_to_dense_are_refused(folders: dict[str, Path], adapter: AdapterFile) -> None:
    tuned = with_adapters(folders["wan"], adapter)
    with swapped(tuned.transformer, FAST, adapter=adapter.layer_name) as session:
        begin = session.begin_forward
        session.begin_forward = lambda index, grid, *a, **k: begin(index, (grid[0] + 1, *grid[1:]), *a, **k)  # type: ignore[method-assign]
        session.begin_step()
        x = torch.randn(1, 4, 5, 4, 6)
        with pytest.raises(ModelError, match="not for dense attention, and layer 0 runs dense because its token count"):
            tuned.transformer(x, timestep=torch.tensor([500.0]), encoder_hidden_states=torch.randn(1, 4, 32))


def test_a_name_that_no_layer_has_is_an_error(folders: dict[str, Path]) -> None:
    with (
        pytest.raises(ValueError, match="no layer of these transformers has an adapter named x"),
        swapped(load(folders["wan"]), FAST, adapter="x"),
    ):
        pass


def test_what_changed_since_the_plan_is_refused_before_anything_loads(
    folders: dict[str, Path], adapter: AdapterFile, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(Path(adapter.path).read_bytes())
    planned = read(copy)
    write(folders["wan"], tmp_path / "other.safetensors", FAST, seed=5).replace(copy)
    with pytest.raises(InputError, match=r"copy\.safetensors changed since the run was planned"):
        with_adapters(folders["wan"], planned)
    with pytest.raises(InputError, match=r"was tuned on other weights: those of .*/wan \(fingerprint [0-9a-f]{12}\)"):
        with_adapters(folders["wan-two-stage"], adapter)
