"""Writes the model card from the reports of training and scoring, so that no figure in it is typed by hand.

`python -m vmonarch_cli.demo.card --reports DIR --score FILE [FILE ...] --weights DIR`, with a file of the scorer for
each length of clips.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from vmonarch_cli.demo import card_texts
from vmonarch_cli.demo.clips import NUM_FRAMES, SIZE
from vmonarch_cli.demo.model import FLOW_SHIFT, WEIGHTS_DIR
from vmonarch_cli.models.demo_vocabulary import BACKGROUNDS, COLOURS, KINDS, MOTIONS, SHAPES, SIZES
from vmonarch_cli.models.tuned import TunedAdapter, read_adapter, shipped_adapters
from vmonarch_cli.plan.noise_levels import OWN
from vmonarch_cli.plan.tuned import TUNED_ROW
from vmonarch_cli.text import listed

_KINDS_OF_CLIPS = ("one object", "single"), ("two objects", "pair"), ("several motions", "several")
_WORDS_BEFORE = 179  # of tokenizers whose reports do not say it

Report = dict[str, Any]


def model_card(
    vae: Report,
    dit: Report,
    scores: Sequence[Report],
    vae_parameters: int,
    text_alone: Report | None = None,
    adapters: Sequence[TunedAdapter] = (),
) -> str:
    """The card's text.

    Args:
        vae, dit: `vae_report.json` and `dit_report.json` of the training.
        scores: the scorer's JSON, one for each length and size of clips.
        vae_parameters: number of parameters of the autoencoder.
        text_alone: `text_report.json`, where the text encoder was trained on its own first.
        adapters: what those that come with the model say of themselves.
    """
    transformer, text = dit["transformer_parameters"], dit["text_encoder_parameters"]
    trained = _trained_at(dit)
    lengths, sides = ({shape[i] for shape in trained} for i in (0, 1))
    longer = sorted(frames for frames in lengths if frames > NUM_FRAMES)
    return card_texts.TEMPLATE.format(
        total_millions=(transformer + text + vae_parameters) / 1e6,
        megabytes=dit["folder_megabytes"],
        frames=_span(lengths),
        sizes_trained=" and ".join(f"{side} x {side}" for side in sorted(sides)),
        again=_again(dit) if "mixed" in dit else "",
        longer=card_texts.LONGER.format(lengths=listed([str(frames) for frames in longer])) if longer else "",
        layers=dit["transformer"]["num_layers"],
        heads=dit["transformer"]["num_heads"],
        head_dim=dit["transformer"]["head_dim"],
        z_dim=dit["transformer"]["z_dim"],
        text_layers=dit["text_encoder"]["num_layers"],
        d_model=dit["text_encoder"]["d_model"],
        transformer_millions=transformer / 1e6,
        vae_millions=vae_parameters / 1e6,
        text_millions=text / 1e6,
        words=dit.get("words", _WORDS_BEFORE),
        sampling=_sampling(scores[0]["settings"]),
        long_clips=_long_clips([score["settings"] for score in scores]),
        shapes=", ".join(SHAPES),
        colours=", ".join(COLOURS),
        sizes=", ".join(SIZES),
        motions=", ".join(MOTIONS),
        backgrounds=", ".join(BACKGROUNDS),
        kinds=", ".join(KINDS),
        training="\n".join(_training(vae, dit, text_alone)),
        dit_loss=dit["loss"],
        flow_shift=FLOW_SHIFT,
        structured=card_texts.STRUCTURED if any(report.get("structured") for report in _chain(dit)) else "",
        adapters=_adapters(adapters),
        measured="\n".join(_measured(score) for score in scores),
        tokens=_span([_tokens(score) for score in scores]),
    )


def _trained_at(dit: Report) -> list[tuple[int, int]]:
    """Frames and sides of the clips that the transformer was trained at last."""
    found = [name.split("x") for name in dit.get("mixed", {f"{NUM_FRAMES}x{SIZE}": 1.0})]
    return [(int(frames), int(side)) for frames, side in found]


def _again(dit: Report) -> str:
    """The command of a training at mixed lengths."""
    clips = ",".join(f"{name}:{share:.3g}" for name, share in dit["mixed"].items())
    return card_texts.AGAIN.format(clips=clips, flags=dit.get("flags", "--small-until 0"))


def _span(numbers: Collection[int]) -> str:
    return " to ".join(f"{number:,}" for number in sorted({min(numbers), max(numbers)}))


def _tokens(score: Report) -> int:
    """Tokens of one of the clips that were scored."""
    settings = score["settings"]
    return int(((settings["num_frames"] - 1) // 4 + 1) * (settings["size"] // 8) ** 2)


def _measured(score: Report) -> str:
    """What was measured on clips of one length and size."""
    presets = score["presets"]
    entry = next(iter(presets.values()))
    several = entry.get("several_motions", 0)
    return card_texts.MEASURED.format(
        frames=score["settings"]["num_frames"],
        size=score["settings"]["size"],
        vae_eval_clips=score["vae"]["clips"],
        vae_psnr=score["vae"]["psnr"],
        vae_worst=score["vae"]["psnr_worst_clip"],
        vae_first=score["vae"]["psnr_first"],
        vae_middle=score["vae"]["psnr_middle"],
        vae_last=score["vae"]["psnr_last"],
        prompts=entry["prompts"],
        pairs=entry["pairs"],
        several=f"; {several} with several motions, which must all be right and in order" if several else "",
        sampling=_sampling(score["settings"]),
        score_device=score["device"],
        agreement="\n".join(_agreement(presets)),
        distances="\n".join(_distances(presets)),
        reader_clips=score["reader"]["clips"],
        reader=_row(score["reader"]),
        through_clips=score["reader_through_vae"]["clips"],
        through=_row(score["reader_through_vae"]),
    )


def _sampling(settings: Report) -> str:
    """How clips were sampled."""
    sampler = str(settings.get("sampler", OWN))
    return f"{settings['steps']} steps, guidance {settings['guidance']:g}" + f", sampler `{sampler}`" * (sampler != OWN)


def _long_clips(settings: Sequence[Report]) -> str:
    """How the shortest clips were sampled that were not sampled as the first ones; nothing where all were."""
    other = next((one for one in settings if _sampling(one) != _sampling(settings[0])), None)
    if other is None:
        return ""
    return card_texts.LONG_CLIPS.format(frames=other["num_frames"], sampling=_sampling(other))


def _training(vae: Report, dit: Report, text_alone: Report | None) -> list[str]:
    """Rows of the training table, in the order in which things were trained."""
    chain = _chain(dit)
    rows = [_trained("autoencoder", vae, f"{vae['clips']:,}")]
    texts = [
        _trained("text encoder" + (", continued" if number else ""), text, f"{text['captions']:,} captions")
        for number, text in enumerate([] if text_alone is None else _chain(text_alone))
    ]
    said = 0
    for number, report in enumerate(chain):
        parts = report.get("trained", "transformer and text encoder")
        if parts == "transformer":
            # Its first training was there from here on, those that went on before the last training alone.
            there = len(texts) if report is dit else 1
            rows += texts[said:there]
            said = there
        name = parts + (", continued" if number else "") + (", tuned" if report.get("structured") else "")
        rows.append(_trained(name, report, f"{report['clips']:,} ({report['distinct_clips']:,} distinct)"))
    return rows


def _chain(report: Report) -> list[Report]:
    """The reports of a training and of those it went on from, oldest first."""
    chain = [report]
    while (before := chain[0].get("before")) is not None:
        chain.insert(0, before)
    return chain


def _adapters(adapters: Sequence[TunedAdapter]) -> str:
    """The section of the adapters; nothing where none come with the model."""
    rows = []
    for said in adapters:
        before, after = said.gain or (math.nan, math.nan)
        made, of = f"{said.training['device']}, {said.training['seconds']:.0f} s", said.training.get("cut_from_rank")
        made += f", rank {said.training['rank']} of {of}" if of else ""
        made_for = f"`{said.preset_name}` | {said.steps} | {said.guidance_scale:g} | {said.num_frames}"
        rows.append(f"| {made_for} | {made} | {said.evaluation['prompts']} | {before:.3f} | {after:.3f} |")
    return card_texts.ADAPTERS.format(rows="\n".join(rows)) if adapters else ""


def _name(row: str) -> str:
    """How the card calls a row of the score: 'preset `fast` with its adapter'."""
    preset, tuned, _ = row.partition(TUNED_ROW)
    return f"preset `{preset}`{' with its adapter' * bool(tuned)}"


def _agreement(presets: dict[str, Report]) -> list[str]:
    """Rows of the table of agreement: every preset, and the first one's clips of one and of two objects."""
    rows = []
    for number, (name, entry) in enumerate(presets.items()):
        rows.append(f"| {_name(name)} | {_row(entry)} |")
        if not number:
            kinds = [(kind, entry[key]) for kind, key in _KINDS_OF_CLIPS if key in entry]
            rows += [
                f"| its clips of {kind} | {_row(shares)} |"
                for kind, shares in kinds
                if any(share is not None for share in shares.values())
            ]
    return rows


