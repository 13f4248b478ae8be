"""One measured command after another, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
_KIB = 1 if sys.platform == "darwin" else 1024  # what ru_maxrss counts in


@dataclass(frozen=True)
class Done:
    """Cost of a command: wall-clock seconds, and the largest memory that its process held."""

    seconds: float
    peak_memory_bytes: int


def run(
    arguments: Sequence[str], *, folder: Path, log: Path, python: str = sys.executable, store: Path | None = None
) -> Done:
    """Run Python on this checkout's modules, in a folder, perhaps with a store of its own.

    Raises:
        ValueError: it failed; with the last lines of its log.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | ({"LORABUILD_STORE": str(store)} if store else {})
    environment.pop("DVC_ROOT", None)  # checkpoints and caches lie in the folder
    started = time.perf_counter()
    with log.open("w") as output:
        child = subprocess.Popen([python, *arguments], cwd=folder, env=environment, stdout=output, stderr=output)
        # Of this very child: getrusage(RUSAGE_CHILDREN) knows the largest of all so far alone.
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - started
    if child.returncode:
        last = " / ".join(log.read_text(errors="replace").strip().splitlines()[-3:])
        raise ValueError(f"{' '.join(arguments[:2])} failed (see {log}): {last}")
    return Done(seconds, usage.ru_maxrss * _KIB)


def overrides(settings: Mapping[str, Any]) -> list[str]:
    """`--set` for each parameter by its dotted name."""
    return [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]
