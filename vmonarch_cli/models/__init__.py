"""The models the tool knows: one small file per family, and a registry of their names."""
