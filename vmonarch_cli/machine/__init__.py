"""The machine at hand: hardware, processes of a torchrun, versions."""
