"""Clips that exist: compared, shown on one page, made again from their records."""
