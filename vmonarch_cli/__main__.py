"""`vmonarch` and `python -m vmonarch_cli`: an interrupt ends in one line, also one that comes during the imports."""

from __future__ import annotations

import sys

from vmonarch_cli.cli import signals


def main() -> None:
    """Entry point of the `vmonarch` script."""
    signals.watch()
    try:
        from vmonarch_cli.cli.app import main as run

        run()
    except BaseException as error:
        if not signals.seen() or isinstance(error, SystemExit):
            raise
        sys.stderr.write(f"{signals.MESSAGE}\n")
        raise SystemExit(signals.EXIT_CODE) from None


if __name__ == "__main__":
    main()
