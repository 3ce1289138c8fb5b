"""Files of tuned adapters: written whole, read back with everything they say, refused in one sentence when damaged."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import adapter_of, weights, write
from loading import load
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vmonarch_cli.errors import InputError, ModelError
from vmonarch_cli.media.publish import NameTaken
from vmonarch_cli.models.tuned import TunedAdapter, check_finite, fingerprint, read_adapter
from vmonarch_cli.pipeline.tuned import ADAPTER_NAME, load_tuned, write_adapter
from vmonarch_cli.presets import Preset

pytestmark = pytest.mark.usefixtures("one_thread")
FAST = Preset(name="fast", band=0, warm_start=True)


@pytest.fixture(scope="module")
def adapter(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(folders["wan"], tmp_path_factory.mktemp("adapter") / "fast.safetensors", FAST)


def rewritten(adapter: Path, target: Path, **changes: Any) -> Path:
    """The file with other metadata: `changes` of its table, `None` takes a field out."""
    with safe_open(adapter, framework="pt") as file:
        table = json.loads(file.metadata()["vmonarch"])
    table = {key: value for key, value in (table | changes).items() if value is not None}
    save_file(load_file(adapter), target, {"vmonarch": json.dumps(table)})
    return target


def test_what_is_written_is_read_back(folders: dict[str, Path], adapter: Path) -> None:
    said = read_adapter(adapter)
    assert said == adapter_of(folders["wan"], FAST)
    assert said.made_for == FAST
    assert json.loads(said.to_json())["schema"] == 1
    check_finite(adapter)


def test_a_file_appears_whole_or_not_at_all(folders: dict[str, Path], tmp_path: Path) -> None:
    path, said = tmp_path / "new" / "fast.safetensors", adapter_of(folders["wan"], FAST)
    state = weights(load(folders["wan"]).transformer)
    broken = {**state, "transformer.blocks.0.attn1.to_q.lora_B.weight": torch.full((32, 4), float("nan"))}
    with pytest.raises(ValueError, match="not finite"):
        write_adapter(path, broken, said)
    with pytest.raises(ValueError, match=r"blocks\.0 is not the name"):
        write_adapter(path, {"blocks.0": torch.zeros(1)}, said)
    assert not path.exists()
    write_adapter(path, state, said)
    with pytest.raises(NameTaken):
        write_adapter(path, state, said)
    write_adapter(path, state, said.model_copy(update={"steps": 7}), overwrite=True)
    assert read_adapter(path).steps == 7
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_diffusers_reads_the_file_itself_alpha_included(folders: dict[str, Path], tmp_path: Path) -> None:
    path = write(folders["wan"], tmp_path / "half.safetensors", FAST, alpha=2)
    theirs, ours = load(folders["wan"]), load(folders["wan"])
    theirs.load_lora_weights(path)
    load_tuned(ours, path)
    x = torch.randn(1, 5, theirs.transformer.blocks[0].attn1.to_q.in_features)
    layers = [pipeline.transformer.blocks[0].attn1.to_q for pipeline in (theirs, ours)]
    torch.testing.assert_close(layers[0](x), layers[1](x))
    plain = load(folders["wan"]).transformer.blocks[0].attn1.to_q(x)
    full = load(folders["wan"])
    load_tuned(full, write(folders["wan"], tmp_path / "full.safetensors", FAST))
    torch.testing.assert_close(layers[1](x) - plain, (full.transformer.blocks[0].attn1.to_q(x) - plain) / 2)


def test_both_transformers_get_their_own(folders: dict[str, Path], tmp_path: Path) -> None:
    path = write(folders["wan-two-stage"], tmp_path / "two.safetensors", FAST)
    pipeline = load(folders["wan-two-stage"])
    load_tuned(pipeline, path)
    state = load_file(path)
    for part in ("transformer", "transformer_2"):
        layer = getattr(pipeline, part).blocks[1].ffn.net[2]
        key = f"{part}.blocks.1.ffn.net.2.lora_A.weight"
        assert torch.equal(layer.lora_A[ADAPTER_NAME].weight, state[key])


def test_an_adapter_of_the_first_transformer_stays_there(folders: dict[str, Path], tmp_path: Path) -> None:
    """A LoRA whose tensors name no transformer would go to both."""

    def keep_first(state: dict[str, Any]) -> None:
        for name in [name for name in state if name.startswith("transformer_2.")]:
            del state[name]

    path = write(folders["wan-two-stage"], tmp_path / "low_noise.safetensors", FAST, change=keep_first)
    pipeline = load(folders["wan-two-stage"])
    load_tuned(pipeline, path)
    assert ADAPTER_NAME in pipeline.transformer.blocks[0].attn1.to_q.lora_A
    assert not hasattr(pipeline.transformer_2.blocks[0].attn1.to_q, "lora_A")


def test_a_fingerprint_is_of_the_weights_and_not_of_their_files(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folders["wan"]
    transformer = load(folder).transformer
    transformer.save_pretrained(tmp_path / "shards" / "transformer", max_shard_size="20KB")
    assert len(list((tmp_path / "shards" / "transformer").glob("*.safetensors"))) > 1
    assert fingerprint(tmp_path / "shards") == fingerprint(folder)
    with torch.no_grad():
        transformer.blocks[1].attn1.to_q.bias[0] += 1
    transformer.save_pretrained(tmp_path / "changed" / "transformer")
    assert fingerprint(tmp_path / "changed") != fingerprint(folder)
    assert fingerprint(folders["wan-two-stage"]) != fingerprint(folder), "transformer_2 counts, too"
    with pytest.raises(ModelError, match="has no weights"):
        fingerprint(tmp_path)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"schema": 2}, r"made by a later version of vmonarch \(schema 2, this version reads 1\)"),
        ({"fingerprint": None}, "it has no fingerprint"),
        ({"fingerprint": "x"}, "fingerprint takes 64 hexadecimal digits, got 'x'"),
        ({"also_for": {"a/b": "x"}}, "also_for takes 64 hexadecimal digits, got 'x'"),
        ({"steps": "20"}, "steps takes a whole number, got '20'"),
        ({"steps": 0}, "steps takes at least 1, got 0"),
        ({"guidance_scale": "high"}, "guidance_scale takes a number, got 'high'"),
        ({"size": "big"}, "size takes WIDTHxHEIGHT, got 'big'"),
        ({"preset": []}, "preset takes a table, got a list"),
        ({"preset": {"name": "x", "band": "wide"}}, "preset is no preset of this version: band takes a whole number"),
        ({"preset": {"name": "x", "attention": "dense"}}, "preset is dense attention"),
        ({"preset_name": "a\x1b[2J"}, "preset_name takes one printable line"),
        ({"surprise": 1}, "it has a field 'surprise', which is not known"),
    ],
)
def test_metadata_that_says_it_wrong(adapter: Path, tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    path = rewritten(adapter, tmp_path / "odd.safetensors", **changes)
    with pytest.raises(InputError, match=sentence):
        read_adapter(path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def no_tensors_file(path: Path) -> None:
    path.write_text("hello, I am no adapter")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def no_lora(path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, path, {"vmonarch": "{}"})


def outright(path: Path) -> None:
    save_file(load_file(path) | {"transformer.blocks.0.norm2.diff": torch.ones(32)}, path, {"vmonarch": "{}"})


def other_ranks(path: Path) -> None:
    state = load_file(path)
    name = next(name for name in state if "lora_B" in name)
    save_file(state | {name: torch.ones(32, 5)}, path, {"vmonarch": "{}"})


def no_metadata(path: Path) -> None:
    save_file(load_file(path), path)


def no_json(path: Path) -> None:
    save_file(load_file(path), path, {"vmonarch": "{"})


def deep(path: Path) -> None:
    save_file(load_file(path), path, {"vmonarch": "[" * 100_000})


def whole_numbers(path: Path) -> None:
    save_file({name: tensor.to(torch.int8) for name, tensor in load_file(path).items()}, path, {"vmonarch": "{}"})


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (Path.unlink, "does not exist"),
        (cut, "is damaged: it has .* bytes and its header describes"),
        (no_tensors_file, "is not a safetensors file"),
        (pipe, "is a pipe, not a file"),
        (folder, "is a folder, not a file"),
        (no_lora, "is no LoRA of a video transformer"),
        (outright, r"changes more than pairs of matrices can \(transformer\.blocks\.0\.norm2\.diff\)"),
        (other_ranks, "contradicts itself: .* has an A of rank 4 and a B of rank 5"),
        (no_metadata, "does not say what it was tuned for"),
        (no_json, "is not valid JSON"),
        (deep, "is nested too deeply"),
        (whole_numbers, "holds .* as 'I8', and no LoRA is that"),
    ],
)
def test_files_that_are_no_adapter(
    adapter: Path, tmp_path: Path, damage: Callable[[Path], None], sentence: str
) -> None:
    path = tmp_path / "odd.safetensors"
    path.write_bytes(adapter.read_bytes())
    damage(path)
    with pytest.raises(InputError, match=sentence) as error:
        read_adapter(path)
    assert "\n" not in error.value.message


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", ["nan", "-inf"])
def test_weights_that_are_not_finite(adapter: Path, tmp_path: Path, kind: torch.dtype, value: str) -> None:
    state = {name: tensor.to(kind) for name, tensor in load_file(adapter).items()}
    with safe_open(adapter, framework="pt") as file:
        metadata = file.metadata()
    path = tmp_path / "odd.safetensors"
    save_file(state, path, metadata)
    check_finite(path)
    state["transformer.blocks.1.attn2.to_v.lora_B.weight"][3, 2] = float(value)
    save_file(state, path, metadata)
    assert isinstance(read_adapter(path), TunedAdapter)
    with pytest.raises(InputError, match=r"not finite, the first in transformer\.blocks\.1\.attn2\.to_v\.lora_B"):
        check_finite(path)
