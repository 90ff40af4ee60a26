"""The gallery of worked derivations, one a file; installed and imported as `cem.derivations`."""

# From the repository root `import derivations` would work too, and give second, different classes.
if __name__ != "cem.derivations":
    raise ImportError("the gallery is imported as `cem.derivations`: got `import derivations`")
