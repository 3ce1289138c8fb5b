"""A diffusers pipeline: loaded, placed in memory, swapped, called."""
