"""Fused blocks: the result is the stock model's, whatever else is done to it, and the stock model comes back."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from loading import CLOSE, CPU, PAPER, load
from tiny_families import TINY, latents_of
from tiny_wan import LAYERS, tiny_transformer
from typer.testing import CliRunner, Result
from wan_original import write_gguf

from vmonarch_cli.batch.clips import plan_clips
from vmonarch_cli.batch.lines import Line, Prompts
from vmonarch_cli.cli.app import app
from vmonarch_cli.clip.record import plan_again
from vmonarch_cli.errors import DeviceError, InputError
from vmonarch_cli.families import fusing, wan_blocks
from vmonarch_cli.families.fusing import StreamShape
from vmonarch_cli.families.registry import FAMILIES
from vmonarch_cli.library import monarch
from vmonarch_cli.models.catalogue import PIPELINES
from vmonarch_cli.pipeline import preflight
from vmonarch_cli.pipeline.fuse import fuse, fused, fused_impl, switch, unfuse
from vmonarch_cli.pipeline.load import load_pipeline
from vmonarch_cli.pipeline.offload import Placement
from vmonarch_cli.pipeline.preflight import Machine
from vmonarch_cli.pipeline.quantize import compute_in
from vmonarch_cli.pipeline.swap import swapped
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve
from vmonarch_cli.plan.setup import Setup
from vmonarch_kernels import linear8

APART = "hunyuan-video-i2v"
"""Modulates its first frame's tokens apart, in blocks of its own, which have no fused form."""
FUSED = [name for name, tiny in TINY.items() if FAMILIES[tiny.transformer_class].fused and name != APART]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def fp8_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchao converts to fp8 on machines without it, too; torch multiplies there, slowly."""
    pytest.importorskip("torchao")
    monkeypatch.setattr("torchao.quantization.quant_api._check_hardware_support", lambda granularity: None)


def setup(impl: str | None, **more: Any) -> Setup:
    return Setup(**{"offload": "none", "fused_impl": impl, **more})


def made(folder: Path, impl: str | None, name: str = "wan", **more: Any) -> torch.Tensor:
    """A clip's latents of a tiny family with `paper`."""
    pipeline = load(folder, setup=setup(impl, **more))
    assert {fused_impl(pipeline.transformer)} == {impl}
    with swapped(pipeline, PAPER):
        return latents_of(pipeline, TINY[name])


def wan_inputs(transformer: Any, *, tokens: bool = False) -> dict[str, Any]:
    """One forward of a tiny Wan; `tokens`: a noise level for every token, as Wan 2.2's text-and-image model has it."""
    generator = torch.Generator().manual_seed(3)
    timestep = torch.tensor([[500.0] * 15 + [0.0] * 15]) if tokens else torch.tensor([500.0])
    return {
        "hidden_states": torch.randn(1, transformer.config.in_channels, 5, 4, 6, generator=generator),
        "timestep": timestep,
        "encoder_hidden_states": torch.randn(1, 7, transformer.config.text_dim, generator=generator),
        "return_dict": False,
    }


