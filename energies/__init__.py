"""The gallery: one energy a file, with its formula, its source and its code."""

if __name__ != "cem.energies":
    raise ImportError("this folder is a part of the package: type `import cem.energies`")

from .interaction import interaction

__all__ = ["interaction"]
