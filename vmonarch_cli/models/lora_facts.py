"""What a LoRA file says of itself, read without torch: format, rank, alpha, and which model it can be for."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from vmonarch_cli.errors import ModelError
from vmonarch_cli.models.base import ModelEntry
from vmonarch_cli.models.finite import first_not_finite
from vmonarch_cli.models.lora import LoraTensor, check_shapes, format_of, lora_tensors
from vmonarch_cli.models.lora_files import Lora, LoraFile, lora_files
from vmonarch_cli.models.weights import TensorHeader, read_header, read_metadata, read_scalar
from vmonarch_cli.text import printable
from vmonarch_cli.untrusted.files import known_sha256, read_json

_DISTILLED = re.compile(
    r"lightx2v|lightning|causvid|distill|(?<!\d)[1-8][-_ ]?steps?(?![a-z0-9])|fusionx|accvid|turbo|hyper(?![a-z])|"
    r"fast[-_]?(wan|hunyuan|video)|self[-_ ]?forcing|(?<![a-z])(dmd2?|lcm|pcm|tcd)(?![a-z])"
)
"""Words in the name or metadata of a LoRA that makes a model work in a few steps without guidance."""
_TITLES = ("ss_output_name", "ss_training_comment", "modelspec.title", "modelspec.description", "title", "name")
"""What trainers call a LoRA in its metadata."""
_QUERY = re.compile(r"(^|\.)(attn1|self_attn|attn)\.(to_)?q$|blocks_\d+_(attn1|self_attn|attn)_(to_)?q$")
_BLOCK = re.compile(r"^(?:\w*_)?blocks[._](\d+)[._]")


class LoraFacts(BaseModel):
    """A LoRA file in figures, for the header and the record."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    scale: float
    format: str
    """"diffusers", "ComfyUI", "PEFT", "kohya", "DiffSynth" or "bare names"."""
    experts: tuple[str, ...] = ()
    """Of two transformers those that it changes, "high" and "low"; empty where a model has one."""
    layers: int
    """Layers with matrices A and B."""
    ranks: tuple[int, int] | None
    """Smallest and largest rank."""
    alphas: tuple[float, float] | None
    """Smallest and largest alpha; None where no layer has one, and alpha counts as the rank."""
    parameters: int
    """Parameters that are changed outright: norms, biases, modulations, whole matrices."""
    dora: bool = False
    distilled: str | None = None
    """The word in its name or metadata that says it is for few steps without guidance."""
    sha256: str | None = None
    """Of the file; None in what earlier versions saved."""
    settings_sha256: str | None = None
    """Of peft's settings beside it, where there are some."""

    def words(self) -> str:
        """'name.safetensors: kohya, rank 4, alpha 2, 16 layers, scale 0.5, both transformers'."""
        found = [self.format]
        if self.ranks is not None:
            found += [f"rank {_span(self.ranks)}", f"alpha {_span(self.alphas or self.ranks)}", f"{self.layers} layers"]
        if self.dora:
            found.append("DoRA")
        if self.parameters:
            found.append(f"{self.parameters} parameter{'s' if self.parameters > 1 else ''} changed outright")
        found.append(f"scale {self.scale:g}")
        if len(self.experts) == 2:
            found.append("both transformers")
        elif self.experts:
            found.append(f"{self.experts[0]}-noise transformer")
        return f"{self.name}: {', '.join(found)}"


def _span(pair: tuple[float, float]) -> str:
    return f"{pair[0]:g}" if pair[0] == pair[1] else f"{pair[0]:g} to {pair[1]:g}"


