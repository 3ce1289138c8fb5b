"""What touches diffusers, one file a model family: processors of its self-attention, its decoder, its quirks."""
