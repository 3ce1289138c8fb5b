"""Facts of the models that the tool knows: one file a family, without torch or diffusers."""
