"""`python -m vmonarch_cli`: the same program as the `vmonarch` script."""

from vmonarch_cli.cli.app import main

if __name__ == "__main__":
    main()
