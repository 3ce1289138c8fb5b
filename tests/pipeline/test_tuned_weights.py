"""Tuned adapters of whole weights: in place where attention is structured, and the model's own back to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import write, write_whole
from loading import CLOSE, load
from safetensors.torch import load_file
from tiny_families import TINY, latents_of

from vmonarch_cli.errors import InputError
from vmonarch_cli.pipeline.swap import swapped
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve
from vmonarch_cli.plan.setup import AdapterFile, Setup
from vmonarch_cli.plan.tuned import read
from vmonarch_cli.presets import Preset, load_preset

pytestmark = pytest.mark.usefixtures("one_thread")
FAST = Preset(name="fast", band=0, warm_start=True)
DENSE = load_preset("dense")
WARM = ("warm_start=true", "band=0")
"""Makes `paper` the preset above."""


@pytest.fixture(scope="module")
def whole(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> AdapterFile:
    return read(write_whole(folders["wan"], tmp_path_factory.mktemp("weights") / "fast.safetensors", FAST))


def made(pipeline: Any, preset: Preset, adapter: AdapterFile | None = None, name: str = "wan", **options: Any) -> Any:
    with swapped(pipeline, preset, adapter=None if adapter is None else adapter.layer_name):
        return latents_of(pipeline, TINY[name], **options)


def with_adapters(folder: Path, *adapters: AdapterFile, **setup: Any) -> Any:
    return load(folder, setup=Setup(**{"offload": "none", **setup}, tuned=adapters))


def replaced(folder: Path, adapter: AdapterFile) -> Any:
    """The model with the adapter's weights for good."""
    pipeline = load(folder)
    for name, value in load_file(adapter.path).items():
        part, _, weight = name.partition(".")
        getattr(pipeline, part).get_parameter(weight).data = value
    return pipeline


@pytest.mark.parametrize("name", ["wan", "wan-two-stage"])
def test_structured_attention_runs_with_them_and_dense_attention_with_the_models_own(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    adapter = read(write_whole(folders[name], tmp_path / "w.safetensors", FAST))
    plain, tuned = load(folders[name]), with_adapters(folders[name], adapter)
    assert torch.equal(made(tuned, FAST, adapter, name), made(replaced(folders[name], adapter), FAST, None, name))
    assert not torch.allclose(made(tuned, FAST, adapter, name), made(plain, FAST, None, name), **CLOSE)
    for preset in (DENSE, load_preset("exact"), FAST.model_copy(update={"dense_steps": 2})):
        assert torch.equal(made(tuned, preset, adapter, name), made(plain, preset, None, name)), preset.name
    assert torch.equal(made(tuned, FAST, None, name), made(plain, FAST, None, name)), "off where none was named"
    with pytest.raises(RuntimeError, match="stop"), swapped(tuned, FAST, adapter=adapter.layer_name):
        raise RuntimeError("stop")
    assert torch.equal(latents_of(tuned, TINY[name]), latents_of(plain, TINY[name])), "off after an error, too"


def test_dense_steps_and_dense_blocks_keep_the_models_own(folders: dict[str, Path], whole: AdapterFile) -> None:
    plain, tuned = load(folders["wan"]), with_adapters(folders["wan"], whole)
    preset = FAST.model_copy(update={"dense_steps": 1, "dense_layers": 1})
    seen: list[tuple[bool, bool]] = []

    def look(module: Any, *_: Any) -> None:
        pairs = zip(plain.transformer.named_parameters(), module.named_parameters(), strict=True)
        same = {name: torch.equal(a, b) for (name, a), (_, b) in pairs}
        first = [value for name, value in same.items() if name.startswith("blocks.0.")]
        others = [value for name, value in same.items() if not name.startswith("blocks.0.")]
        seen.append((all(first), any(others)))

    tuned.transformer.register_forward_hook(look)
    made(tuned, preset, whole, steps=2)
    forwards = TINY["wan"].forwards
    assert seen == [(True, True)] * forwards + [(True, False)] * forwards


def test_several_take_turns_and_a_users_lora_stays(
    folders: dict[str, Path], whole: AdapterFile, lora: Path, tmp_path: Path
) -> None:
    paper = Preset(name="paper")
    other = read(write_whole(folders["wan"], tmp_path / "paper.safetensors", paper, seed=1))
    small = read(write(folders["wan"], tmp_path / "lora.safetensors", FAST))
    together = with_adapters(folders["wan"], whole, other, small)
    for preset, chosen in ((FAST, whole), (paper, other), (FAST, small), (FAST, whole)):
        alone = with_adapters(folders["wan"], chosen)
        assert torch.equal(made(together, preset, chosen), made(alone, preset, chosen))
    setup: dict[str, Any] = {"loras": (f"{lora}:0.5",)}
    with_lora = with_adapters(folders["wan"], whole, **setup)
    alone = load(folders["wan"], setup=Setup(offload="none", **setup))
    assert torch.equal(made(with_lora, DENSE, whole), made(alone, DENSE))
    assert not torch.allclose(made(with_lora, FAST, whole), made(alone, FAST), **CLOSE)
    assert not torch.allclose(made(with_lora, FAST, whole), made(together, FAST, whole), **CLOSE)


def test_offload_of_whole_models_and_compiled_blocks(folders: dict[str, Path], whole: AdapterFile) -> None:
    preset = FAST.model_copy(update={"dense_steps": 1})
    expected = made(with_adapters(folders["wan"], whole), preset, whole)
    offloaded = with_adapters(folders["wan"], whole, offload="model")
    torch.testing.assert_close(made(offloaded, preset, whole), expected, **CLOSE)
    graphs: list[object] = []

    def backend(graph: Any, inputs: object) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = with_adapters(folders["wan"], whole)
    compiled.transformer.compile_repeated_blocks(backend=backend, fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(made(compiled, preset, whole), expected, **CLOSE)
    torch._dynamo.reset()
    assert len(graphs) == 1, "weights are inputs of the graph"


@pytest.mark.parametrize(
    ("setup", "sentence"),
    [
        ({"quantize": "fp8"}, r"--quantize fp8: adapter .* holds whole weights"),
        ({"offload": "group"}, r"--offload group: adapter .* valid are none and model"),
        ({"offload": "sequential"}, r"--offload sequential: adapter .* valid are none and model"),
    ],
)
def test_weights_that_are_not_whole_are_refused(
    setup: dict[str, Any], sentence: str, folders: dict[str, Path], whole: AdapterFile
) -> None:
    with pytest.raises(InputError, match=sentence):
        with_adapters(folders["wan"], whole, **setup)
    request = GenerateRequest(
        model=str(folders["wan"]), prompt="x", preset="paper", overrides=WARM, tuned=whole.path, **setup
    )
    with pytest.raises(InputError, match=sentence):
        resolve(request)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda s: s.update({"transformer.extra": torch.zeros(2)}),
            r"holds transformer\.extra as \(2,\), and .* no such",
        ),
        (
            lambda s: s.update({"transformer.proj_out.bias": torch.zeros(2)}),
            r"is of another architecture: it holds transformer\.proj_out\.bias as \(2,\), and .* has it as",
        ),
    ],
)
def test_a_file_of_another_architecture_is_refused(
    change: Any, sentence: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    adapter = read(write_whole(folders["wan"], tmp_path / "w.safetensors", FAST, change=change))
    with pytest.raises(InputError, match=sentence):
        with_adapters(folders["wan"], adapter)
