"""Whole forwards of one model with random weights: dense, structured and skipped self-attention, each with stock and
with fused blocks, in turn in one process; and the kernels that one of them runs.

    python tests/bench/forward.py --json forward.json
    python tests/bench/forward.py --compile --quantize fp8 --kernels "paper, fused" --json fp8.json

`profile model` has such rows, and compares them all with dense attention. Here what fused blocks predict is compared
with what the stock ones do, a row that is off has no times, and every dense attention has a fused row. Random weights
have the time of real ones.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vmonarch_cli.attention.session import AttentionSession
from vmonarch_cli.families.registry import FAMILIES
from vmonarch_cli.media.metrics import relative_error
from vmonarch_cli.models.catalogue import PIPELINES
from vmonarch_cli.pipeline.apply_setup import compile_blocks
from vmonarch_cli.pipeline.quantize import compute_in
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve
from vmonarch_cli.presets import load_preset
from vmonarch_cli.profile.chip import measure_chip
from vmonarch_cli.profile.contenders import Contender, contenders, fused_blocks, structured
from vmonarch_cli.profile.model import random_transformer
from vmonarch_cli.profile.model_settings import ModelSettings
from vmonarch_cli.profile.record import this_machine
from vmonarch_cli.profile.repeat import order_of_round, reason, wall
from vmonarch_cli.profile.results import FUSED, Spread
from vmonarch_cli.profile.steps import StepTensors, first_inputs, predict, timed_step

LARGEST_ERROR = {torch.bfloat16: 8e-2, torch.float16: 2e-2, torch.float32: 1e-3}
"""Of fused blocks against stock ones: what rounding adds up to over the layers, as in `profile model`."""
KINDS = {
    "products in 8 bits": r"scaled_mm|float8|e4m3|_fp8|qmm|row_?wise.*gemm",
    "structured attention": r"attend_|merge_splits|merge_extra|l_output|l_lse|r_queries",
    "fused passes": r"qk_norm_rope|residual_norm|gelu_tanh_kernel|gated_activation|quantize_rows",
    "dense attention": r"cudnn.*sdpa|fmha|flash|sdpa|cudnn_generated",
    "products": r"gemm|nvjet|cutlass|cublas|splitk|sgemm|wgmma",
    "compiled passes": r"^triton_",
    "norms": r"layer_norm|rms_norm|norm_kernel|GammaBeta",
    "copies": r"memcpy|memset|copy|CatArray|direct_copy",
    "element by element": r"elementwise|vectorized|reduce_kernel|unrolled",
}
"""Kind of kernel -> what its name has; the first that fits counts."""
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::_scaled_mm", "aten::_scaled_mm_v2")


def transformer_of(settings: ModelSettings) -> Any:
    transformer = random_transformer(settings.entry, settings.device, settings.dtype, settings.seed)
    if settings.quantize is not None:
        compute_in(transformer, settings.quantize, settings.device)
    if settings.compile:
        compile_blocks(transformer)
    return transformer


def inputs_of(settings: ModelSettings) -> StepTensors:
    generator = torch.Generator("cpu").manual_seed(settings.seed)
    entry = settings.entry
    contexts = torch.randn((settings.forwards, 1, entry.max_sequence_length, entry.text_dim), generator=generator)
    return first_inputs(settings, tuple(contexts.to(settings.device, settings.dtype)))


def rows_of(settings: ModelSettings, transformer: Any, masked: bool) -> list[Contender]:
    """Stock: what `profile model` has. Fused: the same by way of the structured code, which fused blocks need."""
    layers = len(FAMILIES[type(transformer).__name__].self_attentions(transformer))
    plain = contenders(
        transformer,
        settings.presets,
        settings.device,
        settings.dtype,
        settings.backends,
        masked,
        head_dim=settings.entry.head_dim,
    )
    dense = load_preset("dense")
    for place, row in enumerate(plain):  # preset `dense` takes the place of a stock model that masks its text
        if row.row.name == dense.name and settings.backends:
            session = AttentionSession(dense, [layers], dense=settings.backends[:1])
            plain[place] = structured(transformer, row.row, session)
    if settings.fused_impl is None:
        return plain
    able = [row for row in plain if row.row.kind != "dense" or row.session is not None or not masked]
    return [*plain, *(fused_blocks(transformer, row, FUSED, settings.fused_impl) for row in able)]


def warm_up(
    rows: list[Contender], transformer: Any, inputs: StepTensors, settings: ModelSettings, *, once: bool
) -> list[Contender]:
    """Those that ran, warm presets twice, and agree with their stock row; what failed is named in its row."""
    ready: list[Contender] = []
    made: dict[str, torch.Tensor] = {}
    for contender in rows:
        row = contender.row
        try:
            first_s, prediction = wall(lambda: predict(contender, transformer, inputs), settings.device)  # noqa: B023
            made[row.name] = prediction.float().cpu()
            if not once and row.note == "warm":
                predict(contender, transformer, inputs)
        except Exception as error:
            contender.row = replace(row, failure=reason(error))
            print(f"{row.name}: {contender.row.failure}", flush=True)
            continue
        off = None if row.stock not in made else relative_error(made[row.name], made[row.stock])
        contender.row = replace(row, first_call_s=first_s, error=off)
        print(f"{row.name}: first step {first_s:.2f} s, error {off}", flush=True)
        if off is not None and not off <= LARGEST_ERROR[settings.dtype]:
            contender.row = replace(contender.row, failure=f"{off:.2g} off its stock row {row.stock}")
            continue
        ready.append(contender)
    return ready


def kernels_of(contender: Contender, transformer: Any, inputs: StepTensors, settings: ModelSettings) -> dict[str, Any]:
    """Kernels of one step by name, by kind, and the products by shape; milliseconds of the device."""
    from torch.profiler import ProfilerActivity, profile

    cuda = settings.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, record_shapes=True) as found:
        predict(contender, transformer, inputs)
        if cuda:
            torch.cuda.synchronize()
    run: dict[str, list[float]] = {}
    for event in found.events():
        on_device = event.device_type.name == "CUDA"
        if getattr(event, "is_user_annotation", False) or on_device != cuda:
            continue
        if on_device:
            run.setdefault(event.name, []).append(event.time_range.elapsed_us())
        elif event.name.startswith("aten::"):
            run.setdefault(event.name, []).append(event.self_cpu_time_total)
    times = {name: (len(each), sum(each) / 1e3) for name, each in run.items()}
    kinds: dict[str, float] = {}
    for name, (_, ms) in times.items():
        kinds[kind_of(name)] = kinds.get(kind_of(name), 0.0) + ms
    products = []
    for event in found.key_averages(group_by_input_shape=True):
        if event.key not in _PRODUCTS:
            continue
        shapes = event.input_shapes[1:3] if event.key == "aten::addmm" else event.input_shapes[:2]
        ms = (event.device_time_total if cuda else event.cpu_time_total) / 1e3
        if ms > 0 and len(shapes) == 2:
            flop = 2.0 * event.count * shapes[1][-1] * math.prod(shapes[0])
            products.append({"shape": shapes, "calls": event.count, "ms": ms, "tflops": flop / ms / 1e9})
    longest = sorted(times.items(), key=lambda item: -item[1][1])[:25]
    return {
        "row": contender.row.name,
        "device_ms": sum(ms for _, ms in times.values()),
        "launches": sum(count for count, _ in times.values()),
        "kinds_ms": dict(sorted(kinds.items(), key=lambda item: -item[1])),
        "longest": [
            {"name": name[:160], "kind": kind_of(name), "calls": calls, "ms": ms} for name, (calls, ms) in longest
        ],
        "products": sorted(products, key=lambda product: -product["ms"])[:20],
    }


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "other")


def settings_from(options: argparse.Namespace) -> ModelSettings:
    given = {} if options.num_frames is None else {"num_frames": options.num_frames}
    asked: dict[str, Any] = {**given, **({} if options.size is None else {"size": options.size})}
    clip = resolve(
        GenerateRequest(model=options.model, preset=options.preset, tuned="none", **asked), needs_prompt=False
    )
    device = torch.device(options.device)
    cuda = device.type == "cuda"
    impl = "triton" if cuda else "torch"
    return ModelSettings(
        entry=clip.model.model_copy(update={"layers": options.layers or clip.model.layers}),
        source="",
        random_weights=True,
        device=device,
        dtype=torch.bfloat16 if cuda else torch.float32,
        height=clip.height,
        width=clip.width,
        num_frames=clip.num_frames,
        guidance_scale=options.guidance_scale,
        flow_shift=1.0,
        clip_steps=clip.steps,
        steps=options.repeats,
        presets=[load_preset(options.preset)],
        compile=options.compile,
        prompt="",
        of_layers=clip.model.layers,
        backends=(options.backend or ("cudnn",)) if cuda else (),
        fused_impl=impl if PIPELINES[clip.model.pipeline].fuses else None,
        quantize=options.quantize,
    )


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wan2.1-1.3b")
    parser.add_argument("--preset", default="paper")
    parser.add_argument("--size")
    parser.add_argument("--num-frames", type=int)
    parser.add_argument("--layers", type=int, help="of the model; times are theirs alone")
    parser.add_argument("--guidance-scale", type=float, default=1.0, help="1: one forward a step")
    parser.add_argument("--backend", action="append", help="dense attention; cudnn by default")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--quantize", choices=("fp8", "int8"))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--kernels", action="append", default=[], help="rows whose kernels are listed")
    parser.add_argument("--warm", action="store_true", help="compile everything and stop")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    options = parsed()
    settings = settings_from(options)
    torch._inductor.config.autotune_local_cache = False  # what was chosen beside other work would last
    torch._functorch.config.enable_autograd_cache = False  # dense backends trace to the same graph
    machine = this_machine(settings.device)
    record: dict[str, Any] = {
        "device": machine.device,
        "versions": machine.versions,
        "model": settings.entry.alias,
        "size": [settings.width, settings.height, settings.num_frames],
        "grid": list(settings.grid),
        "layers": [settings.entry.layers, settings.of_layers],
        "forwards": settings.forwards,
        "compile": settings.compile,
        "quantize": settings.quantize,
        "dtype": str(settings.dtype).removeprefix("torch."),
    }

    def keep(**more: Any) -> None:
        record.update(more)
        if options.json is not None:
            options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    if not options.warm:
        chip = measure_chip(settings.device, settings.dtype)
        keep(product_tflops=chip.flops_per_s / 1e12, copy_tb_s=chip.bytes_per_s / 1e12)
    transformer, inputs = transformer_of(settings), inputs_of(settings)
    rows = rows_of(settings, transformer, "encoder_attention_mask" in inputs.others)
    ready = warm_up(rows, transformer, inputs, settings, once=options.warm)
    if options.warm:
        return
    for index in range(options.repeats):
        for contender in order_of_round(ready, index):
            timed_step(contender, transformer, inputs, settings.device)
        keep(rows=[facts(contender) for contender in rows])
    for contender in ready:
        print(contender.row.name, facts(contender)["step_ms"], flush=True)
    found = []
    for contender in ready:
        if contender.row.name in options.kernels:
            found.append(kernels_of(contender, transformer, inputs, settings))
            keep(kernels=found)


def facts(contender: Contender) -> dict[str, Any]:
    """A row of the record: milliseconds of a step, of self-attention within it, and the first step's seconds."""
    row, seconds = contender.row, contender.seconds
    step = Spread.of(seconds) if seconds else None
    inside = 1e3 * statistics.median(contender.attention) if contender.attention else None
    return {
        "name": row.name,
        "kind": row.kind,
        "step_ms": None if step is None else 1e3 * step.median,
        "quartiles_ms": None if step is None else [1e3 * step.low, 1e3 * step.high],
        "attention_ms": inside if row.kind == "structured" else None,
        "first_step_s": row.first_call_s,
        "error_of_fusing": row.error,
        "failure": row.failure,
    }


if __name__ == "__main__":
    main()
