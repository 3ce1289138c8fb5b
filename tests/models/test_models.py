"""The registry, shape rules, and local folders good and bad."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from vmonarch_cli.errors import InputError, ModelError
from vmonarch_cli.models.catalogue import ENTRIES
from vmonarch_cli.models.registry import find_model
from vmonarch_cli.models.wan import WAN21_1_3B, WAN22_5B


@pytest.mark.parametrize("name", ["wan2.1-1.3b", "WAN2.1-1.3B", "wan-1.3b", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"])
def test_a_model_answers_to_all_its_names(name: str) -> None:
    assert find_model(name) == (WAN21_1_3B, "Wan-AI/Wan2.1-T2V-1.3B-Diffusers")


def test_names_are_unique_and_defaults_are_valid() -> None:
    names = [name.lower() for e in ENTRIES for name in (e.alias, *e.aliases, *((e.hub_id,) if e.hub_id else ()))]
    assert len(names) == len(set(names))
    for entry in ENTRIES:
        d = entry.defaults
        entry.check_shape(d.height, d.width, d.num_frames)


def test_defaults_are_those_of_the_models_own_examples() -> None:
    shapes = {
        e.alias: (
            *(e.defaults.height, e.defaults.width, e.defaults.num_frames, e.defaults.fps, e.defaults.steps),
            *(e.defaults.guidance_scale, e.defaults.guidance_scale_2, e.defaults.flow_shift, e.boundary_ratio),
        )
        for e in ENTRIES
    }
    assert shapes == {
        "demo": (96, 96, 49, 16, 20, 4.0, None, 6.0, None),
        "wan2.1-1.3b": (480, 832, 81, 16, 50, 5.0, None, 3.0, None),
        "wan2.1-14b": (720, 1280, 81, 16, 50, 5.0, None, 5.0, None),
        "wan2.2-5b": (704, 1280, 121, 24, 50, 5.0, None, 5.0, None),
        "wan2.2-a14b": (720, 1280, 81, 16, 40, 4.0, 3.0, 12.0, 0.875),
        "wan2.1-i2v-480p": (480, 832, 81, 16, 50, 5.0, None, 3.0, None),
        "wan2.1-i2v-720p": (720, 1280, 81, 16, 50, 5.0, None, 5.0, None),
        "wan2.2-i2v-a14b": (720, 1280, 81, 16, 40, 3.5, 3.5, 5.0, 0.9),
        "wan2.1-vace-1.3b": (480, 832, 81, 16, 50, 5.0, None, 3.0, None),
        "wan2.1-vace-14b": (720, 1280, 81, 16, 50, 5.0, None, 5.0, None),
        "skyreels-v2-t2v": (720, 1280, 121, 24, 50, 6.0, None, 8.0, None),
        "skyreels-v2-i2v": (720, 1280, 121, 24, 50, 5.0, None, 5.0, None),
        "hunyuan-video": (720, 1280, 129, 24, 50, 6.0, None, 7.0, None),
        "hunyuan-video-i2v": (720, 1280, 129, 24, 50, 6.0, None, 7.0, None),
        "hunyuan-video-1.5": (480, 832, 121, 24, 50, 6.0, None, 5.0, None),
        "hunyuan-video-1.5-i2v": (480, 832, 121, 24, 50, 6.0, None, 5.0, None),
        "cogvideox-2b": (480, 720, 49, 8, 50, 6.0, None, None, None),
        "cogvideox-5b": (480, 720, 49, 8, 50, 6.0, None, None, None),
        "cogvideox-1.5": (768, 1360, 81, 16, 50, 6.0, None, None, None),
        "cogvideox-5b-i2v": (480, 720, 49, 8, 50, 6.0, None, None, None),
        "cogvideox-1.5-i2v": (768, 1360, 81, 16, 50, 6.0, None, None, None),
        "ltx-video": (512, 704, 161, 24, 50, 3.0, None, None, None),
        "ltx-2": (512, 768, 121, 24, 40, 4.0, None, None, None),
        "mochi-1": (480, 848, 85, 30, 64, 4.5, None, None, None),
        "allegro": (720, 1280, 88, 15, 100, 7.5, None, None, None),
        "kandinsky-5-lite": (512, 768, 121, 24, 50, 5.0, None, None, None),
        "kandinsky-6-lite": (480, 864, 121, 24, 10, 1.0, None, None, None),
        "kandinsky-6-pro": (480, 864, 121, 24, 50, 5.0, None, None, None),
        "motif-video-2b": (736, 1280, 121, 24, 50, 8.0, None, None, None),
        "minimax-h3": (768, 1344, 124, 24, 50, 1.0, None, 12.0, None),
        "cosmos-predict2.5-2b": (704, 1280, 93, 16, 36, 7.0, None, None, None),
        "anyflow-14b": (480, 832, 81, 16, 4, 1.0, None, None, None),
        "cosmos-predict2.5-14b": (704, 1280, 93, 16, 36, 7.0, None, None, None),
    }


def test_grids() -> None:
    assert WAN21_1_3B.grid(480, 832, 81) == (21, 30, 52)
    assert WAN22_5B.grid(704, 1280, 121) == (31, 22, 40)
    assert ENTRIES[0].grid(96, 96, 49) == (13, 12, 12)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("wan2.1-1.4b", "there is no model 'wan2.1-1.4b' (did you mean wan2.1-14b or wan2.1-1.3b or wan2.2-a14b?)"),
        ("xyzzy", "there is no model 'xyzzy'"),
        (
            "~nosuchuser/model",
            "model '~nosuchuser/model' begins with the home folder of a user that this machine lacks",
        ),
        ("a\0b", r"model 'a\x00b' holds a NUL character, which no path can"),
        ("x" * 300, f"model '{'x' * 56}... is too long: a name has at most 255 bytes"),
        ("/" + "x" * 300, f"model '/{'x' * 55}... is too long: a name has at most 255 bytes"),
        ("\x1b[31mwan", r"there is no model '\x1b[31mwan'"),
    ],
)
def test_unknown_models_get_near_matches(name: str, expected: str) -> None:
    with pytest.raises(ModelError) as caught:
        find_model(name)
    rest = "a model is a diffusers folder, a hub id or a name that `vmonarch models` lists"
    assert caught.value.message in (expected, f"{expected}: {rest}", f"{expected}; {rest}")


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (
            (480, 830, 81),
            "size 830x480 does not fit wan2.1-1.3b: width and height must be multiples of 16 pixels, "
            "the nearest valid sizes are 832x480 and 816x480",
        ),
        (
            (3, 4, 81),
            "size 4x3 does not fit wan2.1-1.3b: width and height must be multiples of 16 pixels, "
            "the nearest valid size is 16x16",
        ),
        (
            (480, 832, 80),
            "80 frames do not fit wan2.1-1.3b: the frame count must be a multiple of 4 plus one, "
            "the nearest valid counts are 77 and 81",
        ),
        (
            (480, 832, 0),
            "0 frames do not fit wan2.1-1.3b: the frame count must be a multiple of 4 plus one, "
            "the nearest valid counts are 1 and 5",
        ),
    ],
)
def test_shapes_that_do_not_fit(shape: tuple[int, int, int], expected: str) -> None:
    with pytest.raises(InputError) as caught:
        WAN21_1_3B.check_shape(*shape)
    assert caught.value.message == expected


def test_the_5b_model_needs_multiples_of_32() -> None:
    with pytest.raises(InputError, match="multiples of 32 pixels, the nearest valid sizes are 1280x704 and 1280x736"):
        WAN22_5B.check_shape(720 - 2, 1280, 121)


def test_a_local_folder_describes_itself(tiny_wan_folder: Path) -> None:
    entry, source = find_model(str(tiny_wan_folder))
    assert source == str(tiny_wan_folder)
    assert (entry.heads, entry.head_dim, entry.layers, entry.transformers) == (2, 16, 3, 1)
    assert (entry.patch, entry.vae_temporal, entry.vae_spatial, entry.latent_channels) == ((1, 2, 2), 4, 8, 4)
    assert (entry.defaults.flow_shift, entry.defaults.negative_prompt) == (3.0, "")
    assert entry.transformer_params > 1000


def test_a_folder_with_two_transformers(tiny_wan_two_stage_folder: Path) -> None:
    entry, _ = find_model(str(tiny_wan_two_stage_folder))
    assert (entry.transformers, entry.boundary_ratio) == (2, 0.7)


def _truncate(folder: Path) -> None:
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _scramble(folder: Path) -> None:
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"\x00" * 4 + b"not weights at all")


def _empty(folder: Path) -> None:
    (folder / "text_encoder" / "model.safetensors").write_bytes(b"")


def _pickle(folder: Path) -> None:
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_suffix(".bin"))


def _other_class(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "FluxPipeline"}))


def _no_index(folder: Path) -> None:
    (folder / "model_index.json").unlink()


def _bad_config(folder: Path) -> None:
    (folder / "transformer" / "config.json").write_text("{")


def _no_layers(folder: Path) -> None:
    config = json.loads((folder / "transformer" / "config.json").read_text())
    del config["num_layers"]
    (folder / "transformer" / "config.json").write_text(json.dumps(config))


def _lost_shard(folder: Path) -> None:
    index = {"weight_map": {"a": "diffusion_pytorch_model.safetensors", "b": "part-2.safetensors"}}
    (folder / "transformer" / "m.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (
            _truncate,
            r"weights file .*transformer/.*safetensors is damaged: it has [\d,]+ bytes and its header describes",
        ),
        (_scramble, r"weights file .*vae/.*safetensors is damaged: it is not a safetensors file; download it again"),
        (_empty, r"weights file .*text_encoder/model\.safetensors is damaged: it is not a safetensors file"),
        (_pickle, r"transformer holds only pickled weights \(diffusion_pytorch_model\.bin\), which can run code"),
        (
            _other_class,
            r"holds a FluxPipeline with a WanTransformer3DModel, whose attention is known but .* are WanPipeline",
        ),
        (_no_index, r"is not a diffusers model folder: damaged/model_index\.json is missing"),
        (_bad_config, r"is not a complete model: .*transformer/config\.json line 1: is not valid JSON"),
        (_no_layers, r"transformer/config\.json has no 'num_layers', which a Wan transformer needs"),
        (_lost_shard, r"transformer is incomplete: part-2\.safetensors is missing \(of 2 weight files\)"),
    ],
)
def test_damaged_folders(tiny_wan_folder: Path, tmp_path: Path, damage: Callable[[Path], None], expected: str) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_wan_folder, folder)
    damage(folder)
    with pytest.raises(ModelError, match=expected):
        find_model(str(folder))


def test_paths_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no folder /nowhere/model"):
        find_model("/nowhere/model")
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"")
    with pytest.raises(ModelError, match="is a file, and a model is a diffusers folder"):
        find_model(str(file))
