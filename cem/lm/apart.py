"""A run in a process of its own, and what is left of one that failed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

from .run import Run

ROOT = Path(__file__).resolve().parents[2]
_COMMAND = "from cem.lm.apart import _child; _child()"


def train_apart(run: Run, out: str | Path) -> None:
    """:func:`cem.lm.train` in a process of its own, which ends when this one does.

    So the peak memory of a run is its own, and a run that is killed, for its memory say, is a
    failed run and not the end of the sweep.

    Raises:
        RuntimeError: the process left neither a result nor a reason.
    """
    out = Path(out)
    command = [sys.executable, "-c", _COMMAND, str(out)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path}
    with subprocess.Popen(command, stdin=subprocess.PIPE, env=environment) as process:
        process.stdin.write(run.to_yaml().encode() + b"\0")
        process.stdin.flush()
        code = process.wait()
    if not any((out / name).is_file() for name in ("result.json", "failed.json")):
        raise RuntimeError(f"the process that trained it ended with exit code {code}")


def _child() -> None:
    from .training import train

    run, out = _received(), Path(sys.argv[1])
    record_failure(lambda: train(run, out), out)


def _received() -> Run:
    """The run that is written to the standard input; when that is closed, the process ends."""
    text = bytearray()
    while (byte := os.read(0, 1)) not in (b"\0", b""):
        text += byte

    def end_with_the_parent():
        os.read(0, 1)
        os._exit(1)

    threading.Thread(target=end_with_the_parent, daemon=True).start()
    return Run.from_yaml(text.decode())


def record_failure(action: Callable[[], object], folder: Path) -> None:
    """Do something; an exception becomes ``failed.json`` in the folder, and its traceback is printed."""
    try:
        action()
    except Exception as error:
        diverged = isinstance(error, FloatingPointError)
        reason = " ".join(f"{'' if diverged else f'{type(error).__name__}: '}{error}".split())
        print(reason, file=sys.stderr) if diverged else traceback.print_exc()
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "failed.json", json.dumps({"reason": reason, "diverged": diverged}))


def write(path: Path, text: str) -> None:
    """Write whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, "utf-8")
    partial.replace(path)
