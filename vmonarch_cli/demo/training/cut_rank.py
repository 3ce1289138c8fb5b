"""Tuned adapters of a lower rank, without training again: of each layer's change, what matters for the layer's inputs.

Run it with `python -m vmonarch_cli.demo.training rank FILE ... --rank 16 --out DIR`. What a layer adds is B A x. It is
kept within the principal directions of B A x over the inputs x of a few clips, which the model makes with the adapter:
of all changes of that rank, the one with the least squared error on these inputs (Eckart and Young, on B A times the
root of the inputs' second moments). The change that is closest to B A itself, which peft's `add_weighted_adapter` gives
with `svd_rank`, spends its directions on inputs that never come.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from vmonarch_cli.demo.captions import caption
from vmonarch_cli.demo.specs import sample_spec
from vmonarch_cli.errors import InputError, OutputError
from vmonarch_cli.models.registry import DEMO_ALIAS
from vmonarch_cli.models.tuned import TunedAdapter, read_adapter
from vmonarch_cli.models.weights import read_metadata
from vmonarch_cli.pipeline.call import call, encode, sampling_of
from vmonarch_cli.pipeline.load import load_pipeline
from vmonarch_cli.pipeline.swap import swapped
from vmonarch_cli.pipeline.tuned import write_adapter
from vmonarch_cli.plan import checks
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve
from vmonarch_cli.plan.setup import Setup

_DOWN, _UP, _PART = ".lora_A.weight", ".lora_B.weight", "transformer."
_NOISE = 1_000_000
"""Seeds of the clips begin so far above those of held-out ones."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `rank`."""
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="adapters of the demo model")
    parser.add_argument("--rank", type=int, required=True, help="of the files that are written")
    parser.add_argument("--clips", type=int, default=1, help="training prompts whose inputs are looked at")
    parser.add_argument("--out", type=Path, required=True, help="folder for them, under their own names")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there, also the adapters themselves")


def run(args: argparse.Namespace) -> None:
    """Write each file at the lower rank; InputError or OutputError for what cannot be done."""
    checks.whole("--rank", args.rank, 1, 1024)
    checks.whole("--clips", args.clips, 1, 64)
    adapters = [(path, _checked(path, args.rank)) for path in args.files]
    for path in args.files:
        if not args.overwrite and (args.out / path.name).exists():
            raise OutputError(f"{args.out / path.name} exists already: pass --overwrite, or another --out")
    for path, said in adapters:
        tensors, lost = cut(load_file(path), second_moments(path, said, args.clips), args.rank)
        target = args.out / path.name
        write_adapter(target, tensors, _lower(said, args.rank), overwrite=args.overwrite)
        facts = f"rank {args.rank}, {target.stat().st_size:,} bytes, {lost:.1%} of what the layers add is lost"
        Console(soft_wrap=True).print(f"{target}: {facts}", markup=False, highlight=False)


def _checked(path: Path, rank: int) -> TunedAdapter:
    """What a file says of itself; InputError for what has no higher rank, or is none of the demo's LoRAs."""
    said = read_adapter(path)
    if said.kind != "lora":
        raise InputError(f"adapter {path} holds whole weights, which have no rank: a LoRA of `vmonarch tune` is valid")
    if said.model != DEMO_ALIAS:
        raise InputError(f"adapter {path} is of {said.model}, and only those of the demo model are cut here")
    if "lora_adapter_metadata" in read_metadata(path):
        raise InputError(f"adapter {path} has an alpha of its own, which `vmonarch tune` does not write")
    has = said.training.get("rank")
    if not isinstance(has, int) or rank >= has:
        raise InputError(f"--rank takes a lower rank than adapter {path} has, which is {has}, got {rank}")
    return said


def _lower(said: TunedAdapter, rank: int) -> TunedAdapter:
    """What the new file says: its rank and alpha, and the rank that it was trained and evaluated with."""
    training = {"cut_from_rank": said.training["rank"], **said.training, "rank": rank, "alpha": rank}
    return said.model_copy(update={"training": training})


def second_moments(path: Path, said: TunedAdapter, clips: int) -> dict[str, Tensor]:
    """Sums of x x^T (in, in), float64, over the inputs x of each layer of an adapter's file, by the layer's name.

    The clips are of training prompts, made on the CPU as the adapter is meant to be used. InputError where it does not
    fit the model or the preset.
    """
    width, height = map(int, said.size.split("x"))
    asked = GenerateRequest(
        model=said.model,
        preset=said.preset_name,
        steps=said.steps,
        guidance_scale=said.guidance_scale,
        height=height,
        width=width,
        num_frames=said.num_frames,
        tuned=str(path),
        device="cpu",
        dtype="float32",
    )
    plan = resolve(asked, needs_prompt=False)
    pipeline = load_pipeline(
        plan.model_source,
        device=torch.device("cpu"),
        dtype=torch.float32,
        flow_shift=plan.flow_shift,
        setup=Setup(offload="none", tuned=plan.setup.tuned),
    )
    layers = [name.removesuffix(_DOWN) for name in load_file(path) if name.endswith(_DOWN)]
    found: dict[str, Tensor] = {}

    def gathers(layer: str) -> Any:
        def gather(module: Any, given: tuple[Tensor, ...]) -> None:
            x = given[0].flatten(0, -2)
            found[layer] = found.get(layer, 0) + (x.T @ x).double()

        return gather

    for layer in layers:
        pipeline.transformer.get_submodule(layer.removeprefix(_PART)).register_forward_pre_hook(gathers(layer))
    shape, name = (plan.height, plan.width, plan.num_frames), plan.setup.tuned[0].layer_name
    for number in range(clips):
        prompt = caption(sample_spec("train", 7, number, plan.num_frames), random.Random(number))
        texts = (prompt, plan.negative_prompt, plan.guidance_scale, plan.model.max_sequence_length)
        with torch.no_grad(), swapped(pipeline, plan.preset, adapter=name):
            call(pipeline, encode(pipeline, *texts), shape, **sampling_of(plan, _NOISE + number))
    return found


def cut(state: Mapping[str, Tensor], moments: Mapping[str, Tensor], rank: int) -> tuple[dict[str, Tensor], float]:
    """(A (rank, in) and B (out, rank) of each layer, in their dtypes, the share of what the layers add that is lost).

    state: A and B of a higher rank, by their names in a file. moments: see `second_moments`.
    """
    made: dict[str, Tensor] = {}
    lost = whole = 0.0
    for layer, moment in moments.items():
        down, up = state[layer + _DOWN], state[layer + _UP]
        change = up.double() @ down.double()
        power, directions = torch.linalg.eigh(change @ moment @ change.T)
        kept = directions[:, -rank:]
        u, s, vh = torch.linalg.svd(kept.T @ change, full_matrices=False)
        root = s.sqrt()  # in both, so that both keep their digits in 16 bits
        made[layer + _DOWN] = (root[:, None] * vh).to(down.dtype)
        made[layer + _UP] = (kept @ u * root).to(up.dtype)
        lost += float(power[:-rank].clamp(min=0).sum())
        whole += float(power.clamp(min=0).sum())
    return made, (lost / whole) ** 0.5 if whole else 0.0
