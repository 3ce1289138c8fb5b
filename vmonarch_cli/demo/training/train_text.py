"""Trains the text encoder on its own, to say what a caption says, before the transformer learns to draw it.

Run it with `python -m vmonarch_cli.demo.training text --out DIR`: it needs no accelerator, and 15 minutes on two
cores. A linear reading of the tokens must name the clip's background, its objects and what belongs to which object. The
transformer alone learns words only through what they do to noisy latents, which is slow where a word changes little
(left for right).

An encoder that goes on learning (`--init`) keeps its embeddings of captions of one motion, which a transformer may know
by now, and learns to tell the order of several.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import random
import time
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmonarch_cli.demo.captions import caption, plain_caption
from vmonarch_cli.demo.model import DIT_PRESETS, build_text_encoder, build_tokenizer, config_dict, encode_prompts
from vmonarch_cli.demo.specs import MAX_MOTIONS, ClipSpec, sample_spec
from vmonarch_cli.demo.training import loop
from vmonarch_cli.errors import InputError
from vmonarch_cli.models.demo_vocabulary import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    MAX_TOKENS,
    MOTIONS,
    PLACES,
    SHAPES,
    SIZES,
    vocabulary,
)
from vmonarch_cli.pipeline.device import device_name, pick_device

_OBJECT_FACTS: dict[str, tuple[str, ...]] = {
    "shape": tuple(SHAPES),
    "colour": tuple(COLOURS),
    "motion": tuple(MOTIONS),
    "size": tuple(SIZES),
    "place": tuple(PLACES),
}
# Which facts belong to the same object is a fact too, or two objects would share theirs.
_BOUND = (("colour", "shape"), ("colour", "motion"), ("shape", "motion"), ("colour", "size"), ("colour", "place"))

_FRAMES = (49, 97, 193)  # captions of longer clips tell more motions
_CLIPS = 5000  # of each length; what varies are their captions
_TURNS = {2: ("first", "last"), 3: ("first", "middle", "last")}  # of an object's motions, by their number
_READER_ALONE = 200  # steps in which only the reading of an encoder that goes on is learned
_KEEP_WEIGHT = 100.0  # of how far embeddings that the transformer knows have moved, relative to their size


def facts(spec: ClipSpec) -> frozenset[tuple[str, ...]]:
    """Everything true of a clip, as names: ("background", "navy"), ("colour", "red", "shape", "star"), ..."""
    found: set[tuple[str, ...]] = {("background", spec.background), ("kind", spec.kind)}
    for item in spec.objects:
        once = {name: getattr(item, name) for name in ("shape", "colour", "size", "place") if getattr(item, name)}
        for motion in item.motions:
            values = {**once, "motion": motion}
            found |= set(values.items())
            found |= {(a, values[a], b, values[b]) for a, b in _BOUND if a in values and b in values}
        if len(item.motions) > 1:
            turns = zip(_TURNS[len(item.motions)], item.motions, strict=True)
            found |= {("turn", turn, "motion", motion) for turn, motion in turns}
    return frozenset(found)


def all_facts() -> list[tuple[str, ...]]:
    """Every fact that a clip can have, in a fixed order."""
    found: list[tuple[str, ...]] = [("background", name) for name in BACKGROUNDS]
    found += [("kind", name) for name in KINDS]
    found += [(name, value) for name, values in _OBJECT_FACTS.items() for value in values]
    found += [("turn", turn, "motion", motion) for turn in _TURNS[MAX_MOTIONS] for motion in MOTIONS]
    for a, b in _BOUND:
        found += [(a, x, b, y) for x, y in itertools.product(_OBJECT_FACTS[a], _OBJECT_FACTS[b])]
    return found


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train for the given steps, export the text encoder, and return the report."""
    device = pick_device(args.device or "auto")
    torch.manual_seed(args.seed)
    log = loop.JsonLog(args.out / "text_log.jsonl")
    config = DIT_PRESETS[args.preset][1]
    tokenizer, encoder = build_tokenizer(), build_text_encoder(config).to(device).train()
    if args.init is None:
        look_nearby(encoder)
    else:
        load_text_encoder(encoder, args.init, grow=True)
    before = None if args.init is None else copy.deepcopy(encoder).requires_grad_(False)
    names = all_facts()
    index = {name: i for i, name in enumerate(names)}
    reader = nn.Linear(config.d_model, len(names)).to(device)
    parameters = [*encoder.parameters(), *reader.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01)
    start = last = time.monotonic()
    step = 0
    while (position := _position(args, step, start)) < 1:
        rng = random.Random(f"{args.seed}/{step}")
        specs = [_clip(args.seed, rng.randrange(_CLIPS), rng.choice(_FRAMES)) for _ in range(args.batch)]
        prompts = [caption(spec, rng) for spec in specs]
        hidden, real = _hidden(tokenizer, encoder, prompts)
        # What a fresh reader asks for at first would only harm an encoder that has learned already.
        read = hidden.detach() if before is not None and step < _READER_ALONE else hidden
        logits = _pooled(reader(read), real)
        loss = F.binary_cross_entropy_with_logits(logits, _targets(specs, index, device)) * len(names)
        kept = torch.zeros(())
        if before is not None:
            known = [row for row, spec in enumerate(specs) if spec.motions == 1]
            kept = _moved(hidden[known], _hidden(tokenizer, before, [prompts[row] for row in known])[0])
            loss = loss + _KEEP_WEIGHT * kept
        for group in optimizer.param_groups:
            group["lr"] = loop.learning_rate(args.lr, position, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        if time.monotonic() - last > 10 or step == args.steps:
            last = time.monotonic()
            log.write("step", step=step, loss=float(loss.detach()), moved=float(kept.detach()))
    read_of = [sample_spec("heldout", 1, i, frames) for frames in (49, 193) for i in range(256)]
    report = {
        "text_encoder": config_dict(config),
        "words": len(vocabulary()),
        "steps": step,
        "captions": step * args.batch,
        "seconds": time.monotonic() - start,
        "device": device_name(device),
        "read_right": read_share(tokenizer, encoder, reader, read_of),
        "before": loop.report_of_init(args.init, "text_report.json"),
    }
    encoder.save_pretrained(args.out / "text_encoder", safe_serialization=True)
    (args.out / "text_report.json").write_text(json.dumps(report, indent=2) + "\n")
    log.write("exported", **report)
    return report


def _moved(hidden: Tensor, before: Tensor) -> Tensor:
    """Mean squared difference of embeddings (B, tokens, d_model) from what they were, relative to their mean square."""
    return (hidden - before).square().mean() / before.square().mean()


def _position(args: argparse.Namespace, step: int, start: float) -> float:
    """Progress in [0, 1], of the steps or of the seconds, whichever end earlier."""
    in_time = 0.0 if args.seconds is None else (time.monotonic() - start) / args.seconds
    return max(step / int(args.steps), in_time)


@cache
def _clip(seed: int, number: int, frames: int) -> ClipSpec:
    return sample_spec("train", seed, number, frames)


@torch.no_grad()
def look_nearby(encoder: Any) -> None:
    """Start three heads of every layer on the next word, on the word before and on the word itself.

    Which colour goes with which shape stands in neighbouring words; heads that start alike everywhere take many times
    as long to find that out.
    """
    from transformers.models.umt5.modeling_umt5 import UMT5Attention

    offsets = torch.arange(-MAX_TOKENS, MAX_TOKENS + 1)
    for module in encoder.modules():
        if isinstance(module, UMT5Attention) and module.has_relative_attention_bias:
            buckets = module._relative_position_bucket(offsets)
            bias = module.relative_attention_bias.weight  # (buckets, heads)
            for head, target in zip(range(bias.shape[1]), (1, -1, 0), strict=False):
                distance = (offsets - target).abs().clamp(max=6).to(bias)
                # A bucket of far words holds many offsets, all of them beyond the clamp.
                bias[buckets.to(bias.device), head] = -distance


def load_text_encoder(encoder: Any, weights: Path, *, grow: bool = False) -> None:
    """Load the values of an exported folder's text encoder.

    Args:
        encoder: takes the values.
        weights: the folder.
        grow: take one that knows fewer words, too: the later ones stay as `encoder` has them.

    Raises:
        InputError: the folder's encoder does not know all words, and is not to grow.

    """
    from transformers import UMT5EncoderModel

    state = UMT5EncoderModel.from_pretrained(weights / "text_encoder").float().state_dict()
    for name, value in encoder.state_dict().items():
        known, words = len(state[name]), len(value)
        if state[name].shape[1:] == value.shape[1:] and known < words:
            if not grow:
                raise InputError(
                    f"--text: the text encoder in {weights} knows {known} of {words} words; train it on with "
                    f"`text --init {weights}`"
                )
            state[name] = torch.cat([state[name], value[known:].cpu()])
    encoder.load_state_dict(state)


@torch.no_grad()
def read_share(tokenizer: Any, encoder: Any, reader: nn.Module, specs: Iterable[ClipSpec]) -> dict[str, float]:
    """Share of clips whose plain caption lets the reader name each attribute, from the last token.

    Shape, colour and motion are read from one-object clips of one motion; "two objects" is the share of pairs of which
    it is read which colour goes with which shape and which motion, "order" that of clips of several motions of which it
    is read which comes when.
    """
    specs = list(specs)
    hidden, real = _hidden(tokenizer, encoder, [plain_caption(spec) for spec in specs])
    scores = _pooled(reader(hidden), real).cpu()
    names = all_facts()

    def likeliest(row: int, kind: tuple[str, ...], count: int) -> set[tuple[str, ...]]:
        columns = [i for i, name in enumerate(names) if name[::2] == kind]
        return {names[columns[i]] for i in scores[row, columns].topk(count).indices.tolist()}

    def share(kinds: Sequence[tuple[str, ...]], rows: list[int], count: int) -> float:
        right = [likeliest(row, kind, count) <= facts(specs[row]) for row in rows for kind in kinds]
        by_clip = [all(right[i : i + len(kinds)]) for i in range(0, len(right), len(kinds))]
        return sum(by_clip) / max(len(by_clip), 1)

    def in_order(row: int) -> bool:
        wanted = facts(specs[row])
        turns = _TURNS[specs[row].motions]
        columns = [[i for i, name in enumerate(names) if name[:2] == ("turn", turn)] for turn in turns]
        return all(names[column[int(scores[row, column].argmax())]] in wanted for column in columns)

    singles = [row for row, spec in enumerate(specs) if len(spec.objects) == spec.motions == 1]
    several = [row for row, spec in enumerate(specs) if spec.motions > 1]
    pairs = [row for row, spec in enumerate(specs) if len(spec.objects) == 2]
    shares = {name: share([(name,)], singles, 1) for name in ("background", "shape", "colour", "motion")}
    return {
        **shares,
        "two objects": share([("colour", "shape"), ("colour", "motion")], pairs, 2),
        "order": sum(map(in_order, several)) / max(len(several), 1),
    }


def _hidden(tokenizer: Any, encoder: Any, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Embeddings (B, tokens, d_model) as the pipeline makes them, and which of them belong to real tokens."""
    hidden = encode_prompts(tokenizer, encoder, prompts)
    return hidden, hidden.abs().sum(-1) > 0


def _pooled(logits: Tensor, real: Tensor) -> Tensor:
    """Logits (B, facts) that some token says a fact, from the tokens' own (B, tokens, facts)."""
    return logits.masked_fill(~real[..., None], -torch.inf).logsumexp(1)


def _targets(specs: list[ClipSpec], index: dict[tuple[str, ...], int], device: torch.device) -> Tensor:
    """(B, facts) of zeros and ones."""
    target = torch.zeros(len(specs), len(index))
    for row, spec in enumerate(specs):
        target[row, [index[name] for name in facts(spec)]] = 1.0
    return target.to(device)