def _distances(presets: dict[str, Report]) -> list[str]:
    """The table of how far presets are from the first one, where more than one was scored."""
    compared = {name: entry["against_first"] for name, entry in presets.items() if "against_first" in entry}
    if not compared:
        return []
    first = next(iter(presets))
    count = next(iter(compared.values()))["prompts"]
    return [
        "",
        f"Distance from preset `{first}`, same prompts and noise, medians of {count} prompts:",
        "",
        "| | PSNR | SSIM | relative error of the latents |",
        "| --- | --- | --- | --- |",
        *(
            f"| {_name(name)} | {c['psnr_median']:.1f} dB | {c['ssim_median']:.3f} | {c['latent_error_median']:.3f} |"
            for name, c in compared.items()
        ),
        "",
    ]


def _trained(name: str, report: Report, seen: str) -> str:
    return f"| {name} | {report['steps']:,} | {seen} | {report['seconds']:.0f} s | {report['device']} |"


def _row(shares: dict[str, Any]) -> str:
    cells = map(shares.get, ("colour", "background", "motion", "shape"))
    return " | ".join("-" if c is None else f"{100 * c:.1f} %" for c in cells)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the reports and write MODEL_CARD.md into the weights folder."""
    parser = argparse.ArgumentParser(prog="python -m vmonarch_cli.demo.card", description=__doc__)
    parser.add_argument("--reports", type=Path, required=True, help="folder of the trainings' ..._report.json")
    parser.add_argument("--score", type=Path, required=True, action="extend", nargs="+", help="the scorer's JSON")
    parser.add_argument("--weights", type=Path, default=WEIGHTS_DIR)
    from safetensors import safe_open

    args = parser.parse_args(argv)
    with safe_open(args.weights / "vae" / "diffusion_pytorch_model.safetensors", "pt") as tensors:
        vae_parameters = sum(tensors.get_tensor(name).numel() for name in tensors.keys())  # noqa: SIM118
    found = {part: args.reports / f"{part}_report.json" for part in ("vae", "dit", "text")}
    vae, dit = (json.loads(found[part].read_text()) for part in ("vae", "dit"))
    text_alone = json.loads(found["text"].read_text()) if found["text"].is_file() else None
    adapters = [read_adapter(path) for path in shipped_adapters(args.weights.parent)]
    scores = [json.loads(path.read_text()) for path in args.score]
    scores.sort(key=lambda score: (score["settings"]["size"], score["settings"]["num_frames"]))
    (args.weights / "MODEL_CARD.md").write_text(model_card(vae, dit, scores, vae_parameters, text_alone, adapters))


if __name__ == "__main__":
    main()
