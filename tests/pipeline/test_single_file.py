"""A transformer's weights from one file, on top of a model folder: read, checked, recorded, refused."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import tiny_wan
import torch
from loading import CPU, load
from safetensors.torch import load_file, save_file
from tiny_families import TINY
from typer.testing import CliRunner, Result
from wan_original import original_weights, write_gguf, write_original

from vmonarch_cli.cli.app import app
from vmonarch_cli.errors import ModelError
from vmonarch_cli.families.registry import FAMILIES
from vmonarch_cli.models.single_file import READABLE, check_single_file
from vmonarch_cli.models.wan import PIPELINES as WAN
from vmonarch_cli.pipeline.load import load_pipeline
from vmonarch_cli.pipeline.single_file import load_transformer
from vmonarch_cli.plan.setup import Setup
from vmonarch_cli.untrusted.files import file_sha256

pytestmark = pytest.mark.usefixtures("one_thread")
FLAGS = "--size 48x32 --num-frames 9 --steps 2 --device cpu --dtype float32"
SHAPE = ["-p", "a", *FLAGS.split(), "--preset", "dense"]
SEED = 5  # of weights that are not the folder's own


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """own.safetensors: the folder's weights; other.safetensors: those of another model of its size."""
    folder = tmp_path_factory.mktemp("files")
    write_original(tiny_wan.tiny_transformer(), folder / "own.safetensors")
    write_original(tiny_wan.tiny_transformer(seed=SEED), folder / "other.safetensors")
    return folder