@dataclass(frozen=True)
class LoraSettings:
    """Ranks and alphas as peft's settings have them; a layer's own alpha comes first."""

    alpha: float | None = None
    rank: float | None = None
    by_rank_root: bool = False
    alphas: tuple[tuple[str, float], ...] = ()
    ranks: tuple[tuple[str, float], ...] = ()
    dora: bool = False

    @classmethod
    def of(cls, file: LoraFile) -> LoraSettings:
        """From a file's metadata, or from peft's own file beside it; ModelError when they do not parse."""
        text = read_metadata(file.path).get("lora_adapter_metadata")
        if text is None and file.settings is None:
            return cls()
        try:
            if text is not None:
                table = {_bare(key): value for key, value in json.loads(text).items()}
            else:
                table = dict(read_json(file.settings, str(file.settings), ModelError)) if file.settings else {}
            return cls(
                _number(table.get("lora_alpha")),
                _number(table.get("r")),
                bool(table.get("use_rslora")),
                _pattern(table.get("alpha_pattern")),
                _pattern(table.get("rank_pattern")),
                bool(table.get("use_dora")),
            )
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise ModelError(f"LoRA {file.name} has settings in its metadata that do not parse") from None

    def scale(self, layer: str, own: float | None, rank: int, source: str) -> float:
        """What B A is multiplied by: alpha / rank, 1 without an alpha; ModelError for a rank that contradicts."""
        said = _match(self.ranks, layer, self.rank)
        if said is not None and said != rank:
            raise ModelError(
                f"LoRA {source} contradicts itself: its settings say rank {said:g} and {printable(layer)} has {rank}"
            )
        alpha = own if own is not None else self.alpha_of(layer)
        if alpha is None:
            return 1.0
        if not math.isfinite(alpha):
            raise ModelError(f"LoRA {source} has an alpha that is not a finite number, of {printable(layer)}")
        return alpha / (math.sqrt(max(1, rank)) if self.by_rank_root and own is None else max(1, rank))

    def alpha_of(self, layer: str) -> float | None:
        """The alpha that the settings give a layer."""
        return _match(self.alphas, layer, self.alpha)


def _bare(key: str) -> str:
    return key.removeprefix("transformer.").removeprefix("transformer_2.")


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _pattern(table: Any) -> tuple[tuple[str, float], ...]:
    return tuple((str(name).lstrip("^"), float(value)) for name, value in (table or {}).items())


def _match(patterns: Sequence[tuple[str, float]], layer: str, default: float | None) -> float | None:
    return next((value for name, value in patterns if layer == name or layer.endswith(f".{name}")), default)


def targets(file: LoraFile, tensors: Sequence[LoraTensor], transformers: int) -> dict[bool, tuple[bool, ...]]:
    """Which transformers (False the first, True the second) the tensors without and with the second's mark go to.

    Without a word a file of one transformer goes to both. ModelError for what is not there or contradicts.
    """
    marked = {tensor.second for tensor in tensors}
    if transformers < 2:
        if True in marked:
            raise ModelError(f"LoRA {file.name} is for the second of two transformers, and this model has one")
        return {False: (False,)}
    if marked == {False}:
        chosen = {"high": (False,), "low": (True,), None: (False, True)}[file.expert]
        return {False: chosen}
    if marked == {True}:
        if file.expert == "high":
            raise ModelError(f"LoRA {file.name} is for the low-noise transformer by its tensors, and not for high:")
        return {True: (True,)}
    if file.expert is not None:
        raise ModelError(f"LoRA {file.name} has tensors for both transformers: name it without {file.expert}:")
    return {False: (False,), True: (True,)}


def describe(lora: Lora, model: ModelEntry) -> list[LoraFacts]:
    """The facts of each file of a LoRA, checked as far as names, shapes and values tell; InputError or ModelError."""
    found = []
    for file in lora_files(lora, model.transformers):
        headers = read_header(file.path)
        tensors = lora_tensors(headers, file.name)
        check_shapes(tensors, headers, file.name)
        goes = targets(file, tensors, model.transformers)
        _check_model(tensors, headers, model, file.name)
        facts = _facts(file, lora, tensors, headers)
        odd = first_not_finite(file.path, "LoRA")
        if odd is not None:
            raise ModelError(f"LoRA {file.name} holds values that are not finite, in {printable(odd)}")
        experts = {second for mark in goes.values() for second in mark}
        names = tuple(word for word, second in (("high", False), ("low", True)) if second in experts)
        found.append(facts.model_copy(update={"experts": names if model.transformers > 1 else ()}))
    return found


