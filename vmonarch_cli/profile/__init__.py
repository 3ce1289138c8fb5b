"""`vmonarch profile`: what structured attention costs and what it gives up, measured on the machine at hand.

`kernel` times attention alone, `model` whole denoising steps (`steps`), `quality` sets accuracy against cost. Each
fills plain results, which `plot` draws, `record` writes and `vmonarch_cli.cli.profile` shows as tables. Only the three
that measure, and what they measure with (`repeat`, `chip`, `backends`, `inputs`, `blocks`), import torch.
"""
