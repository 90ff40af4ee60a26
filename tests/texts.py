"""Small texts for the tests of corpora and of data."""


def folder(tmp_path, count=60):
    """A folder of small files, all different."""
    root = tmp_path / "text"
    root.mkdir(exist_ok=True)
    for i in range(count):
        (root / f"m{i}.py").write_text(f"def f{i}(x):\n    return x + {i}  # é\n" * (1 + i % 5))
    return root