def _facts(file: LoraFile, lora: Lora, tensors: Sequence[LoraTensor], headers: Mapping[str, TensorHeader]) -> LoraFacts:
    settings, said = LoraSettings.of(file), read_metadata(file.path)
    ranks = {(t.second, t.layer): headers[t.name].shape[0] for t in tensors if t.part == "A"}
    own = {(t.second, t.layer): read_scalar(file.path, headers[t.name]) for t in tensors if t.part == "alpha"}
    alphas: list[float] = []
    for key, rank in ranks.items():
        settings.scale(key[1], own.get(key), rank, file.name)
        alpha = own.get(key, settings.alpha_of(key[1]))
        alphas += [] if alpha is None else [alpha]
    outright = [t for t in tensors if t.part in ("difference", "modulation")]
    outright += [t for t in tensors if t.part == "bias" and (t.second, t.layer) not in ranks]
    return LoraFacts(
        name=printable(file.name),
        scale=lora.scale,
        format=format_of(headers),
        layers=len(ranks),
        ranks=(min(ranks.values()), max(ranks.values())) if ranks else None,
        alphas=(min(alphas), max(alphas)) if alphas else None,
        parameters=len(outright),
        dora=any(t.part == "magnitude" for t in tensors),
        distilled=distilled_word(_telling(file), *(said[key] for key in _TITLES if key in said)),
        sha256=known_sha256(file.path),
        settings_sha256=None if file.settings is None else known_sha256(file.settings),
    )


def _telling(file: LoraFile) -> str:
    """The part of a path that tells what a file is: its name, and its folder's where every LoRA has that name."""
    if not file.path.is_relative_to(file.name):
        return f"{file.name}/{file.path.name}"  # of the hub
    same = re.search(r"(lora_weights|adapter_model|noise_model|/model)\.safetensors$", str(file.path))
    return f"{file.path.parent.name}/{file.path.name}" if same else file.path.name


def distilled_word(*texts: str) -> str | None:
    """What in these texts says that a LoRA is for few steps without guidance, or None."""
    for text in texts:
        found = _DISTILLED.search(text.lower()[:1000])
        if found is not None:
            return found[0].strip("-_ ")
    return None


def _check_model(
    tensors: Sequence[LoraTensor], headers: Mapping[str, TensorHeader], model: ModelEntry, source: str
) -> None:
    """ModelError for a LoRA of another width or of more layers than a model has."""
    widths = {headers[t.name].shape[0] for t in tensors if t.part == "B" and _QUERY.search(t.layer)}
    width = model.heads * model.head_dim
    if widths and width not in widths:
        raise ModelError(
            f"LoRA {source} belongs to another model: its self-attention is {min(widths)} wide, and that of "
            f"{model.alias} {width}"
        )
    blocks = {int(found[1]) for t in tensors if (found := _BLOCK.match(t.layer)) is not None and len(found[1]) < 9}
    if blocks and max(blocks) >= model.layers:
        beyond = sum(block >= model.layers for block in blocks)
        raise ModelError(
            f"LoRA {source} belongs to another model: {beyond} of its {len(blocks)} blocks are beyond the "
            f"{model.layers} of {model.alias}"
        )


def describe_local(lora: Lora, model: ModelEntry) -> list[LoraFacts]:
    """The same for what lies on this disk; nothing of what is on the hub, which is looked at when it is there."""
    return describe(lora, model) if is_local(lora) else []


def is_local(lora: Lora) -> bool:
    """Whether a LoRA is a file or folder of this machine, and not one of the hub."""
    return Path(lora.source).exists()
