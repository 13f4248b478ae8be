"""A look at the machine: MLX, BLAS, compiler, memory, disk, DVC, git: `python -m stages doctor`."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from stages.base import store
from stages.cli import console
from stages.cli.settings import settle_to_look
from stages.cli.versions import describe_difference

GB = 1e9


def doctor() -> None:
    """Show MLX and its device, BLAS, numerics and speed, compiler, memory, disk, DVC, git, and the base-model store."""
    problem = settle_to_look()
    with console.progress("looking around"):
        rows = list(_findings())
    console.table("This machine", ("", "found"), rows, numeric=False)
    if problem:
        console.warn(problem)


def _findings() -> Iterator[tuple[str, str]]:
    from stages.model import blas, numerics  # the BLAS comes before MLX
    import mlx.core as mx  # isort: skip

    yield (
        "system",
        f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, {os.cpu_count()} cores",
    )
    yield "mlx", f"{_version('mlx')}, mlx-lm {_version('mlx-lm')}, on {mx.default_device().type.name.upper()}"
    yield (
        "BLAS",
        blas.loaded() or ("none: MLX's own reference BLAS" if blas.is_needed() else "MLX's own (none is needed)"),
    )
    yield "numerics", f"{numerics.settled()}: {numerics.describe(numerics.in_use())}"
    yield "matrix product", f"{_gflops():,.0f} GFLOP/s in float32"
    yield "C++ compiler", shutil.which("g++") or shutil.which("clang++") or "none: mx.compile falls back on a CPU"
    yield "memory", f"{_memory() / GB:,.1f} GB"
    here, there = shutil.disk_usage("."), shutil.disk_usage(_existing(store.root()))
    yield "free disk", f"{here.free / GB:,.0f} GB here, {there.free / GB:,.0f} GB at the store"
    yield "versions", describe_difference() or "as in versions.yaml"
    yield "DVC", f"{_version('dvc')}, {_dvc_state()}"
    yield "git", _git_state()
    yield "store", f"{store.root()}, {_size(store.root()) / GB:,.2f} GB"
    yield "base models", ", ".join(sorted(path.name for path in (store.root() / "models").glob("[!.]*"))) or "none yet"


def _gflops(size: int = 1024, repeats: int = 5) -> float:
    """Measure the speed of a square matrix product in float32: the best of some repeats."""
    import mlx.core as mx

    a, b = mx.random.normal((size, size)), mx.random.normal((size, size))
    mx.eval(a, b)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        mx.eval(a @ b)
        seconds.append(time.perf_counter() - started)
        if seconds[-1] > 0.3:  # the reference BLAS: once is enough
            break
    return 2 * size**3 / min(seconds) / 1e9


def _memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _version(distribution: str) -> str:
    from stages.model import blas

    return blas.installed_version(distribution) or "not installed"


def _dvc_state() -> str:
    return "a repository" if Path(".dvc/config").exists() else "no repository here (run in the project's folder)"


def _git_state() -> str:
    if shutil.which("git") is None:
        return "not installed: DVC needs it"
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=True)
    except subprocess.CalledProcessError:
        return "no commit here: DVC's experiments need one"
    count = len(changes.stdout.splitlines())
    return f"commit {head.stdout.strip()}, " + (f"{count} uncommitted changes" if count else "clean")


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
