"""Worked derivations, one a file: from an energy to its layer, checked when they run.

    python -m cem.derivations.gated_mlp     check the derivation and print it

Each module has ``energy``; ``closed_form``, its layer written by hand from the mathematics;
``derivation()``, the mathematics of the toolkit; and ``check()``, which compares the two and
SymPy's own ``diff``. ``certificate`` has theorems instead, on when a step descends, and a
``check()`` that looks for instances which break them.
"""

# From the repository root `import derivations` would work too, and give second, different classes.
if __name__ != "cem.derivations":
    raise ImportError("the gallery is imported as `cem.derivations`: got `import derivations`")
