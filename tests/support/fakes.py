"""A run without a model: results and events with invented figures, for tests of what is shown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vmonarch_cli.clip.events import (
    ClipDone,
    ClipStarted,
    CompilingKernels,
    Decoding,
    ModelLoaded,
    ModelLoading,
    StepDone,
)
from vmonarch_cli.media.paths import record_path
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.timing import ClipResult, ClipTiming, Coverage, StepAttention


def steps(count: int = 4, dense: int = 1, attention_s: float = 0.5) -> list[StepAttention]:
    """Steps of two seconds; the first `dense` of them dense, every second one sampled."""
    made = []
    for i in range(count):
        is_dense, sampled = i < dense, i % 2 == 0
        made.append(
            StepAttention(
                index=i,
                total=count,
                sigma=1 - i / count,
                step_s=2.0,
                attention_s=1.6 if is_dense else attention_s,
                calls=60,
                structured_calls=0 if is_dense else 58,
                dense_call_s=0.03 if sampled else None,
                dense_s=1.6 if sampled else None,
                sampled_attention_s=0.01 if sampled else None,
                error=0.125 if sampled and not is_dense else None,
                first_call_s=3.25 if i == dense else None,
            )
        )
    return made


def result(plan: Plan, index: int = 0, **timing: Any) -> ClipResult:
    """The result of clip `index` of a plan."""
    path = plan.outputs[index]
    figures: dict[str, Any] = {
        "steps": steps(plan.steps),
        "text_encode_s": 0.5,
        "denoise_s": 2.0 * plan.steps,
        "decode_s": 1.25,
        "write_s": 0.1,
        "total_s": 30.0,
        "first_call_s": 3.25,
        "peak_memory_bytes": 3 * 2**30,
        "peak_memory_kind": "device",
        "warm_state_bytes": 12 * 2**20,
    }
    return ClipResult(
        index=index,
        path=path,
        record_path=record_path(path),
        seed=plan.seed + index,
        impl="torch",
        grid=plan.grid,
        coverage=Coverage(174, {"dense_steps": 60, "dense_layers": 6}),
        timing=ClipTiming(**{**figures, **timing}),
        record={"schema": 1, "seed": plan.seed + index},
    )


def generate(plan: Plan, machine: object, *, on_event: Callable[[Any], None], **_: Any) -> list[ClipResult]:
    """Stands in for `make.generate`: all events of a run, no file."""
    on_event(ModelLoading(plan.model_source))
    on_event(ModelLoaded(plan.model_source, 1.5, "CPU (2 threads)", "float32", "torch"))
    results = []
    for index in range(plan.num_videos):
        on_event(ClipStarted(index, plan.num_videos, plan.seed + index, plan.steps))
        on_event(CompilingKernels())
        results.append(result(plan, index))
        for step in results[-1].timing.steps:
            on_event(StepDone(index, step))
        on_event(Decoding(index))
        on_event(ClipDone(results[-1]))
    return results


def generate_and_touch(
    plan: Plan, machine: object, *, on_event: Callable[[Any], None], **extra: Any
) -> list[ClipResult]:
    """The same with an empty file for each clip, written before the caller is told."""

    def written(event: Any) -> None:
        if isinstance(event, ClipDone):
            event.result.path.parent.mkdir(parents=True, exist_ok=True)
            event.result.path.touch()
        on_event(event)

    return generate(plan, machine, on_event=written)
