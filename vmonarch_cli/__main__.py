"""`vmonarch` and `python -m vmonarch_cli`: an interrupt ends in one line, also one that comes during the imports."""

from __future__ import annotations

import os
import sys

from vmonarch_cli.cli import signals


def main() -> None:
    """Entry point of the `vmonarch` script."""
    signals.watch()
    _open_streams()
    try:
        from vmonarch_cli.cli.app import main as run

        run()
    except BaseException as error:
        if not signals.seen() or isinstance(error, SystemExit):
            raise
        sys.stderr.write(f"{signals.MESSAGE}\n")
        raise SystemExit(signals.EXIT_CODE) from None


def _open_streams() -> None:
    """Put /dev/null where a standard stream was closed, as by `>&-` and by some services: the next file that opens
    would have its number, and Python leaves None in its place.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(number)
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 - as long as the process


if __name__ == "__main__":
    main()
