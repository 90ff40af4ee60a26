"""Measurements: derived layers against hand-written ones; see README.md in this folder."""
