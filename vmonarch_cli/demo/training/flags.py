"""The flags of the three trainings."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from vmonarch_cli.demo.clips import NUM_FRAMES, SIZE
from vmonarch_cli.demo.model import DIT_PRESETS, VAE_PRESETS
from vmonarch_cli.demo.training.buckets import parse_buckets
from vmonarch_cli.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class Phase:
    """Clips of `frames` frames until `end` (progress in [0, 1])."""

    frames: int
    end: float


def parse_phases(text: str) -> tuple[Phase, ...]:
    """Phases from text such as "1:0.1,17:0.35,49:1"; ValueError for ends that do not rise to 1 and other frames."""
    try:
        pairs = [part.split(":") for part in text.split(",")]
        phases = tuple(Phase(int(frames), float(end)) for frames, end in pairs)
    except ValueError:
        phases = ()
    ends = [phase.end for phase in phases]
    rising = ends == sorted(set(ends)) and all(0 < end <= 1 for end in ends) and ends[-1:] == [1.0]
    if not rising or any(phase.frames < 1 or (phase.frames - 1) % 4 for phase in phases):
        raise ValueError(f"--phases: got {text!r}, valid are rising ends up to 1 and frame counts 4 n + 1")
    return phases


def _flag(parse: Callable[[str], T]) -> Callable[[str], T]:
    """The same for argparse, which names the flag itself and loses the sentence of any ValueError."""

    def read(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error).partition(": ")[2]) from None

    return read


def parse_share(text: str) -> float:
    """A share of the training, from 0 to 1."""
    return _share(text, "from 0 to 1", ends=True)


def parse_start(text: str) -> float:
    """A share of the training after which something begins: below 1, or it never would."""
    return _share(text, "from 0 up to below 1", ends=False)


def parse_steps(text: str) -> int:
    """A count of steps, from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text}, valid are whole numbers from 1")
    return int(text)


def _share(text: str, valid: str, *, ends: bool) -> float:
    """ends: 1 is valid, too."""
    share = float(text)
    if not (0 <= share < 1 or (ends and share == 1)):  # and so no NaN
        raise argparse.ArgumentTypeError(f"got {text}, valid are shares of the training {valid}")
    return share


def check_structured(args: argparse.Namespace) -> None:
    """InputError where flags of `train dit` do not go with --structured, or do nothing without it."""
    if args.structured is None and args.structured_every != 1:
        raise InputError(f"--structured-every: got {args.structured_every}; valid beside --structured")
    if args.structured is not None and args.batch % 4:
        raise InputError(f"--batch: got {args.batch}; with --structured, valid are multiples of 4")


def asked_for(args: argparse.Namespace) -> dict[str, Any]:
    """Of `train dit`, for its report: the model's preset, the shares of clips, and the flags to train so again."""
    flags = ["--small-until", f"{float(args.small_until):g}"]
    if args.structured is not None:
        flags += ["--structured", f"{float(args.structured):g}", "--structured-every", str(args.structured_every)]
    flags += ["--refresh", str(args.refresh), "--refresh-every", str(args.refresh_every)]
    shares = {bucket.name: bucket.share for bucket in args.clips}
    return {"preset": args.preset, "mixed": shares, "flags": " ".join(flags)}


