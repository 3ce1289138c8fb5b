"""Training of the embedded model; `python -m vmonarch_cli.demo.training` runs it."""
