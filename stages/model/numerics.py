"""What rounds a result on a Linux CPU: OpenBLAS's kernel and threads, and NumPy's vector loops.

A library that chooses them by the processor gives other last bits on another one. `settle("portable")` fixes them to
what every x86-64 with AVX2 has, so that all of these give the same bytes, whatever their number of cores;
`settle("native")` leaves them to the libraries and to the user's environment. Elsewhere nothing is fixed.

Both libraries read their settings from the environment when they are loaded, and never again: so a process is settled
once, before it imports NumPy or MLX. The first import of `stages.model` does so, by `$LORABUILD_NUMERICS`.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import platform
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.model import blas

VARIABLE = "LORABUILD_NUMERICS"
PORTABLE, NATIVE = "portable", "native"
# Of OpenBLAS under portable numerics: its kernels add up in another order for another number of threads.
THREADS = 2


@dataclass(frozen=True)
class Fixed:
    """What portable numerics are on one kind of machine."""

    kernel: str  # OpenBLAS's name for it
    numpy_on: frozenset[str]  # NumPy's names of what all of these machines have
    numpy_off: str  # and of what only some have
    needs: frozenset[str]  # flags of /proc/cpuinfo

    def environment(self) -> dict[str, str]:
        """The variables that the libraries read."""
        return {
            "OPENBLAS_CORETYPE": self.kernel,
            "OPENBLAS_NUM_THREADS": str(THREADS),
            "NPY_DISABLE_CPU_FEATURES": self.numpy_off,
        }


_FIXED = {"x86_64": Fixed("Haswell", frozenset({"X86_V3"}), "X86_V4 AVX512_ICL AVX512_SPR", frozenset({"avx2", "fma"}))}
# What else steers the two libraries; a value of the user's would count beside the fixed ones.
_STEERING = ("OPENBLAS_CORETYPE", "OPENBLAS_NUM_THREADS", "NPY_DISABLE_CPU_FEATURES", "NPY_ENABLE_CPU_FEATURES")
_settled: str | None = None


def settle(choice: str) -> None:
    """Load OpenBLAS and NumPy by `choice`, once in a process; warn where it comes too late.

    Raises:
        ValueError: there is no such choice, this processor lacks what it takes, or a library cannot serve.
    """
    global _settled
    if choice not in (PORTABLE, NATIVE):
        raise ValueError(f"{VARIABLE}={choice}: set it to {PORTABLE} or {NATIVE}")
    if _settled is not None:
        if choice != _settled and blas.is_needed():
            warnings.warn(f"this process began with {_settled} numerics, and keeps them", stacklevel=2)
        return
    fixed = _fixed() if choice == PORTABLE and blas.is_needed() else None
    if fixed is None:
        blas.preload()
    else:
        if "numpy" in sys.modules and _dispatched() != _dispatched(without=fixed.numpy_off.split()):
            warnings.warn("NumPy was imported before stages.model, and keeps this processor's own loops", stacklevel=2)
        with _environment(fixed.environment()):
            blas.preload()
            import numpy  # noqa: F401  now, while it finds the variables
        _set_threads()
        _check(fixed)
    _settled = choice


def settled() -> str | None:
    """What this process was settled to."""
    return _settled


def _fixed() -> Fixed | None:
    """What is fixed on this machine; None where nothing is.

    Raises:
        ValueError: the processor lacks what it takes.
    """
    fixed = _FIXED.get(platform.machine())
    if fixed is not None and (missing := fixed.needs - processor_flags()):
        named = " and ".join(name.upper() for name in sorted(missing))
        raise ValueError(
            f"portable numerics need a processor with {named}, which this one lacks: set model.numerics=native"
        )
    return fixed


def idle_cores() -> str | None:
    """A line for the user of a machine with more cores than portable numerics multiply with."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    if _settled != PORTABLE or openblas().get("threads") != THREADS or cores <= THREADS:
        return None
    return (
        f"model.numerics: portable multiplies matrices with {THREADS} of {cores} cores, for the same bytes everywhere; "
        "native takes all"
    )


