"""Swapping attention: exactness, coverage, steps, warm state, compilation, and that everything is put back."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from tiny_wan import FRAMES, GRID, HEIGHT, LAYERS, WIDTH, latents_of, tiny_pipeline, tiny_transformer

from vmonarch_cli.attention.session import AttentionSession
from vmonarch_cli.errors import ModelError
from vmonarch_cli.pipeline.swap import swapped
from vmonarch_cli.presets import Preset
from vmonarch_cli.timing import Coverage

STEPS = 4
CALLS = LAYERS * 2 * STEPS  # with guidance a step has two forwards
EXACT = Preset(name="exact", band=1024)
PAPER = Preset(name="paper")
WARM = Preset(name="warm", warm_start=True, band=0)
REFRESH = WARM.model_copy(update={"refresh": 1})
SHARED = REFRESH.model_copy(update={"shared_refresh": True})
KEEPING = pytest.mark.parametrize("preset", [WARM, REFRESH, SHARED], ids=["warm", "refresh", "shared"])
"""Presets that keep something from step to step."""
DENSE = Preset(name="dense", attention="dense")
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}  # float32, four steps of a three-layer model, latents of size one


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def stock(pipeline: Any) -> torch.Tensor:
    return latents_of(pipeline)


def run(pipeline: Any, preset: Preset, **options: Any) -> torch.Tensor:
    with swapped(pipeline, preset):
        return latents_of(pipeline, **options)


# What runs where


def test_exact_preset_equals_the_stock_pipeline(pipeline: Any, stock: torch.Tensor) -> None:
    with swapped(pipeline, EXACT) as session:
        latents = latents_of(pipeline)
    torch.testing.assert_close(latents, stock, **CLOSE)
    assert session.coverage() == Coverage(dense={"the structure is exact": CALLS})
    assert session.impl == "torch", "the structured code runs, by the preset's implementation"
    assert session.grid == GRID


def test_dense_preset_equals_the_stock_pipeline(pipeline: Any, stock: torch.Tensor) -> None:
    with swapped(pipeline, DENSE) as session:
        latents = latents_of(pipeline)
    torch.testing.assert_close(latents, stock, **CLOSE)
    assert session.coverage() == Coverage(dense={"preset is dense": CALLS})
    assert session.impl == "dense"


def test_paper_preset_is_structured_everywhere_and_changes_the_result(pipeline: Any, stock: torch.Tensor) -> None:
    with swapped(pipeline, PAPER) as session:
        latents = latents_of(pipeline)
    assert session.coverage() == Coverage(structured=CALLS)
    assert session.impl == "torch"
    assert 0.01 < float((latents - stock).norm() / stock.norm()) < 1.0


def test_reference_and_torch_implementations_agree_through_the_pipeline(pipeline: Any) -> None:
    by_torch = run(pipeline, PAPER.model_copy(update={"impl": "torch"}))
    by_reference = run(pipeline, PAPER.model_copy(update={"impl": "reference"}))
    torch.testing.assert_close(by_torch, by_reference, **CLOSE)


def test_dense_steps_and_layers_are_counted_by_reason(pipeline: Any) -> None:
    preset = PAPER.model_copy(update={"dense_steps": 1, "dense_layers": 2})
    with swapped(pipeline, preset) as session:
        latents_of(pipeline)
    later = 2 * (STEPS - 1)
    assert session.coverage() == Coverage(
        structured=later * (LAYERS - 2), dense={"dense_steps": 2 * LAYERS, "dense_layers": later * 2}
    )
    assert [step.structured_calls for step in session.steps] == [0, 2, 2, 2]


def test_all_steps_dense_equals_the_stock_pipeline(pipeline: Any, stock: torch.Tensor) -> None:
    torch.testing.assert_close(run(pipeline, PAPER.model_copy(update={"dense_steps": 99})), stock, **CLOSE)
    torch.testing.assert_close(run(pipeline, PAPER.model_copy(update={"dense_layers": 99})), stock, **CLOSE)


def test_without_guidance_a_step_has_one_forward(pipeline: Any) -> None:
    with swapped(pipeline, PAPER) as session:
        latents_of(pipeline, guidance_scale=1.0)
    assert session.coverage().calls == LAYERS * STEPS


def test_a_token_count_that_does_not_fit_the_grid_runs_dense() -> None:
    transformer = tiny_transformer()
    q, k, v = torch.randn(3, 1, 29, 2, 16).unbind(0)
    with swapped(transformer, PAPER) as session:
        session.begin_step()
        session.begin_forward(0, GRID, q.device)
        out = session.attend(q, k, v, transformer=0, layer=0)
    heads_first = (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    expected = torch.nn.functional.scaled_dot_product_attention(*heads_first)
    torch.testing.assert_close(out, expected.transpose(1, 2))
    assert session.coverage() == Coverage(dense={"token count does not fit the grid": 1})


def test_fused_projections_give_the_same_result(pipeline: Any) -> None:
    before = run(pipeline, PAPER)
    pipeline.transformer.fuse_qkv_projections()
    try:
        torch.testing.assert_close(run(pipeline, PAPER), before, **CLOSE)
    finally:
        pipeline.transformer.unfuse_qkv_projections()


def test_both_transformers_of_a_two_stage_model_are_swapped() -> None:
    pipeline = tiny_pipeline(two_stages=True)
    stock = latents_of(pipeline)
    with swapped(pipeline, EXACT) as session:
        latents = latents_of(pipeline)
    torch.testing.assert_close(latents, stock, **CLOSE)
    assert session.coverage() == Coverage(dense={"the structure is exact": CALLS})
    with swapped(pipeline, WARM) as session:
        latents_of(pipeline)
        both = session.kept_bytes
    frames, rows, columns = GRID
    one_stage = LAYERS * 2 * (rows * columns * 2 * frames * frames)  # 2 branches; positions x heads x T x T bytes
    assert both == one_stage, "the first stage's factors are dropped when the second begins"


# Putting back


def processors(transformer: Any) -> dict[str, Any]:
    return {name: module.processor for name, module in transformer.named_modules() if hasattr(module, "processor")}


def test_everything_is_put_back(pipeline: Any, stock: torch.Tensor) -> None:
    before = processors(pipeline.transformer)
    with swapped(pipeline, PAPER):
        inside = processors(pipeline.transformer)
        latents_of(pipeline)
    after = processors(pipeline.transformer)
    changed = {name for name in before if inside[name] is not before[name]}
    assert changed == {f"blocks.{layer}.attn1" for layer in range(LAYERS)}
    assert all(after[name] is before[name] for name in before)
    assert not pipeline.transformer._forward_pre_hooks
    assert not {"step", "set_timesteps"} & vars(pipeline.scheduler).keys()
    assert torch.equal(latents_of(pipeline), stock)


def test_everything_is_put_back_after_an_error(pipeline: Any, stock: torch.Tensor) -> None:
    before = processors(pipeline.transformer)
    with pytest.raises(ZeroDivisionError), swapped(pipeline, PAPER):
        raise ZeroDivisionError
    assert processors(pipeline.transformer) == before
    assert torch.equal(latents_of(pipeline), stock)


def test_a_layer_called_after_the_block_says_so(pipeline: Any) -> None:
    with swapped(pipeline, PAPER):
        kept = pipeline.transformer.blocks[0].attn1.processor
    tokens = torch.randn(1, 30, 32)
    with pytest.raises(RuntimeError, match="had ended"):
        kept(pipeline.transformer.blocks[0].attn1, tokens)


def test_swapping_twice_is_refused(pipeline: Any) -> None:
    with swapped(pipeline, PAPER), pytest.raises(ModelError, match="swapped already"), swapped(pipeline, DENSE):
        pass


def test_an_unknown_transformer_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"Linear cannot be swapped; known are .*WanTransformer3DModel"):
        swapped(torch.nn.Linear(2, 2), PAPER).__enter__()


# Steps and clips, which nobody announces


def test_steps_are_told_apart_by_themselves(pipeline: Any) -> None:
    with swapped(pipeline, PAPER) as session:
        latents_of(pipeline)
        steps = session.steps
    assert [(step.index, step.total, step.calls) for step in steps] == [(i, STEPS, 2 * LAYERS) for i in range(STEPS)]
    assert [step.sigma for step in steps] == pipeline.scheduler.sigmas[:STEPS].tolist()
    assert all(0 < step.attention_s < step.step_s for step in steps)
    assert all(step.first_call_s is None for step in steps), "nothing compiles on a CPU"


def test_every_pipeline_call_is_a_new_clip(pipeline: Any) -> None:
    with swapped(pipeline, PAPER) as session:
        latents_of(pipeline)
        latents_of(pipeline, steps=2)
    assert [step.index for step in session.steps] == [0, 1]
    assert session.coverage().calls == LAYERS * 2 * 2


def test_bare_transformers_need_their_steps_announced() -> None:
    transformer = tiny_transformer()
    inputs = {
        "hidden_states": torch.randn(1, 4, *GRID[:1], 4, 6),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 8, 32),
    }
    with torch.no_grad(), swapped([transformer], WARM) as session:
        with pytest.raises(RuntimeError, match=r"session\.begin_step"):
            transformer(**inputs)
        for index in range(2):
            session.begin_step(index, total=2)
            transformer(**inputs)
            step = session.end_step()
            assert (step.index, step.total, step.calls) == (index, 2, LAYERS)
        with pytest.raises(RuntimeError, match=r"session\.begin_step"):
            transformer(**inputs)


def test_a_replaced_scheduler_is_an_error_not_an_endless_step(pipeline: Any) -> None:
    scheduler = pipeline.scheduler
    try:
        with swapped(pipeline, PAPER):
            pipeline.scheduler = type(scheduler).from_config(scheduler.config)
            with pytest.raises(RuntimeError, match="scheduler was replaced"):
                latents_of(pipeline)
    finally:
        pipeline.scheduler = scheduler


def test_a_copy_of_the_watched_scheduler_works_and_is_not_watched(pipeline: Any) -> None:
    with swapped(pipeline, PAPER) as session:
        assert "sigmas" in inspect.signature(pipeline.scheduler.set_timesteps).parameters
        latents_of(pipeline, steps=2)
        twin = copy.deepcopy(pipeline.scheduler)
        twin.set_timesteps(3)
        twin.step(torch.zeros(1, 2), twin.timesteps[0], torch.zeros(1, 2))
        assert len(session.steps) == 2
        assert len(pipeline.scheduler.timesteps) == 2
        assert twin.step_index == 1


# Dense samples


def test_dense_attention_is_sampled_on_every_nth_step_and_changes_nothing(pipeline: Any) -> None:
    plain = run(pipeline, PAPER)
    with swapped(pipeline, PAPER, sample_dense_every=2) as session:
        latents = latents_of(pipeline)
    assert torch.equal(latents, plain)
    sampled = [step.dense_call_s is not None for step in session.steps]
    assert sampled == [True, False, True, False]
    first = session.steps[0]
    assert first.dense_call_s is not None
    assert first.error is not None
    assert 0.0 < first.error < 1.0
    assert first.dense_s == pytest.approx(first.dense_call_s * first.structured_calls)
    assert session.excluded_s > 0
    assert session.coverage().calls == CALLS, "samples are not calls of the model"


def test_exact_attention_is_its_own_dense_measurement(pipeline: Any) -> None:
    with swapped(pipeline, EXACT, sample_dense_every=1) as session:
        latents_of(pipeline)
    assert [step.speedup for step in session.steps] == [1.0] * STEPS
    assert all(step.dense_call_s is None and step.structured_calls == 0 for step in session.steps)


def test_a_dense_step_is_its_own_dense_measurement(pipeline: Any) -> None:
    with swapped(pipeline, PAPER.model_copy(update={"dense_steps": 1}), sample_dense_every=2) as session:
        latents_of(pipeline)
    assert session.steps[0].speedup == 1.0
    assert [step.dense_call_s is not None for step in session.steps] == [False, True, False, True]


# Compiling kernels, of which the interpreter has none but the bookkeeping


def test_the_first_call_of_a_kernel_variant_is_kept_out_of_the_figures() -> None:
    pytest.importorskip("vmonarch_kernels.launch", reason="needs the Triton kernels")
    if torch.cuda.is_available():
        pytest.skip("the interpreter runs where there is no GPU")
    pipeline = tiny_pipeline()
    told: list[str] = []
    triton = WARM.model_copy(update={"impl": "triton"})
    with swapped(pipeline, triton, on_first_call=lambda: told.append("compiling")) as session:
        latents = latents_of(pipeline, steps=3, guidance_scale=1.0)
    assert told == ["compiling"] * 2, "one cold and one warm variant"
    first = [step.first_call_s for step in session.steps]
    assert first[0] is not None
    assert first[1] is not None
    assert first[2] is None
    assert session.excluded_s == pytest.approx(first[0] + first[1])
    assert session.coverage() == Coverage(structured=3 * LAYERS)
    by_torch = run(pipeline, WARM, steps=3, guidance_scale=1.0)
    torch.testing.assert_close(latents, by_torch, rtol=1e-2, atol=1e-2)


def test_a_first_call_leaves_no_corrections_behind() -> None:
    pytest.importorskip("vmonarch_kernels.launch", reason="needs the Triton kernels")
    if torch.cuda.is_available():
        pytest.skip("the interpreter runs where there is no GPU")
    pipeline = tiny_pipeline()
    with swapped(pipeline, REFRESH.model_copy(update={"impl": "triton"})) as session:
        with_first_calls = latents_of(pipeline, steps=3, guidance_scale=1.0)
        assert session.steps[0].first_call_s is not None
        without = latents_of(pipeline, steps=3, guidance_scale=1.0)
        assert session.steps[0].first_call_s is None
    assert torch.equal(without, with_first_calls)


# Warm start


def test_warm_start_is_used_from_the_second_step_on(pipeline: Any) -> None:
    cold = WARM.model_copy(update={"warm_start": False})
    once: dict[str, Any] = {"steps": 1, "guidance_scale": 1.0}
    torch.testing.assert_close(run(pipeline, WARM, **once), run(pipeline, cold, **once))
    assert not torch.allclose(run(pipeline, WARM), run(pipeline, cold), **CLOSE)


def test_refreshed_frames_bring_the_clip_closer_to_dense(pipeline: Any, stock: torch.Tensor) -> None:
    with swapped(pipeline, REFRESH) as session:
        refreshed, kept = latents_of(pipeline), session.kept_bytes
    with swapped(pipeline, WARM) as session:
        warm = latents_of(pipeline)
        assert kept > session.kept_bytes > 0
    assert (refreshed - stock).norm() < (warm - stock).norm()


@KEEPING
def test_a_batch_of_two_prompts_equals_two_single_runs(pipeline: Any, preset: Preset) -> None:
    prompts = ["a red circle moving left", "a blue square"]
    both = run(pipeline, preset, prompt=prompts, seed=[3, 4])
    # A correction that lies between two 8-bit numbers may be rounded either way, and guidance enlarges that; with
    # corrections kept in float32 both runs agree within 3e-5.
    close = {"atol": 2e-2, "rtol": 2e-2} if preset.refresh else CLOSE
    for index, prompt in enumerate(prompts):
        alone = run(pipeline, preset, prompt=prompt, seed=3 + index)
        torch.testing.assert_close(both[index : index + 1], alone, **close)
        assert (both[index : index + 1] - alone).norm() < 5e-3 * alone.norm()
    assert not torch.allclose(both[0], both[1], **CLOSE)


@KEEPING
def test_nothing_leaks_into_the_next_clip(pipeline: Any, preset: Preset) -> None:
    alone = run(pipeline, preset, prompt="a blue square", seed=5)
    with swapped(pipeline, preset):
        latents_of(pipeline, "a red circle", seed=1)
        second = latents_of(pipeline, "a blue square", seed=5)
    assert torch.equal(second, alone)


@KEEPING
def test_nothing_leaks_from_a_clip_that_was_stopped(pipeline: Any, preset: Preset) -> None:
    alone = run(pipeline, preset, seed=5)

    def stop(*_: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    with swapped(pipeline, preset) as session:
        with pytest.raises(KeyboardInterrupt):
            pipeline(
                "a blue square",
                height=HEIGHT,
                width=WIDTH,
                num_frames=FRAMES,
                num_inference_steps=3,
                callback_on_step_end=stop,
            )
        assert torch.equal(latents_of(pipeline, seed=5), alone)
        assert len(session.steps) == STEPS


@KEEPING
def test_another_shape_starts_cold(pipeline: Any, preset: Preset) -> None:
    other: dict[str, Any] = {"height": 48, "width": 32, "num_frames": 9}
    alone = run(pipeline, preset, **other)
    with swapped(pipeline, preset) as session:
        latents_of(pipeline)
        assert torch.equal(latents_of(pipeline, **other), alone)
        assert session.grid == (3, 3, 2)


@KEEPING
def test_a_shape_or_batch_that_changes_within_a_clip_starts_cold(preset: Preset) -> None:
    transformer = tiny_transformer()
    session: AttentionSession

    def forward(grid: tuple[int, int, int], batch: int) -> torch.Tensor:
        frames, rows, columns = grid
        torch.manual_seed(0)
        session.begin_step()
        out: torch.Tensor = transformer(
            hidden_states=torch.randn(batch, 4, frames, 2 * rows, 2 * columns),
            timestep=torch.full((batch,), 500),
            encoder_hidden_states=torch.randn(batch, 8, 32),
            return_dict=False,
        )[0]
        session.end_step()
        return out

    for grid, batch in [((3, 3, 2), 1), ((5, 3, 2), 1), (GRID, 2)]:
        with torch.no_grad(), swapped(transformer, preset) as session:
            forward(GRID, 1)
            after_another = forward(grid, batch)
            session.begin_clip()
            assert torch.equal(forward(grid, batch), after_another)


@pytest.mark.parametrize("preset", [WARM, REFRESH], ids=["warm", "refresh"])
def test_both_guidance_branches_start_from_the_same(pipeline: Any, preset: Preset) -> None:
    """With the same prompt on both sides guidance changes nothing, unless one branch is an iteration ahead."""
    prompt = "a red circle"
    unguided = run(pipeline, preset, prompt=prompt, guidance_scale=1.0)
    guided = run(pipeline, preset, prompt=prompt, negative_prompt=prompt, guidance_scale=4.0)
    torch.testing.assert_close(guided, unguided, **CLOSE)


def one_call(session: AttentionSession, forwards: int, **known: Any) -> list[torch.Tensor]:
    """A step of so many forwards on the same tensors: the output of each."""
    shape = (1, GRID[0] * GRID[1] * GRID[2], 2, 16)
    session.begin_step()
    outs = []
    for _ in range(forwards):
        session.begin_forward(0, GRID, torch.device("cpu"), **known)
        q, k, v = (torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(3))
        outs.append(session.attend(2 * q, k, v, transformer=0, layer=0))
    session.end_step()
    return outs


def test_guidance_that_begins_late_starts_from_what_the_leading_branch_started_from() -> None:
    """A guidance interval: the steps before it have one forward, and those in it two."""
    session = AttentionSession(WARM, [1])
    for forwards in (1, 1):
        one_call(session, forwards, guided=True)
    leading, following = one_call(session, 2, guided=True)
    assert torch.equal(leading, following)


def test_a_forward_that_nobody_expected_starts_warm_beside_a_warm_one() -> None:
    session = AttentionSession(WARM, [1])
    cold, _ = one_call(session, 2)
    one_call(session, 1)
    one_call(session, 1)
    leading, following = one_call(session, 2)
    assert (following - leading).norm() < 0.5 * (cold - leading).norm()


def test_shared_corrections_serve_both_guidance_branches(pipeline: Any, stock: torch.Tensor) -> None:
    held, errors = {}, {}
    for preset in (WARM, REFRESH, SHARED):
        with swapped(pipeline, preset) as session:
            errors[preset] = float((latents_of(pipeline) - stock).norm())
            held[preset] = session.kept_bytes
    assert held[REFRESH] - held[WARM] == 2 * (held[SHARED] - held[WARM]) > 0, "once for both"
    assert errors[SHARED] < errors[WARM]


def test_the_first_guidance_branch_takes_the_turns_of_both() -> None:
    """From the second step on, when it is known that there are two; the other branch has none."""
    shape = (1, GRID[0] * GRID[1] * GRID[2], 2, 16)
    session = AttentionSession(Preset(name="shared", refresh=0.5, shared_refresh=True), [1])
    changed = []
    for _ in range(3):
        session.begin_step()
        for _ in range(2):
            session.begin_forward(0, GRID, torch.device("cpu"))
            q, k, v = (torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(3))
            out = session.attend(2 * q, k, v, transformer=0, layer=0).unflatten(1, (GRID[0], -1))
            dense = torch.nn.functional.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in (2 * q, k, v))
            ).transpose(1, 2)
            wrong = (out - dense.unflatten(1, (GRID[0], -1))).abs().amax((0, 2, 3, 4))
            changed.append(int((wrong[1:] < 1e-5).sum()))  # the preset's first frame is exact in every call
        session.end_step()
    assert changed == [1, 0, 1, 0, 1, 0]


# Compilation


@pytest.mark.parametrize("preset", [PAPER, WARM, REFRESH], ids=["paper", "warm", "refresh"])
def test_repeated_blocks_compile_once_without_graph_breaks(preset: Preset) -> None:
    from torch._dynamo.backends.debugging import aot_eager

    layers = 10  # more than dynamo's limit of recompiles
    transformer = tiny_transformer(layers=layers)
    inputs = {
        "hidden_states": torch.randn(1, 4, 5, 4, 6),
        "encoder_hidden_states": torch.randn(1, 8, 32),
        "return_dict": False,
    }

    def two_steps(session: AttentionSession) -> list[torch.Tensor]:
        outs = []
        for time in (900, 500):
            session.begin_step()
            outs.append(transformer(timestep=torch.tensor([time]), **inputs)[0])
            session.end_step()
        return outs

    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, examples: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return aot_eager(graph, examples)

    torch._dynamo.reset()
    with torch.no_grad():
        with swapped(transformer, preset) as session:
            eager = two_steps(session)
        transformer.compile_repeated_blocks(backend=backend, fullgraph=True)
        for _ in range(2):  # a second session, as of a second run in one process, uses the same graph
            with swapped(transformer, preset) as session:
                compiled = two_steps(session)
            assert session.coverage() == Coverage(structured=2 * layers)
            torch.testing.assert_close(compiled, eager)
    assert len(graphs) == 1
    calls = [node for node in graphs[0].graph.nodes if "vmonarch.self_attention" in str(node.target)]
    assert len(calls) == 1
