"""No weight starts at random: whatever a run uses comes from a file, or one sentence says what is missing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loading import load
from safetensors.torch import load_file, save_file

from vmonarch_cli.errors import ModelError

pytestmark = pytest.mark.usefixtures("one_thread")
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def copy(folders: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    def copied(name: str) -> Path:
        shutil.copytree(folders[name], tmp_path / name)
        return tmp_path / name

    return copied


def change(component: Path, edit: Callable[[Tensors], Tensors]) -> None:
    """Rewrite the one weights file of a component."""
    (path,) = component.glob("*.safetensors")
    save_file(edit(load_file(path)), path, {"format": "pt"})


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def without_last(tensors: Tensors) -> Tensors:
    """All but one weight; the widest name is one of a layer and not of what may be tied."""
    return {name: tensor for name, tensor in tensors.items() if name != max(tensors, key=len)}


def renamed(tensors: Tensors) -> Tensors:
    return {f"model.{name}.old": tensor for name, tensor in tensors.items()}


COMPONENTS = [
    ("wan", "text_encoder"),
    ("wan", "transformer"),
    ("wan", "vae"),
    ("wan-i2v", "image_encoder"),
    ("wan-two-stage", "transformer_2"),
    ("hunyuan-video", "text_encoder"),
    ("hunyuan-video", "text_encoder_2"),
    ("ltx-2", "connectors"),
]


@pytest.mark.parametrize(("name", "component"), COMPONENTS)
def test_a_missing_weight_is_named(copy: Callable[[str], Path], name: str, component: str) -> None:
    folder = copy(name)
    change(folder / component, without_last)
    with pytest.raises(ModelError, match=rf"{component} lacks the weights of \S+: download the model again"):
        load(folder)


@pytest.mark.parametrize(("name", "component"), COMPONENTS)
def test_weights_under_other_names_are_no_weights(copy: Callable[[str], Path], name: str, component: str) -> None:
    folder = copy(name)
    change(folder / component, renamed)
    with pytest.raises(ModelError, match=rf"{component} holds its weights under other names: .*in diffusers' format"):
        load(folder)


def test_the_original_format_is_named(copy: Callable[[str], Path]) -> None:
    folder = copy("wan")
    change(folder / "transformer", lambda old: {k.replace("attn1.to_q", "self_attn.q"): v for k, v in old.items()})
    with pytest.raises(ModelError, match=r"attn1\.to_q\.bias and 3 more should be there and blocks\.0\.self_attn\.q"):
        load(folder)


def test_eight_bits_that_the_libraries_would_read_as_they_are(copy: Callable[[str], Path]) -> None:
    folder = copy("wan")
    scale = {"blocks.0.attn1.to_q.scale_weight": torch.ones(1)}
    change(folder / "transformer", lambda old: {k: v.to(torch.float8_e4m3fn) for k, v in old.items()} | scale)
    with pytest.raises(ModelError, match=r"holds 8-bit weights with scales \(blocks\.0\.attn1\.to_q\.scale_weight\)"):
        load(folder)
    folder = folder.rename(folder.with_name("int8"))
    change(folder / "transformer", lambda old: {k: v.to(torch.int8) for k, v in old.items() if "scale_w" not in k})
    with pytest.raises(ModelError, match=r"holds quantised weights \(.* is I8\) and its config does not say how"):
        load(folder)


def test_two_transformers_and_their_boundary_belong_together(copy: Callable[[str], Path]) -> None:
    two, one = copy("wan-two-stage"), copy("wan")
    change_json(two / "model_index.json", boundary_ratio=None)
    with pytest.raises(ModelError, match="has no boundary_ratio, without which its transformer_2 is never used"):
        load(two)
    change_json(one / "model_index.json", boundary_ratio=0.9)
    with pytest.raises(ModelError, match="has a boundary_ratio and no transformer_2 that could take over there"):
        load(one)


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        ("text_encoder/config.json", "text_encoder/config.json is missing, which UMT5EncoderModel needs"),
        ("tokenizer/tokenizer_config.json", "tokenizer/tokenizer_config.json is missing, which .*Tokenizer.* needs"),
        (
            "tokenizer/tokenizer.json",
            "tokenizer has no vocabulary, which .*Tokenizer.* needs: tokenizer.json or another belongs there",
        ),
        ("scheduler/scheduler_config.json", "scheduler/scheduler_config.json is missing, which .*Scheduler needs"),
    ],
)
def test_a_missing_file_is_named(copy: Callable[[str], Path], missing: str, sentence: str) -> None:
    folder = copy("wan")
    (folder / missing).unlink()
    with pytest.raises(ModelError, match=sentence.replace(".json", r"\.json")) as caught:
        load(folder)
    assert "\n" not in caught.value.message
