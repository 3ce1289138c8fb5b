"""Clips as files: their names, writing, reading and measuring frames."""
