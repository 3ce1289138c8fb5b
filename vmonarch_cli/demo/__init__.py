"""The embedded text-to-video model: its data, its training, its weights and its scorer."""
