"""Run a protocol of README.md: ``python -m benchmarks.studies NAME``."""

from pathlib import Path

from ..protocol import main

if __name__ == "__main__":
    main(Path(__file__).parent)
