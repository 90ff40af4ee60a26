"""Times that are paid once a process: the import, and the first derive of an energy."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import cem

from .memory import ROOT
from .settings import Settings

# Inside the process, so that starting the interpreter does not count: by the wall clock, and of
# the processor, which what else runs on the machine disturbs less.
CLOCK = """
import json, time
def now():
    return time.perf_counter(), time.process_time()
def since(then):
    return [b - a for a, b in zip(then, now())]
start = now()
"""

IMPORT = (
    CLOCK
    + """
import torch, sympy
base, start = since(start), now()
{extra}
print(json.dumps([base, since(start)]))
"""
)

# The imports leave a full garbage collection pending, which takes about 0.1 s over the objects of torch and
# falls on whatever allocates next; it is taken before the clock starts.
DERIVE = (
    CLOCK
    + """
import gc, torch, cem, cem.energies
torch.set_num_threads(1)
gc.collect()
found = []
for _ in range(2):
    start = now()
    cem.derive(getattr(cem.energies, {name!r}), **{sizes!r})
    found.append(since(start))
print(json.dumps(found))
"""
)


def fresh(code: str):
    """What a program printed as JSON, run in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout)


def import_times(settings: Settings) -> dict[str, list[float]]:
    """Seconds, one entry a process; processes with and without cem alternate.

    ``base`` is torch and sympy alone, ``both`` all three, ``cem`` the part of cem in the latter and
    ``cem_cpu`` the same in time of the processor.
    """
    found: dict[str, list[float]] = {"base": [], "both": [], "cem": [], "cem_cpu": []}
    for extra in ("", "import cem"):  # the first of each compiles bytecode and fills the page cache
        fresh(IMPORT.format(extra=extra))
    for done in range(settings.processes):
        for extra in ("", "import cem") if done % 2 == 0 else ("import cem", ""):
            base, own = fresh(IMPORT.format(extra=extra))
            if extra:
                found["both"].append(base[0] + own[0])
                found["cem"].append(own[0])
                found["cem_cpu"].append(own[1])
            else:
                found["base"].append(base[0])
    return found


def sizes_of(energy, settings: Settings) -> dict[str, int]:
    """A value for every named size of an energy."""
    heads, dim = settings.heads, settings.dim
    known = {"dim": dim, "heads": heads, "rank": settings.rank, "hidden": settings.hidden}
    known |= {"groups": heads // 2, "per_group": 2, "block": dim // heads}
    return {str(size): known.get(str(size), 8) for size in energy.dims}


def derive_times(name: str, settings: Settings) -> dict[str, list[float]]:
    """Seconds of the first and of the second derive of a gallery energy, one entry a process."""
    code = DERIVE.format(name=name, sizes=sizes_of(getattr(cem.energies, name), settings))
    both = [fresh(code) for _ in range(settings.derive_processes)]
    return {
        "first": [first[0] for first, _ in both],
        "first_cpu": [first[1] for first, _ in both],
        "second": [second[0] for _, second in both],
    }


def gallery() -> list[str]:
    """The names of all energies of the gallery; one name for each where it has several."""
    found = {id(getattr(cem.energies, name)): name for name in reversed(cem.energies.__all__)}
    names = sorted(found.values())
    return [name for name in names if isinstance(getattr(cem.energies, name), cem.Energy)]