def processor_flags() -> set[str]:
    """What /proc/cpuinfo says that the processor has; nothing where it says it otherwise."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()


def _check(fixed: Fixed) -> None:
    """Warn where a library went its own way: another BLAS, say, or one without the kernel."""
    if others := set(_dispatched()) - fixed.numpy_on:
        warnings.warn(
            f"NumPy uses {', '.join(sorted(others))}, which only some processors have, so the bytes are this machine's "
            "own; install the NumPy of constraints.txt",
            stacklevel=3,
        )
    found = openblas()
    if blas.loaded() and (found.get("kernel"), found.get("threads")) != (fixed.kernel, THREADS):
        warnings.warn(
            f"{blas.loaded()}: not OpenBLAS's {fixed.kernel} kernel with {THREADS} threads, so the bytes are this "
            "machine's own",
            stacklevel=3,
        )


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """These variables in place of the user's own, for a while; what other processes inherit stays as it was."""
    before = {name: os.environ.pop(name) for name in _STEERING if name in os.environ}
    for name in sorted(name for name in before if before[name] != values.get(name)):
        warnings.warn(
            f"{name}={before[name]} is set aside, for model.numerics: portable; native heeds it", stacklevel=4
        )
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            del os.environ[name]
        os.environ.update(before)


# --- What computes ---


def in_use() -> dict[str, Any]:
    """What rounds this process's results: equal on two machines, and the bytes are, if their C libraries are, too."""
    import numpy

    found: dict[str, Any] = {"mlx": blas.installed_version("mlx"), "numpy": numpy.__version__}
    return found | {"vector_code": _dispatched()} | {f"blas_{name}": value for name, value in openblas().items()}


def machine() -> dict[str, Any]:
    """`in_use`, and what else of this machine has a say: what is made under one is never mixed with another's."""
    return in_use() | {"c_library": " ".join(platform.libc_ver()), "processor": platform.machine()}


def openblas() -> dict[str, Any]:
    """Version, kernel and threads of the OpenBLAS under MLX; of another library its name; nothing if there is none."""
    if (path := blas.loaded()) is None:
        return {}
    if _function("openblas_get_corename") is None:
        return {"version": Path(path).name}
    core, config = (_function(f"openblas_get_{name}") for name in ("corename", "config"))
    core.restype = config.restype = ctypes.c_char_p
    version = " ".join(config().decode().split()[:2])
    return {"version": version, "kernel": core().decode(), "threads": _function("openblas_get_num_threads")()}


def _set_threads() -> None:
    """Let OpenBLAS have its threads where there are fewer cores: from the environment it takes no more than those."""
    if (function := _function("openblas_set_num_threads")) is not None:
        function(THREADS)


def _function(name: str) -> Any:
    """A function of the OpenBLAS under MLX, which SciPy's build calls `scipy_…`; None if there is none.

    Source: OpenBLAS's `cblas.h`.
    """
    if (path := blas.loaded()) is None:
        return None
    library = ctypes.CDLL(path)
    return getattr(library, f"scipy_{name}", None) or getattr(library, name, None)


def describe(found: Mapping[str, Any]) -> str:
    """`in_use` in a line, such as `OpenBLAS 0.3.30 Haswell, 1 thread; NumPy 2.4.6 X86_V3; MLX 0.32.4`."""
    parts = []
    if "blas_version" in found:
        kernel = [found["blas_kernel"]] if "blas_kernel" in found else []
        threads = found.get("blas_threads")
        counted = [f"{threads} thread{'s' if threads != 1 else ''}"] if threads else []
        parts.append(", ".join([" ".join([found["blas_version"], *kernel]), *counted]))
    parts.append(" ".join(["NumPy", str(found.get("numpy")), *found.get("vector_code", [])]))
    rest = [str(found[name]) for name in ("c_library", "processor", "device") if name in found]
    return "; ".join([*parts, f"MLX {found.get('mlx')}", *rest])


def _dispatched(without: list[str] | None = None) -> list[str]:
    """The processor features above its baseline that NumPy's loops use here, in NumPy's order."""
    umath: Any = importlib.import_module("numpy._core._multiarray_umath")  # as numpy.show_runtime does

    found = [name for name in umath.__cpu_dispatch__ if umath.__cpu_features__.get(name)]
    return [name for name in found if name not in (without or [])]
