"""Training of the demo model from the command line: `python -m vmonarch_cli.demo.training text|vae|dit --out DIR`, and
its adapters at a lower rank: `rank FILE ... --rank 16 --out DIR`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and train one part, or cut adapters; SystemExit, one sentence, for what cannot be done."""
    from vmonarch_cli.demo.exits import one_sentence
    from vmonarch_cli.demo.training import cut_rank, flags, train_dit, train_text, train_vae
    from vmonarch_cli.pipeline.load import quiet_libraries

    parser = argparse.ArgumentParser(prog="python -m vmonarch_cli.demo.training", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    formatter = argparse.ArgumentDefaultsHelpFormatter
    vae = commands.add_parser("vae", help="the video autoencoder", formatter_class=formatter)
    flags.add_vae_arguments(vae)
    text = commands.add_parser("text", help="the text encoder, before the transformer", formatter_class=formatter)
    flags.add_text_arguments(text)
    dit = commands.add_parser("dit", help="the transformer and the text encoder", formatter_class=formatter)
    flags.add_dit_arguments(dit)
    rank = commands.add_parser("rank", help="tuned adapters at a lower rank", formatter_class=formatter)
    cut_rank.add_arguments(rank)
    args = parser.parse_args(argv)
    with one_sentence():
        quiet_libraries()
        {"vae": train_vae, "text": train_text, "dit": train_dit, "rank": cut_rank}[args.command].run(args)


if __name__ == "__main__":
    main()
