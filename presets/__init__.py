"""The shipped presets, as package data (installed as vmonarch_presets)."""