def add_vae_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `train vae`."""
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint, the log and vae/")
    parser.add_argument("--seconds", type=float, default=540.0, help="wall-clock limit of this run")
    parser.add_argument("--total-seconds", type=float, help="planned seconds of all runs (default: this run's)")
    parser.add_argument("--reserve", type=float, default=30.0, help="seconds kept for the final evaluation")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--init", type=Path, help="start from an exported vae folder (weights only)")
    parser.add_argument(
        "--decoder-only", action="store_true", help="leave the encoder of --init, and so every latent, as it is"
    )
    parser.add_argument("--max-steps", type=int, help="schedule by steps, not by seconds (reproducible)")
    parser.add_argument("--stop-after", type=int, help="interrupt this run at that step")
    parser.add_argument("--preset", choices=sorted(VAE_PRESETS), default="base24")
    parser.add_argument("--batch", type=int, default=4, help="clips of 49 frames a step; shorter ones in proportion")
    parser.add_argument("--image-batch", type=int, default=128, help="images a step at most")
    parser.add_argument(
        "--phases",
        type=_flag(parse_phases),
        default=parse_phases("1:0.17,49:1"),
        help="frames:end, ... with ends in [0, 1] of the whole training",
    )
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--kl", type=float, default=1e-4, help="weight of the KL term; more makes smoother latents")
    parser.add_argument(
        "--polish", type=parse_share, default=0.65, help="share of the training from which squared error dominates"
    )
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--size", type=int, default=SIZE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--memory-format", choices=("auto", "contiguous", "channels_last"), default="channels_last")
    parser.add_argument("--checkpoint-every", type=float, default=60.0, help="seconds")
    parser.add_argument("--eval-every", type=float, default=100.0, help="seconds, at a checkpoint")
    parser.add_argument("--eval-clips", type=int, default=16, help="held-out clips per evaluation")
    parser.add_argument("--latent-clips", type=int, default=128, help="clips for the latents' statistics")
    parser.add_argument("--profile-steps", type=int, default=40, help="log every fifth of a phase's first steps")


def add_dit_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `train dit`."""
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint, the log and weights/")
    parser.add_argument("--vae", type=Path, required=True, help="the vae folder that `train vae` exported")
    parser.add_argument(
        "--seconds", type=float, default=480.0,
        help="wall-clock limit of this run, set-up, banks and compilation included: `spent` in the report says how it "
        "was split",
    )  # fmt: skip
    parser.add_argument("--total-seconds", type=float, help="planned seconds of all runs (default: this run's)")
    parser.add_argument("--reserve", type=float, default=40.0, help="seconds kept for export and samples")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument(
        "--init", type=Path, help="start from an exported weights folder (and middle_head.safetensors beside it)"
    )
    parser.add_argument("--text", type=Path, required=True, help="the folder that `train text` exported to")
    parser.add_argument("--max-steps", type=int, help="schedule by steps, not by seconds (reproducible)")
    parser.add_argument("--stop-after", type=int, help="interrupt this run at that step")
    parser.add_argument("--preset", choices=sorted(DIT_PRESETS), default="default")
    parser.add_argument(
        "--clips",
        type=_flag(parse_buckets),
        default=parse_buckets(f"{NUM_FRAMES}x{SIZE}"),
        help="FRAMESxSIZE of the clips, or several with shares of the steps: 49x96:2,193x96:1",
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=64,
        help="clips of the first of --clips a step, in each process of a torchrun; of others, as many tokens",
    )
    parser.add_argument(
        "--bank", type=int, default=20_000,
        help="clips of the first of --clips whose latents are kept on the device; of others, as many tokens by share",
    )  # fmt: skip
    parser.add_argument("--bank-seconds", type=float, default=45.0, help="stop filling the bank after so long")
    parser.add_argument("--encode-batch", type=int, default=16)
    parser.add_argument("--refresh-every", type=int, default=32, help="steps between two refreshes of the bank")
    parser.add_argument("--refresh", type=int, default=32, help="clips replaced at a refresh")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--small-until", type=parse_share, default=0.5, help="share of the training at half the size")
    parser.add_argument(
        "--structured",
        type=parse_start,
        nargs="?",
        const=0.0,
        metavar="SHARE",
        help="half of each batch repeats the other half with Monarch attention (--batch: a multiple of 4), once this "
        "share of the training is over, from 0 to below 1 (0, the start, if no share is given)",
    )
    parser.add_argument(
        "--structured-every", type=parse_steps, default=1, metavar="STEPS", help="of these, one has Monarch attention"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--checkpoint-every", type=float, default=60.0, help="seconds")
    parser.add_argument("--profile-steps", type=int, default=40, help="log every fifth of the first steps")
    parser.add_argument("--samples", type=int, default=8, help="held-out prompts on the sheet at the end")
    parser.add_argument("--sample-steps", type=int, default=20)


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `train text`."""
    parser.add_argument("--out", type=Path, required=True, help="folder for text_encoder/ and the log")
    parser.add_argument("--init", type=Path, help="start from the text encoder of an exported weights folder")
    parser.add_argument("--preset", choices=sorted(DIT_PRESETS), default="default")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--seconds", type=float, help="end, and lower the learning rate, by this time at the latest")
    parser.add_argument("--batch", type=int, default=128, help="captions a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
