"""vmonarch: text-to-video diffusion with Monarch-structured attention (importing it imports no torch)."""

__version__ = "0.1.0"