def predicted(transformer: Any, given: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = transformer(**given)[0]
    return result.float()


def bfloat16_inputs(transformer: Any) -> dict[str, Any]:
    given = wan_inputs(transformer)
    return {name: x.bfloat16() if name != "timestep" and torch.is_tensor(x) else x for name, x in given.items()}


def run(transformer: Any, **options: bool) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = transformer(**wan_inputs(transformer, **options))[0]
    return result


# The result


@pytest.mark.parametrize("name", FUSED)
def test_fused_blocks_make_the_stock_clip(folders: dict[str, Path], name: str) -> None:
    stock = made(folders[name], None, name)
    torch.testing.assert_close(made(folders[name], "torch", name), stock, **CLOSE)


@pytest.mark.slow  # the interpreter takes half a minute for a family, and minutes for one with a larger grid
@pytest.mark.parametrize("name", ["wan", "wan-vace", "skyreels-v2", "hunyuan-video"])
def test_so_do_the_kernels(folders: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one step; every operator of the family's blocks runs."""
    tiny = TINY[name]
    pipeline = load(folders[name])
    with swapped(pipeline, PAPER):
        stock = latents_of(pipeline, tiny, steps=1)
    from vmonarch_kernels import launch_fused

    launches = {
        part: Mock(wraps=getattr(launch_fused, part)) for part in ("qk_norm_rope", "residual_norm", "gelu_tanh_")
    }
    for part, launch in launches.items():
        monkeypatch.setattr(launch_fused, part, launch)
    pipeline = load(folders[name], setup=setup("triton"))
    with swapped(pipeline, PAPER):
        latents = latents_of(pipeline, tiny, steps=1)
    torch.testing.assert_close(latents, stock, **CLOSE)
    assert all(launch.called for launch in launches.values())


@pytest.mark.parametrize("tokens", [False, True], ids=["a sample's noise", "a token's noise"])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_one_forward_also_with_stock_attention(impl: str, tokens: bool) -> None:
    transformer = tiny_transformer(layers=1)
    expected = run(transformer, tokens=tokens)
    with fused(transformer, impl):
        found = run(transformer, tokens=tokens)
        with swapped(transformer, PAPER.model_copy(update={"attention": "dense"})) as session:
            session.begin_step()
            swapped_too = run(transformer, tokens=tokens)
            session.end_step()
    torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close(swapped_too, expected, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_low_precision_the_error_is_that_of_the_stock_blocks(dtype: torch.dtype) -> None:
    """Against float64, from weights that the dtype holds; what Wan keeps in float32 stays so."""
    transformer = tiny_transformer()
    kept = set(transformer._keep_in_fp32_modules)
    for name, parameter in transformer.named_parameters():
        parameter.data = parameter.data.to(dtype)
        if kept & set(name.split(".")):
            parameter.data = parameter.data.float()
    narrow = {name: parameter.data for name, parameter in transformer.named_parameters()}

    def forward(impl: str | None, inputs: dict[str, Any]) -> torch.Tensor:
        if impl is not None:
            fuse(transformer, impl)
        with torch.no_grad():
            result = transformer(**inputs)[0].double()
        unfuse(transformer)
        return result

    inputs = wan_inputs(transformer)
    for name in ("hidden_states", "encoder_hidden_states"):
        inputs[name] = inputs[name].to(dtype)
    stock, found = forward(None, inputs), forward("torch", inputs)
    for parameter in transformer.parameters():
        parameter.data = parameter.data.double()
    exact = forward(
        None, {k: v.double() if isinstance(v, torch.Tensor) and k != "timestep" else v for k, v in inputs.items()}
    )
    assert {name: parameter.dtype for name, parameter in transformer.named_parameters()} != narrow
    assert (found - exact).norm() <= 1.5 * (stock - exact).norm()


# What comes back


def test_the_stock_modules_come_back_to_the_bit() -> None:
    transformer = tiny_transformer()
    before = {name: (set(vars(module)), type(module)) for name, module in transformer.named_modules()}
    state = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    expected = run(transformer)
    with fused(transformer, "torch"):
        assert fused_impl(transformer) == "torch"
        run(transformer)
        assert list(transformer.state_dict()) == list(state)
    assert fused_impl(transformer) is None
    assert {name: (set(vars(module)), type(module)) for name, module in transformer.named_modules()} == before
    assert all(torch.equal(tensor, state[name]) for name, tensor in transformer.state_dict().items())
    assert torch.equal(run(transformer), expected)
    unfuse(transformer)  # nothing to do


def test_signatures_stay_those_of_diffusers() -> None:
    """Caches and context parallelism find arguments by them."""
    transformer = tiny_transformer()
    stock = inspect.signature(transformer.blocks[0].forward)
    with fused(transformer, "torch"):
        assert [*inspect.signature(transformer.blocks[0].forward).parameters] == [*stock.parameters]


def test_what_wraps_a_fused_forward_stays_when_the_stock_blocks_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    transformer = tiny_transformer()
    expected = run(transformer)
    fuse(transformer, "torch")
    for module in transformer.modules():  # as sequential offloading does
        add_hook_to_module(module, AlignDevicesHook(io_same_device=True))
    torch.testing.assert_close(run(transformer), expected, **CLOSE)
    unfuse(transformer)
    assert torch.equal(run(transformer), expected)
    fuse(transformer, "torch")
    calls: list[int] = []
    monkeypatch.setattr(fusing, "gelu_tanh_", lambda x, impl: (calls.append(1), x)[1])
    run(transformer)
    assert len(calls) == LAYERS


@pytest.mark.parametrize("name", FUSED)
def test_blocks_are_stock_and_fused_in_turn(folders: dict[str, Path], name: str) -> None:
    """To the bit, as the clips of a batch need it."""
    stock, found = made(folders[name], None, name), made(folders[name], "torch", name)
    pipeline = load(folders[name], setup=setup("torch"))
    for impl, expected in ((None, stock), ("torch", found), (None, stock)):
        switch(pipeline, impl)
        assert fused_impl(pipeline.transformer) == impl
        with swapped(pipeline, PAPER):
            assert torch.equal(latents_of(pipeline, TINY[name]), expected)


@pytest.mark.parametrize("more", [{"offload": "group"}, {"cache": "pab"}, {"quantize": "fp8-storage"}], ids=str)
def test_so_they_are_within_what_wraps_them(
    folders: dict[str, Path], more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, found = made(folders["wan"], None, **more), made(folders["wan"], "torch", **more)
    norms = Mock(wraps=wan_blocks.residual_norm)
    monkeypatch.setattr(wan_blocks, "residual_norm", norms)
    pipeline = load(folders["wan"], setup=setup("torch", **more))
    for impl, expected in ((None, stock), ("torch", found), (None, stock)):
        norms.reset_mock()
        switch(pipeline, impl)
        with swapped(pipeline, PAPER):
            assert torch.equal(latents_of(pipeline, TINY["wan"]), expected)
        assert norms.called == (impl is not None)


def test_compiled_blocks_keep_a_graph_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    def marked(*given: Any, **more: Any) -> Any:
        stream, normed = residual_norm(*given, **more)
        return stream, normed + 1

    pipeline = SimpleNamespace(transformer=tiny_transformer(layers=2))
    stock = run(pipeline.transformer)
    residual_norm = wan_blocks.residual_norm
    monkeypatch.setattr(wan_blocks, "residual_norm", marked)
    counts = torch._dynamo.utils.counters
    fuse(pipeline.transformer, "torch")
    torch._dynamo.reset()
    counts.clear()
    for block in pipeline.transformer.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    made = []
    for impl, graphs in (("torch", 1), (None, 2), ("torch", 2), (None, 2)):
        switch(pipeline, impl)
        made.append(run(pipeline.transformer))
        assert counts["stats"]["unique_graphs"] == graphs
    torch._dynamo.reset()
    assert torch.equal(made[0], made[2])
    assert torch.equal(made[1], made[3])
    torch.testing.assert_close(made[1], stock, **CLOSE)
    assert not torch.allclose(made[0], stock, **CLOSE)


@pytest.mark.parametrize("name", ["wan", "ltx-video", "hunyuan-video"])
def test_gelu_is_taken_with_the_product_of_a_plain_layer_alone(
    folders: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What else a layer has runs as before: hooks, a forward or a class of its own, weights of another kind."""
    pipeline = load(folders[name], setup=setup("torch"))
    joined: list[int] = []

    def noted(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, impl: str) -> torch.Tensor:
        joined.append(id(weight))
        return torch.nn.functional.gelu(torch.nn.functional.linear(x, weight, bias), approximate="tanh")

    monkeypatch.setattr(fusing, "linear_gelu_tanh", noted)
    expected = latents_of(pipeline, TINY[name])
    layers = [
        layer
        for path, layer in pipeline.transformer.named_modules()
        if path.endswith((".net.0.proj", ".proj_mlp")) and "refiner" not in path
    ]
    assert layers
    assert set(joined) == {id(layer.weight) for layer in layers}

    class Own(torch.nn.Linear):
        pass

    class Weight(torch.nn.Parameter):
        pass

    calls: list[int] = []

    def with_hook(layer: torch.nn.Linear) -> None:
        layer.register_forward_hook(lambda *_: calls.append(1))

    def with_early_hook(layer: torch.nn.Linear) -> None:
        layer.register_forward_pre_hook(lambda *_: calls.append(1))

    def with_forward(layer: torch.nn.Linear) -> None:
        stock = layer.forward
        layer.forward = lambda x: (calls.append(1), stock(x))[1]  # type: ignore[method-assign]

    def with_class(layer: torch.nn.Linear) -> None:
        layer.__class__ = Own
        with_hook(layer)

    def with_weight(layer: torch.nn.Linear) -> None:
        layer.weight.__class__ = Weight
        with_hook(layer)

    ways = (with_hook, with_early_hook, with_forward, with_class, with_weight)
    for layer, way in zip(layers, itertools.cycle(ways), strict=False):
        way(layer)
    joined.clear()
    torch.testing.assert_close(latents_of(pipeline, TINY[name]), expected, **CLOSE)
    assert (joined, len(calls) >= len(layers)) == ([], True)


def test_blocks_whose_forward_is_wrapped_already_are_refused() -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    transformer = tiny_transformer()
    add_hook_to_module(transformer.blocks[0], AlignDevicesHook(io_same_device=True))
    with pytest.raises(
        InputError, match=r"a WanTransformerBlock of this WanTransformer3DModel has a forward of its own"
    ):
        fuse(transformer, "torch")
    assert fused_impl(transformer) is None


def test_the_facts_of_the_models_agree_with_the_families() -> None:
    for name, facts in PIPELINES.items():
        assert facts.fuses == (bool(FAMILIES[facts.transformer].fused) and name != "HunyuanVideoImageToVideoPipeline")


# With everything else


def test_parameters_come_through_the_modules_that_hold_them() -> None:
    """Where offloading keeps them elsewhere, a norm has its weights only while it is called."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Away(ModelHook):
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            module.weight.data = kept[module]
            return args, kwargs

        def post_forward(self, module: Any, output: Any) -> Any:
            module.weight.data = torch.full_like(kept[module], torch.nan)
            return output

    transformer = tiny_transformer()
    expected = run(transformer)
    fuse(transformer, "torch")
    norms = [m for n, m in transformer.named_modules() if n.endswith(("norm_q", "norm_k", "norm2")) and "blocks" in n]
    kept = {module: module.weight.data for module in norms if hasattr(module, "weight")}
    for module, weight in kept.items():
        module.weight = torch.nn.Parameter(torch.full_like(weight, torch.nan))
        add_hook_to_module(module, Away())
    with swapped(transformer, PAPER.model_copy(update={"attention": "dense"})) as session:
        session.begin_step()
        found = run(transformer)
        session.end_step()
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("mode", ["model", "group"])
def test_offloading(folders: dict[str, Path], mode: str) -> None:
    stock = made(folders["wan"], None)
    torch.testing.assert_close(made(folders["wan"], "torch", offload=mode), stock, **CLOSE)


@pytest.mark.parametrize("more", [{"quantize": "fp8-storage"}, {"quantize": "int8-storage"}, {"cache": "pab"}], ids=str)
def test_narrow_weights_and_caches(folders: dict[str, Path], more: dict[str, Any]) -> None:
    stock = made(folders["wan"], None, **more)
    torch.testing.assert_close(made(folders["wan"], "torch", **more), stock, **CLOSE)


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.usefixtures("fp8_anywhere")
def test_projections_in_8_bits(kind: str) -> None:
    """Fused arithmetic lies around the products: it is as far from 16 bits as stock blocks, whatever those are in."""
    transformer = tiny_transformer(layers=2).to(torch.bfloat16)
    given = bfloat16_inputs(transformer)

    narrow = predicted(transformer, given)
    assert compute_in(transformer, kind, CPU)
    stock = predicted(transformer, given)
    with fused(transformer, "torch"):
        found = predicted(transformer, given)
    assert 0 < float((stock - narrow).norm() / narrow.norm()) < 0.2
    assert float((found - narrow).norm()) < 1.2 * float((stock - narrow).norm())


@pytest.mark.parametrize(("impl", "made"), [(None, 7), ("torch", 6), ("triton", 3)], ids=str)
@pytest.mark.usefixtures("fp8_anywhere")
def test_fp8_rows_are_made_once_where_their_tensor_is_written(
    impl: str | None, made: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the inputs of a block's ten products: those of q, k and v are one tensor, as those of the text's k and v.

    Fused, GELU makes those of the last product, and in kernels the norms make their own.
    """
    transformer = tiny_transformer(layers=1).to(torch.bfloat16)
    given = bfloat16_inputs(transformer)
    assert compute_in(transformer, "fp8", CPU) == 10
    quantised: list[int] = []
    real = linear8.quantize_rows
    monkeypatch.setattr(linear8, "quantize_rows", lambda x, impl: (quantised.append(1), real(x, impl=impl))[1])
    block = transformer.blocks[0]

    def forward() -> torch.Tensor:
        quantised.clear()
        return predicted(transformer, given)

    if impl is not None:
        fuse(transformer, impl)
    found = forward()
    assert len(quantised) == made
    seen: list[Any] = []
    block.ffn.net[2].register_forward_pre_hook(lambda module, args: seen.extend(args))
    hooked = forward()
    assert ([type(x) for x in seen], len(quantised)) == ([torch.Tensor], made + (impl is not None))
    assert float((hooked - found).norm() / found.norm()) < 0.02


@pytest.mark.parametrize("name", FUSED)
def test_in_bfloat16_fused_blocks_err_no_more_than_stock_ones(folders: dict[str, Path], name: str) -> None:
    """Against float32, over the steps of a clip."""

    def clip(impl: str | None, dtype: torch.dtype) -> torch.Tensor:
        pipeline = load_pipeline(str(folders[name]), device=CPU, dtype=dtype, setup=setup(impl))
        return latents_of(pipeline, TINY[name]).float()

    exact, stock, found = clip(None, torch.float32), clip(None, torch.bfloat16), clip("torch", torch.bfloat16)
    errors = [float((latents - exact).norm() / exact.norm()) for latents in (found, stock)]
    assert 0 < errors[0] < 1.5 * errors[1]


def test_a_lora(folders: dict[str, Path], lora: Path) -> None:
    plain = made(folders["wan"], None)
    stock = made(folders["wan"], None, loras=(str(lora),))
    found = made(folders["wan"], "torch", loras=(str(lora),))
    torch.testing.assert_close(found, stock, **CLOSE)
    assert not torch.allclose(found, plain, rtol=1e-3, atol=1e-3)


def test_weights_of_a_gguf(tiny_wan_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    path = str(write_gguf(tiny_transformer(), tmp_path / "x.gguf"))
    stock, found = (made(tiny_wan_folder, impl, transformer=path) for impl in (None, "triton"))
    torch.testing.assert_close(found, stock, **CLOSE)


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=pytest.mark.slow)])
def test_compiled_blocks(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks share one graph, without a break."""
    transformer = tiny_transformer(layers=2)
    expected = run(transformer)
    counts = torch._dynamo.utils.counters
    fuse(transformer, impl)
    torch._dynamo.reset()
    counts.clear()
    for block in transformer.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(transformer), expected, **CLOSE)
    assert counts["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


@pytest.mark.usefixtures("fp8_anywhere")
def test_compiled_blocks_in_e4m3() -> None:
    """Without a break too; there the compiler makes the rows."""
    transformer = tiny_transformer(layers=2).to(torch.bfloat16)
    given = bfloat16_inputs(transformer)

    narrow = predicted(transformer, given)
    assert compute_in(transformer, "fp8", CPU)
    fuse(transformer, "torch")
    eager = predicted(transformer, given)
    torch._dynamo.reset()
    for block in transformer.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    compiled = predicted(transformer, given)
    torch._dynamo.reset()
    assert 0 < float((compiled - narrow).norm()) < 1.2 * float((eager - narrow).norm())


# The command line


SHAPE = ("--size", "48x32", "--num-frames", "17")


@pytest.fixture
def tiny(tiny_wan_folder: Path) -> tuple[str, ...]:
    return ("-m", str(tiny_wan_folder), "-p", "a red circle", *SHAPE, "--steps", "2")


def call(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [*arguments, "--device", "cpu"])
    assert result.exit_code == code, (result.stdout, result.stderr)
    return result


def test_a_record_says_whether_blocks_were_fused(tiny: tuple[str, ...], tmp_path: Path) -> None:
    def record(name: str, *flags: str) -> dict[str, Any]:
        shown = call("generate", *tiny, *flags, "-o", str(tmp_path / f"{name}.gif")).output
        assert ("fused blocks by torch" in " ".join(shown.split())) == ("--fuse" in flags)
        found: dict[str, Any] = json.loads((tmp_path / f"{name}.json").read_text())
        return found

    plain, off, on = record("plain"), record("off", "--no-fuse"), record("on", "--fuse", "--impl", "torch")
    assert [found["fused"] for found in (plain, off, on)] == [None, None, "torch"]
    assert [found["settings"]["fuse"]["value"] for found in (plain, off, on)] == ["auto", False, True]
    assert plain["frames"]["sha256"] == off["frames"]["sha256"]
    call("rerun", str(tmp_path / "on.json"), "-o", str(tmp_path / "again.gif"))
    again = json.loads((tmp_path / "again.json").read_text())
    assert (again["fused"], again["frames"]["sha256"]) == ("torch", on["frames"]["sha256"])


def machine_of(monkeypatch: Any, plans: list[Plan], device: str) -> Machine:
    """What preflight decides on a machine with or without a GPU that runs the kernels."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    gpu = Machine("cuda:0", "A card", "bfloat16", "triton")
    cpu = Machine("cpu", "CPU", "float32", "torch")
    placed = Placement("none", "", False, 2**40)
    monkeypatch.setattr(preflight, "_machine", lambda plan: gpu if device == "cuda" else cpu)
    monkeypatch.setattr("vmonarch_cli.pipeline.offload.mode_for", lambda *given: placed)
    monkeypatch.setattr(preflight, "_dense", lambda plan, machine: ("sdpa",))
    monkeypatch.setattr(preflight, "_check_quantize", lambda plan, machine: None)
    monkeypatch.setattr("vmonarch_kernels.fused.hardware_obstacle", lambda device: None)
    monkeypatch.setattr("vmonarch_kernels.api.hardware_obstacle", lambda device: None)
    return preflight.check_machine_for(plans)


def planned(model: Path | str, **more: Any) -> Plan:
    return resolve(GenerateRequest(model=str(model), prompt="x", output="x.gif", overwrite=True, **more))


def test_nobody_s_choice_is_fused_on_a_gpu_where_there_is_a_fused_form(
    folders: dict[str, Path], tiny_wan_folder: Path, monkeypatch: Any
) -> None:
    def decided(plan: Plan, device: str = "cuda") -> str | None:
        return machine_of(monkeypatch, [plan], device).decided(plan).fused_impl

    plan = planned(tiny_wan_folder)
    assert plan.setup.fuse is None
    assert decided(plan) is None, "so few tokens do not repay the launches"
    assert decided(planned(tiny_wan_folder, fuse=True)) == "triton"
    assert decided(planned("demo")) is None
    large = planned("wan2.1-1.3b")
    assert decided(large) == "triton"
    assert decided(planned("wan2.1-1.3b", compile=True)) == "triton"
    assert decided(planned("wan2.1-1.3b", quantize="fp8")) == "triton"
    assert decided(planned("wan2.1-1.3b", quantize="fp8", compile=True)) == "triton", "204 ms a forward, 209 stock"
    assert decided(planned("wan2.1-1.3b", quantize="int8")) == "triton"
    assert decided(planned("wan2.1-1.3b", quantize="int8", compile=True)) is None, "not measured"
    assert decided(planned("wan2.1-1.3b", quantize="int8", compile=True, fuse=True)) == "triton"
    monkeypatch.setattr("vmonarch_cli.plan.plan.repays_fusing", lambda tokens, channels: True)
    assert decided(plan) == "triton"
    assert decided(planned(tiny_wan_folder, preset="dense")) == "triton"
    assert decided(plan, "cpu") is None
    assert decided(planned(tiny_wan_folder, fuse=False)) is None
    assert decided(planned(tiny_wan_folder, impl="torch")) is None, "what was named needs no Triton"
    assert decided(planned(tiny_wan_folder, impl="torch", fuse=True)) == "torch"
    assert decided(planned(folders["mochi-1"])) is None


def test_each_clip_has_the_blocks_that_it_has_alone(monkeypatch: Any) -> None:
    small, large = planned("wan2.1-1.3b", size="64x64", num_frames=5), planned("wan2.1-1.3b")
    dense, in_torch = planned("wan2.1-1.3b", preset="dense"), planned("wan2.1-1.3b", impl="torch")
    for plans in ([small, large, dense, in_torch], [in_torch, dense, large, small]):
        machine = machine_of(monkeypatch, plans, "cuda")
        alone = [machine_of(monkeypatch, [plan], "cuda").fused_of(plan) for plan in plans]
        assert [machine.fused_of(plan) for plan in plans] == alone
    assert alone == [None, "triton", "triton", None]
    assert machine.decided(small).fused_impl == "triton", "the model is loaded once for all"
    asked = [planned("wan2.1-1.3b", fuse=True, impl=impl) for impl in ("torch", "triton", None)]
    machine = machine_of(monkeypatch, asked, "cuda")
    assert [machine.fused_of(plan) for plan in asked] == ["torch", "triton", "triton"]


def test_a_gpu_that_cannot_run_the_kernels_has_stock_blocks(monkeypatch: Any) -> None:
    plan, forced = planned("wan2.1-1.3b", preset="dense"), planned("wan2.1-1.3b", preset="dense", fuse=True)
    machine_of(monkeypatch, [plan], "cuda")
    monkeypatch.setattr("vmonarch_kernels.fused.hardware_obstacle", lambda device: "Triton is not installed")
    assert preflight.check_machine(plan).fused_of(plan) is None
    with pytest.raises(DeviceError, match="--fuse: impl='triton' cannot run because Triton is not installed"):
        preflight.check_machine(forced)


def test_what_the_machine_decides_is_no_other_clip_of_a_batch(tiny_wan_folder: Path, tmp_path: Path) -> None:
    def keys(**more: Any) -> list[str]:
        request = GenerateRequest(model=str(tiny_wan_folder), output=str(tmp_path), **more)
        prompts = Prompts("a.txt", [Line(1, {"prompt": "red"})], [])
        return [clip.key for clip in plan_clips(request, prompts)[0]]

    assert keys() == keys(device="cuda:0") == keys(device="cpu")
    assert keys() == keys(fuse=False) != keys(fuse=True), "a stream as short as this one is not fused anyway"


def test_a_script_fuses_inside_its_block(folders: dict[str, Path]) -> None:
    pipeline = load_pipeline(str(folders["wan"]), device=CPU, dtype=torch.float32)
    with monarch(pipeline, "exact"):
        expected = latents_of(pipeline, TINY["wan"])
        assert fused_impl(pipeline.transformer) is None
    with monarch(pipeline, "exact", fuse=True):
        assert fused_impl(pipeline.transformer) == "auto"
        torch.testing.assert_close(latents_of(pipeline, TINY["wan"]), expected, **CLOSE)
    assert fused_impl(pipeline.transformer) is None
    mochi = load_pipeline(str(folders["mochi-1"]), device=CPU, dtype=torch.float32)
    with pytest.raises(InputError, match="no blocks with a fused form"), monarch(mochi, "exact", fuse=True):
        pass


def test_the_record_of_a_gpu_s_clip_runs_on_a_cpu(tiny: tuple[str, ...], tmp_path: Path) -> None:
    call("generate", *tiny, "--preset", "paper", "--dense-steps", "1", "-o", str(tmp_path / "x.gif"))
    record = json.loads((tmp_path / "x.json").read_text())
    device = {**record["device"], "type": "cuda:0", "name": "A card"}
    made = {"device": device, "fused": "triton", "impl": "triton", "dense_attention": "cudnn"}
    (tmp_path / "x.json").write_text(json.dumps({**record, **made}))
    shown = call("rerun", str(tmp_path / "x.json"), "-o", str(tmp_path / "again.gif"), code=0).output
    again = json.loads((tmp_path / "again.json").read_text())
    assert (again["fused"], again["impl"], again["frames"]["sha256"]) == (None, "torch", record["frames"]["sha256"])
    assert "identical" in shown
    earlier = plan_again(tmp_path / "x.json", str(tmp_path / "y.gif"), device="cuda")
    assert (earlier.setup.fuse, earlier.preset.impl, earlier.setup.dense_attention) == (True, "triton", "cudnn")
    (tmp_path / "x.json").write_text(json.dumps({**record, **made, "fused": None}))
    assert plan_again(tmp_path / "x.json", str(tmp_path / "y.gif"), device="cuda").setup.fuse is False


def test_on_a_cpu_an_explicit_choice_is_refused(tiny: tuple[str, ...], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    shown = call("generate", *tiny, "--preset", "dense", "--fuse", "-o", str(tmp_path / "x.gif"), code=2).stderr
    assert " ".join(shown.split()) == (
        "error: --fuse runs Triton kernels, which need a GPU, and this run is on the CPU: leave it out, or add "
        "--impl torch for the same operations in torch, which gain nothing"
    )
    assert list(tmp_path.iterdir()) == []


def test_what_has_no_fused_form_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    flags = ("-m", str(folders["mochi-1"]), "-p", "x", "--fuse", "--impl", "torch", "-o", str(tmp_path / "x.gif"))
    shown = call("generate", *flags, code=2).stderr
    assert "--fuse: the blocks of a MochiPipeline have no fused form: leave it out" in " ".join(shown.split())
    pipeline = load_pipeline(str(folders["mochi-1"]), device=CPU, dtype=torch.float32)
    with pytest.raises(InputError, match="this HunyuanVideoTransformer3DModel has no blocks with a fused form"):
        load(folders[APART], setup=setup("torch"))
    with pytest.raises(
        InputError, match=r"this MochiTransformer3DModel has no blocks with a fused form, which are .*Wan"
    ):
        fuse(pipeline.transformer, "torch")


def test_a_batch_fuses_for_all_its_lines(tiny_wan_folder: Path, tmp_path: Path) -> None:
    lines = [{"prompt": "a red circle"}, {"prompt": "a blue square", "seed": 3}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = [*SHAPE, "--steps", "1", "--fuse", "--impl", "torch"]
    source = ["--prompts-file", str(tmp_path / "prompts.jsonl"), "-m", str(tiny_wan_folder)]
    call("generate", *source, *flags, "-o", str(tmp_path / "out"))
    records = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("a-*.json")]
    assert [found["fused"] for found in records] == ["torch", "torch"]
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "a red circle", "fuse": True}))
    shown = call("generate", *source, *flags, "-o", str(tmp_path / "other"), code=2).stderr
    assert "fuse is the same for all clips" in " ".join(shown.split())


def test_the_rehearsed_operations_are_those_of_a_block(tiny_wan_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What decides about a kernel: shapes, strides and dtypes of all tensors, and which of them there are."""

    def facts(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return tuple(x.shape), x.stride(), x.dtype
        if dataclasses.is_dataclass(x):
            return tuple(facts(getattr(x, field.name)) for field in dataclasses.fields(x))
        return x

    seen: list[Any] = []

    def noted(name: str, real: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            seen.append((name, *map(facts, args), *((key, facts(value)) for key, value in sorted(kwargs.items()))))
            return real(*args, **kwargs)

        return run

    for module in (fusing, wan_blocks):
        for name in ("qk_norm_rope", "layer_norm_modulate", "residual_norm", "gated_residual", "gelu_tanh_"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, noted(name, getattr(module, name)))
    dtype = torch.bfloat16
    pipeline = load_pipeline(str(tiny_wan_folder), device=CPU, dtype=dtype, setup=setup("torch"))
    pipeline.transformer.blocks[0].ffn.net[0].proj.register_forward_hook(lambda *_: None)  # no plain layer any more
    with swapped(pipeline, PAPER) as session:
        latents_of(pipeline, TINY["wan"])
        assert session.grid is not None
        tokens = math.prod(session.grid)
    in_forward = set(seen)
    seen.clear()
    attention = pipeline.transformer.blocks[0].attn1
    shape = StreamShape(tokens, attention.heads, attention.inner_dim // attention.heads, dtype, CPU)
    wan_blocks.rehearse(shape, "torch")
    of_gelu = {one for one in in_forward if one[0] == "gelu_tanh_"}  # its width decides about nothing
    assert {one for one in seen if one[0] != "gelu_tanh_"} == in_forward - of_gelu
    assert len(of_gelu) == 1
