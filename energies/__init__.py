"""The gallery of energies, one a file; installed and imported as `cem.energies`."""

# From the repository root `import energies` would work too, and give second, different classes.
if __name__ != "cem.energies":
    raise ImportError("the gallery is imported as `cem.energies`: got `import energies`")
