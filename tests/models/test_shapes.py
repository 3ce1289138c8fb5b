"""Sizes and frame counts that a model cannot make are refused before anything loads, with the nearest that it can."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_families import TINY

from vmonarch_cli.errors import InputError
from vmonarch_cli.models.allegro import ALLEGRO
from vmonarch_cli.models.base import ModelEntry
from vmonarch_cli.models.catalogue import ENTRIES
from vmonarch_cli.models.registry import find_model


def entry_of(alias: str) -> ModelEntry:
    return next(entry for entry in ENTRIES if entry.alias == alias)


@pytest.mark.parametrize(
    ("alias", "shape", "sentence"),
    [
        (
            "wan2.1-1.3b",
            (480, 832, 4097),
            "4097 frames do not fit wan2.1-1.3b: its positions reach 1024 latent frames, and the largest valid count "
            "is 4093",
        ),
        (
            "kandinsky-5-lite",
            (512, 2064, 121),
            "size 2064x512 does not fit kandinsky-5-lite: its positions reach 128 rows and 128 columns of tokens, and "
            "the largest valid size is 2048x2048",
        ),
        ("kandinsky-5-lite", (512, 768, 513), "128 latent frames, and the largest valid count is 509"),
        ("cogvideox-1.5", (768, 2416, 81), "150 rows and 150 columns of tokens, and the largest valid size is 2400x2"),
        ("skyreels-v2-t2v", (544, 16400, 97), "1024 rows and 1024 columns of tokens"),
        ("wan2.1-vace-1.3b", (16400, 832, 81), "1024 rows and 1024 columns of tokens"),
    ],
)
def test_more_tokens_than_the_positions_reach(alias: str, shape: tuple[int, int, int], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        entry_of(alias).check_shape(*shape)


@pytest.mark.parametrize("name", ["wan", "wan-vace", "skyreels-v2", "cogvideox-1.5", "kandinsky-5"])
def test_a_folders_own_limit_is_where_its_transformer_ends(name: str, tmp_path: Path) -> None:
    """The widest clip that is allowed has positions in the model itself, and the next one has none."""
    tiny = TINY[name]
    pipeline = tiny.build()
    pipeline.save_pretrained(tmp_path / name, safe_serialization=True)
    entry, _ = find_model(str(tmp_path / name))
    widest = entry.axes()[2].largest
    entry.check_shape(tiny.height, widest, tiny.num_frames)
    with pytest.raises(InputError, match=rf"the largest valid size is {widest}x\d+"):
        entry.check_shape(tiny.height, widest + entry.side_multiple, tiny.num_frames)

    def run(width: int) -> None:
        options = {**tiny.options, "guidance_scale": 1.0}
        pipeline(
            prompt="a red circle",
            height=entry.side_multiple,
            width=width,
            num_frames=entry.axes()[0].first,
            num_inference_steps=1,
            output_type="latent",
            **options,
        )

    run(widest)
    with pytest.raises((RuntimeError, IndexError)):
        run(widest + entry.side_multiple)


@pytest.mark.parametrize(
    ("shape", "nearest"),
    [
        ((256, 256, 88), "the nearest valid size is 320x320"),
        ((720, 1264, 88), "heights of 320 plus a multiple of 400 pixels, the nearest valid sizes are 1280x720 and"),
        ((520, 1280, 88), "the nearest valid sizes are 1280x320 and 1280x720"),
        ((720, 1280, 92), "fill counts of 24 plus a multiple of 16, the nearest valid counts are 88 and 104"),
        ((720, 1280, 8), "the nearest valid counts are 24 and 40"),
    ],
)
def test_what_a_tiled_decoder_would_leave_grey_is_refused(shape: tuple[int, int, int], nearest: str) -> None:
    with pytest.raises(InputError, match=rf"do(es)? not fit allegro: its decoder works in tiles, .*{nearest}"):
        ALLEGRO.check_shape(*shape)
    for valid in ((720, 1280, 88), (320, 320, 24), (1120, 560, 40)):
        ALLEGRO.check_shape(*valid)