def invoke(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def generate(folder: Path, output: Path, *more: str) -> Result:
    return invoke("generate", "-m", str(folder), *SHAPE, "-o", str(output), "-q", *more)


def record_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
    return found


def test_a_clip_from_the_file_equals_the_folders(tiny_wan_folder: Path, files: Path, tmp_path: Path) -> None:
    own = files / "own.safetensors"
    assert generate(tiny_wan_folder, tmp_path / "folder.gif").exit_code == 0
    result = generate(tiny_wan_folder, tmp_path / "file.gif", "--transformer", str(own))
    assert result.exit_code == 0, result.stderr
    result = generate(tiny_wan_folder, tmp_path / "other.gif", "--transformer", str(files / "other.safetensors"))
    assert result.exit_code == 0, result.stderr
    hashes = [record_of(tmp_path / f"{name}.gif")["frames"]["sha256"] for name in ("folder", "file", "other")]
    assert hashes[0] == hashes[1] != hashes[2]
    record = record_of(tmp_path / "file.gif")
    assert record["settings"]["transformer"] == {"value": str(own), "origin": "flag"}
    assert record["weights"] == [{"part": "transformer", "file": str(own), "sha256": file_sha256(own)}]
    assert "weights" not in record_of(tmp_path / "folder.gif")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_weight_has_the_type_and_value_of_the_folders(
    tiny_wan_folder: Path, files: Path, dtype: torch.dtype
) -> None:
    """In bfloat16, too, where the folder's loader keeps some in float32."""
    stock = load_pipeline(str(tiny_wan_folder), device=CPU, dtype=dtype).transformer.state_dict()
    found = load_transformer(files / "own.safetensors", tiny_wan_folder, "transformer", dtype).state_dict()
    assert found.keys() == stock.keys()
    for name, value in stock.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def test_a_file_in_diffusers_format_and_one_with_a_prefix_are_read(
    tiny_wan_folder: Path, files: Path, tmp_path: Path
) -> None:
    stock = load(tiny_wan_folder).transformer.state_dict()
    save_file({name: value.clone() for name, value in stock.items()}, tmp_path / "diffusers.safetensors")
    original = load_file(files / "own.safetensors")
    save_file({f"model.diffusion_model.{name}": v for name, v in original.items()}, tmp_path / "prefix.safetensors")
    for name in ("diffusers", "prefix"):
        path = check_single_file(str(tmp_path / f"{name}.safetensors"), "--transformer", "x", WAN[0])
        found = load_transformer(path, tiny_wan_folder, "transformer", torch.float32).state_dict()
        assert all(torch.equal(found[key], value) for key, value in stock.items())


def test_both_transformers_of_a_two_stage_model_may_come_from_files(
    tiny_wan_two_stage_folder: Path, files: Path
) -> None:
    setup = Setup(offload="none", transformer_2=str(files / "other.safetensors"))
    pipeline = load(tiny_wan_two_stage_folder, setup=setup)
    weights = [part.blocks[0].attn1.to_q.weight for part in (pipeline.transformer, pipeline.transformer_2)]
    assert torch.equal(weights[0], tiny_wan.tiny_transformer().blocks[0].attn1.to_q.weight)
    assert torch.equal(weights[1], tiny_wan.tiny_transformer(seed=SEED).blocks[0].attn1.to_q.weight)


def test_a_file_may_be_quantised_to_fp8(tiny_wan_folder: Path, files: Path, tmp_path: Path) -> None:
    file = str(files / "own.safetensors")
    plain = generate(tiny_wan_folder, tmp_path / "plain.gif", "--quantize", "fp8-storage")
    assert plain.exit_code == 0, plain.stderr
    result = generate(tiny_wan_folder, tmp_path / "x.gif", "--quantize", "fp8-storage", "--transformer", file)
    assert result.exit_code == 0, result.stderr
    hashes = [record_of(tmp_path / f"{name}.gif")["frames"]["sha256"] for name in ("plain", "x")]
    assert hashes[0] == hashes[1]
    assert refused(tiny_wan_folder, tmp_path / "no", "--quantize", "int8-storage", "--transformer", file) == (
        "--quantize int8-storage reads the weights of a folder alone: with --transformer use --quantize fp8-storage, "
        "or int8, which computes in 8 bits"
    )


def test_eight_bit_weights_without_scales_are_read(tiny_wan_folder: Path, files: Path, tmp_path: Path) -> None:
    weights = load_file(files / "own.safetensors")
    narrow = {n: v.to(torch.float8_e4m3fn) if v.ndim == 2 and "attn.q" in n else v for n, v in weights.items()}
    save_file(narrow, tmp_path / "fp8.safetensors")
    result = generate(tiny_wan_folder, tmp_path / "x.gif", "--transformer", str(tmp_path / "fp8.safetensors"))
    assert result.exit_code == 0, result.stderr


def test_a_rerun_loads_the_file_again_and_says_when_it_changed(
    tiny_wan_folder: Path, files: Path, tmp_path: Path
) -> None:
    file = tmp_path / "mine.safetensors"
    file.write_bytes((files / "own.safetensors").read_bytes())
    assert generate(tiny_wan_folder, tmp_path / "x.gif", "--transformer", str(file)).exit_code == 0
    result = invoke("rerun", str(tmp_path / "x.json"), "-o", str(tmp_path / "y.gif"))
    assert result.exit_code == 0, result.stderr
    assert f"note: the record loads the transformer file {file}" in result.stderr
    then = file_sha256(file)[:12]
    file.write_bytes((files / "other.safetensors").read_bytes())
    os.utime(file, ns=(1, 1))
    result = invoke("rerun", str(tmp_path / "x.json"), "-o", str(tmp_path / "z.gif"))
    assert result.exit_code == 1
    assert f"transformer was {then} and is {file_sha256(file)[:12]}" in result.stdout


def test_lines_of_a_batch_may_name_files(tiny_wan_folder: Path, files: Path, tmp_path: Path) -> None:
    lines = [
        {"prompt": "a", "output": "folder.gif"},
        {"prompt": "a", "output": "other.gif", "transformer": str(files / "other.safetensors")},
        {"prompt": "a", "output": "own.gif", "transformer": str(files / "own.safetensors")},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    flags = [word for word in SHAPE if word not in ("-p", "a")]
    batch = ["generate", "-m", str(tiny_wan_folder), "--prompts-file", str(tmp_path / "p.jsonl"), *flags, "-q"]
    result = invoke(*batch, "-o", str(tmp_path / "out"))
    assert result.exit_code == 0, result.stderr
    records = {name: record_of(tmp_path / "out" / f"{name}.gif") for name in ("folder", "other", "own")}
    hashes = {name: record["frames"]["sha256"] for name, record in records.items()}
    assert hashes["folder"] == hashes["own"] != hashes["other"]
    assert records["other"]["settings"]["transformer"]["origin"] == "prompts file"
    again = invoke(*batch, "-o", str(tmp_path / "out"), "--json")
    assert {entry["status"] for entry in json.loads(again.stdout)["clips"]} == {"done"}


def test_compare_and_plan_take_a_file(tiny_wan_folder: Path, files: Path, tmp_path: Path) -> None:
    file = str(files / "other.safetensors")
    flags = [word for word in SHAPE if word not in ("--preset", "dense")]
    result = invoke(
        "compare", "-m", str(tiny_wan_folder), *flags, "--preset", "paper", "--transformer", file, "-o", f"{tmp_path}/c"
    )
    assert result.exit_code == 0, result.stderr
    assert record_of(tmp_path / "c" / "paper.mp4")["weights"][0]["file"] == file
    planned = invoke("plan", "-m", str(tiny_wan_folder), *SHAPE, "--transformer", file, "--json")
    assert json.loads(planned.stdout)["settings"]["transformer"] == {"value": file, "origin": "flag"}


# What cannot be


def refused(tiny_wan_folder: Path, tmp_path: Path, *flags: str) -> str:
    result = generate(tiny_wan_folder, tmp_path / "x.gif", *flags)
    assert result.exit_code == 2, result.stdout
    assert not (tmp_path / "x.gif").exists()
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("error: ").strip()


def test_a_file_of_another_family_is_refused_before_anything_loads(tiny_wan_folder: Path, tmp_path: Path) -> None:
    ltx = tmp_path / "ltx.safetensors"
    weights = TINY["ltx-video"].build().transformer.state_dict()
    save_file({name: value.clone() for name, value in weights.items()}, ltx)
    assert refused(tiny_wan_folder, tmp_path, "--transformer", str(ltx)) == (
        f"{ltx} holds an LTXVideoTransformer3DModel, and tiny-wan has a WanTransformer3DModel: "
        "give a file of that family"
    )
    planned = invoke("plan", "-m", str(tiny_wan_folder), *SHAPE, "--transformer", str(ltx))
    assert planned.exit_code == 2
    strange = tmp_path / "strange.safetensors"
    save_file({"a.weight": torch.zeros(2)}, strange)
    assert refused(tiny_wan_folder, tmp_path, "--transformer", str(strange)).startswith(
        f"{strange} holds no video transformer that is known, and tiny-wan has a WanTransformer3DModel"
    )


@pytest.mark.parametrize(
    "name", ["wan", "wan-vace", "skyreels-v2", "hunyuan-video", "ltx-video", "ltx-2", "minimax-h3"]
)
def test_every_family_knows_its_own_files(name: str, tmp_path: Path) -> None:
    from vmonarch_cli.models.catalogue import PIPELINES

    pipeline = TINY[name].build()
    weights = pipeline.transformer.state_dict()
    path = tmp_path / "x.safetensors"
    save_file({key: value.clone() for key, value in weights.items()}, path)
    assert check_single_file(str(path), "--transformer", "x", PIPELINES[type(pipeline).__name__]) == path
    pipeline.save_pretrained(tmp_path / "model", safe_serialization=True)
    found = load_transformer(path, tmp_path / "model", "transformer", torch.float32).state_dict()
    assert all(torch.equal(found[key], value) for key, value in weights.items())


def test_a_file_that_does_not_fit_the_folder_is_one_sentence(
    tiny_wan_folder: Path, files: Path, tmp_path: Path
) -> None:
    deeper, lacking = tmp_path / "deeper.safetensors", tmp_path / "lacking.safetensors"
    write_original(tiny_wan.tiny_transformer(layers=4), deeper)
    assert refused(tiny_wan_folder, tmp_path, "--transformer", str(deeper)).endswith(
        "it has blocks.3.attn1.norm_k.weight, and the config has no such layer"
    )
    weights = load_file(files / "own.safetensors")
    save_file({name: value for name, value in weights.items() if name != "blocks.1.ffn.0.bias"}, lacking)
    assert refused(tiny_wan_folder, tmp_path, "--transformer", str(lacking)) == (
        f"{lacking} lacks the weights of blocks.1.ffn.net.0.proj.bias, which {tiny_wan_folder}/transformer has: "
        "download it again"
    )
    wide = tmp_path / "wide.safetensors"
    save_file({n: v.repeat(2, 1) if n == "blocks.0.ffn.0.weight" else v for n, v in weights.items()}, wide)
    assert "blocks.0.ffn.net.0.proj.weight has the shape (128, 32) in the file and (64, 32) by the config" in refused(
        tiny_wan_folder, tmp_path, "--transformer", str(wide)
    )


def test_files_that_cannot_be_read_are_one_sentence(tiny_wan_folder: Path, files: Path, tmp_path: Path) -> None:
    def sentence(path: Path, *more: str) -> str:
        return refused(tiny_wan_folder, tmp_path, "--transformer", str(path), *more)

    assert "there is no transformer file /nowhere.safetensors: --transformer takes" in sentence(
        Path("/nowhere.safetensors")
    )
    assert "is a folder, not a file" in sentence(tmp_path)
    for name, expected in (("x.ckpt", "is pickled, and pickles can run code"), ("x.txt", "ends in '.txt': valid are")):
        (tmp_path / name).write_bytes(b"")
        assert expected in sentence(tmp_path / name)
    scaled = tmp_path / "scaled.safetensors"
    weights = load_file(files / "own.safetensors")
    save_file({**weights, "blocks.0.self_attn.q.scale_weight": torch.ones(1)}, scaled)
    assert sentence(scaled) == (
        f"{scaled} holds 8-bit weights with scales (blocks.0.self_attn.q.scale_weight), which diffusers does not read: "
        "use the weights in 16 bits, and --quantize fp8 to run them in 8"
    )
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((files / "own.safetensors").read_bytes()[:-10])
    assert "is damaged" in sentence(cut)
    false = tmp_path / "false.gguf"
    false.write_bytes(b"nothing")
    assert "is damaged: it is not a GGUF file" in sentence(false)
    own = str(files / "own.safetensors")
    assert refused(tiny_wan_folder, tmp_path, "--transformer-2", own) == (
        "--transformer-2 is for models with two transformers, and tiny-wan has one"
    )


def test_the_table_of_readable_transformers_is_that_of_diffusers() -> None:
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    assert {name for name in FAMILIES if name in SINGLE_FILE_LOADABLE_CLASSES} == set(READABLE)


def test_a_family_that_diffusers_reads_no_file_into_says_so(files: Path) -> None:
    from vmonarch_cli.models.catalogue import PIPELINES

    with pytest.raises(
        ModelError, match=r"--transformer: diffusers reads no single file into an AllegroTransformer3DM"
    ):
        check_single_file(str(files / "own.safetensors"), "--transformer", "allegro", PIPELINES["AllegroPipeline"])


# GGUF


def test_gguf_without_its_package_says_what_to_install(
    tiny_wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "gguf" else found(name, *a))
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + bytes(20))
    assert refused(tiny_wan_folder, tmp_path, "--transformer", str(path)) == (
        f'--transformer {path} needs the package gguf: pip install "vmonarch[gguf]"'
    )


def test_a_gguf_runs_and_is_close(tiny_wan_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    path = write_gguf(tiny_wan.tiny_transformer(), tmp_path / "x.gguf")
    result = generate(tiny_wan_folder, tmp_path / "x.gif", "--transformer", str(path))
    assert result.exit_code == 0, result.stderr
    assert record_of(tmp_path / "x.gif")["weights"][0]["sha256"] == file_sha256(path)
    pipeline = load(tiny_wan_folder, setup=Setup(offload="none", transformer=str(path)))
    assert "GGUF" in type(pipeline.transformer.blocks[0].attn1.to_q.weight).__name__
    latents, stock = (tiny_wan.latents_of(each) for each in (pipeline, load(tiny_wan_folder)))
    assert 0 < float((latents - stock).norm() / stock.norm()) < 0.1
    assert "--quantize fp8: the weights of" in refused(
        tiny_wan_folder, tmp_path / "no", "--transformer", str(path), "--quantize", "fp8"
    )
    strange = write_gguf(tiny_wan.tiny_transformer(layers=4), tmp_path / "deeper.gguf")
    assert "the config has no such layer" in refused(tiny_wan_folder, tmp_path / "no", "--transformer", str(strange))


def test_the_original_names_are_those_that_diffusers_converts() -> None:
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    transformer = tiny_wan.tiny_transformer()
    converted = convert_wan_transformer_to_diffusers(original_weights(transformer))
    assert converted.keys() == transformer.state_dict().keys()
