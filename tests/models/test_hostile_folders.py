"""Model folders of strangers: whatever stands in their files, one sentence and exit 2, never an exception."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vmonarch_cli.cli.app import app
from vmonarch_cli.errors import ModelError
from vmonarch_cli.models.registry import find_model
from vmonarch_cli.models.weights import weight_files

FILES = ("model_index.json", "transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json")
ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 0.5, 10**9, 10**90, -(10**30), "", "x" * 70000, "\x1b[31m", "../../etc/passwd"),
    *([], [1, 2], [None, None], [[1], {}], ["diffusers", ["a"]], {}, {"a": {"b": []}}, [0] * 5000, [10**12] * 3),
)


@pytest.fixture
def folder(tiny_wan_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_wan_folder, tmp_path / "model")
    return tmp_path / "model"


def said(folder: Path) -> str:
    """What `models show` says of a folder that it refuses."""
    result = CliRunner().invoke(app, ["models", "show", str(folder)])
    assert result.exit_code == 2, result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert "unexpected" not in lines[0]
    assert "\x1b" not in lines[0]
    assert len(lines[0]) < 1000
    return lines[0].removeprefix("error: ")


def put(folder: Path, file: str, **values: Any) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("file", "values", "sentence"),
    [
        ("model_index.json", {"_class_name": ["WanPipeline"]}, "holds a pipeline of no named class with a WanTransf"),
        ("model_index.json", {"transformer": ["diffusers", {}]}, "its model_index.json names no transformer"),
        ("model_index.json", {"boundary_ratio": float("inf")}, "boundary_ratio is a number between 0 and 1, got inf"),
        ("model_index.json", {"boundary_ratio": "half"}, "boundary_ratio is a number between 0 and 1, got 'half'"),
        ("transformer/config.json", {"num_attention_heads": [2]}, "'num_attention_heads' of a Wan transformer is a w"),
        ("transformer/config.json", {"num_layers": None}, "has no 'num_layers', which a Wan transformer needs"),
        ("transformer/config.json", {"num_layers": 2.5}, "'num_layers' of a Wan transformer is a whole number from 1"),
        ("transformer/config.json", {"patch_size": [1, 0, 2]}, "'patch_size' of a Wan transformer is a whole number"),
        ("transformer/config.json", {"patch_size": [1, 2]}, "is a list of 3 whole numbers, got [1, 2]"),
        ("transformer/config.json", {"num_attention_heads": 10**90}, "from 1 to 1048576, got 1000000000000000000000"),
        ("transformer/config.json", {"ffn_dim": int("9" * 200)}, "holds a number of more than 100 digits"),
        ("vae/config.json", {"scale_factor_spatial": float("inf")}, "'scale_factor_spatial' of its VAE is a whole num"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(folder: Path, file: str, values: dict[str, Any], sentence: str) -> None:
    put(folder, file, **values)
    assert sentence in said(folder)


def _folder_for_weights(folder: Path) -> None:
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    path.unlink()
    path.mkdir()


def _link_loop(folder: Path) -> None:
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    path.unlink()
    path.symlink_to(path)


def _pipe(folder: Path) -> None:
    import os

    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    path.unlink()
    os.mkfifo(path)


def _deep(folder: Path) -> None:
    (folder / "transformer" / "config.json").write_text("[" * 100_000)


def _list(folder: Path) -> None:
    (folder / "model_index.json").write_text("[1, 2]")


def _null_offsets(folder: Path) -> None:
    _header(folder, {"a": {"dtype": "F32", "shape": [1], "data_offsets": None}}, 4)


def _negative_shape(folder: Path) -> None:
    _header(folder, {"a": {"dtype": "F32", "shape": [-1, 4], "data_offsets": [0, 4]}}, 4)


def _more_than_it_holds(folder: Path) -> None:
    _header(folder, {"a": {"dtype": "F32", "shape": [10**40], "data_offsets": [0, 4]}}, 4)


def _header(folder: Path, table: dict[str, Any], size: int) -> None:
    raw = json.dumps(table).encode()
    content = len(raw).to_bytes(8, "little") + raw + bytes(size)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(content)


def _odd_shards(folder: Path) -> None:
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text('{"weight_map": [1]}')


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (_folder_for_weights, "is a folder, not a file"),
        (_link_loop, "cannot be read: "),
        (_pipe, "is a pipe, not a file"),
        (_deep, "transformer/config.json is nested too deeply"),
        (_list, "model_index.json is not a JSON object"),
        (_null_offsets, "is damaged: its header does not parse"),
        (_negative_shape, "is damaged: its header does not parse"),
        (_more_than_it_holds, "is damaged: its header does not parse"),
        (_odd_shards, "its weight_map does not name the file of each weight"),
    ],
)
def test_files_that_are_no_files(folder: Path, damage: Callable[[Path], None], sentence: str) -> None:
    damage(folder)
    assert sentence in said(folder)


def test_any_value_anywhere_is_taken_or_refused_in_one_sentence(folder: Path) -> None:
    """Every key of every config, one at a time, replaced by one odd value of a seeded choice."""
    chance = random.Random(0)
    refused = 0
    for file in FILES:
        path = folder / file
        before = path.read_text()
        for key in json.loads(before):
            for value in chance.sample(ODD, 6):
                put(folder, file, **{key: value})
                try:
                    find_model(str(folder))
                except ModelError as error:
                    refused += 1
                    assert "\n" not in error.message
                    assert len(error.message) < 1000
                path.write_text(before)
    assert refused > 30


def test_weights_that_lie_there_twice_are_counted_once(folder: Path) -> None:
    once = find_model(str(folder))[0]
    for component, name in (("transformer", "diffusion_pytorch_model"), ("text_encoder", "model")):
        single = folder / component / f"{name}.safetensors"
        shutil.copy(single, single.with_name(f"{name}.fp16.safetensors"))
        shutil.copy(single, single.with_name(f"{name}-00001-of-00001.safetensors"))
        shutil.copy(single, single.with_name("ema.safetensors"))
        index = {"weight_map": {"a": f"{name}-00001-of-00001.safetensors"}}
        single.with_name(f"{name}.safetensors.index.json").write_text(json.dumps(index))
        variant = {"weight_map": {"a": f"{name}.fp16-00001-of-00001.safetensors"}}
        single.with_name(f"{name}.fp16.safetensors.index.json").write_text(json.dumps(variant))
    twice = find_model(str(folder))[0]
    assert twice.transformer_params == once.transformer_params
    assert twice.text_encoder_params == once.text_encoder_params


def test_which_files_are_read() -> None:
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert weight_files([*shards, "model.safetensors"]) == ["model.safetensors"], "transformers takes the one file"
    own = [f"diffusion_pytorch_{name}" for name in shards]
    single = "diffusion_pytorch_model.safetensors"
    assert weight_files([*own, single, f"{single}.index.json"]) == own, "diffusers takes the shards of an index"
    assert weight_files([*own, single]) == [single]
    assert weight_files(["model.fp16.safetensors", "model-00001-of-00002.fp16.safetensors"]) == []
    assert weight_files(["b.safetensors", "a.safetensors", "c.bin"]) == ["a.safetensors", "b.safetensors"]
