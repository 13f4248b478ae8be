"""What rounds a result: each case in a process of its own, for a library that is loaded stays as it was loaded."""

from __future__ import annotations

import ast
import json
import os
import platform
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from stages.model import blas, numerics
from tests.support.imports import MODULES, NUMERICAL, ROOT

pytestmark = pytest.mark.skipif(
    not blas.is_needed() or platform.machine() != "x86_64", reason="this MLX is not the CPU build for Linux on x86-64"
)
STEERING = ("LORABUILD_BLAS", "LORABUILD_NUMERICS", "OPENBLAS_", "NPY_")

# A tiny run: products as large as make OpenBLAS take several threads, then updates of a small model, its scores and its
# merged weights. Prints what computed, and a hash of every bit of each part.
RUN = """
import hashlib, json, sys
from pathlib import Path
from stages.model import numerics
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from stages.lora import adapter
from stages.lora.batches import collate
from stages.lora.execution import use_kernels
from stages.merging.fuse import fuse
from stages.model.load import load_base
from stages.scoring.score import score_batch
from tests.support.adapters import config
from tests.support.rows import token_row
from tests.support.runs import make_trainer

def digest(*arrays):
    found = hashlib.sha256()
    for array in arrays:
        found.update(np.array(array).tobytes())
    return found.hexdigest()[:12]

rng = np.random.default_rng(0)
a, b = (mx.array(rng.standard_normal((200, 900), dtype=np.float32)) for _ in range(2))
wide = np.linspace(-8, 8, 100_003, dtype=np.float32)
parts = {"product": digest(a @ b.T), "loops": digest(np.exp(wide), np.tanh(wide))}
rows = [token_row(i, 12 + 5 * i, trained=6 + i) for i in range(4)]
model = load_base(Path(sys.argv[1]), dtype="float32")[0]
adapter.attach(model, config(), seed=0)
use_kernels(model, rows)
trainer = make_trainer(model, rows, rows[:2], iters=3)
list(trainer.run())
parts["adapter"] = digest(*(array for _, array in sorted(tree_flatten(model.trainable_parameters()))))
parts["scores"] = repr(score_batch(model, collate(rows)))
fuse(model, dtype=mx.float32, requantize=False)
parts["merged"] = digest(*(array for _, array in sorted(tree_flatten(model.parameters()))))
print(json.dumps({"parts": parts, "in_use": numerics.in_use()}))
"""


@cache
def run(model: Path, choice: str, cores: int | None = None, **environment: str) -> dict[str, Any]:
    """The tiny run in a process of its own, perhaps on some of the processor's cores alone."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(STEERING)}
    code = RUN if cores is None else f"import os; os.sched_setaffinity(0, range({cores}))\n{RUN}"
    done = subprocess.run(
        [sys.executable, "-c", code, str(model)],
        cwd=ROOT,
        env=kept | {"LORABUILD_NUMERICS": choice, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) | {"warned": done.stderr}


def differing(one: dict[str, Any], two: dict[str, Any]) -> set[str]:
    return {name for name, digest in one["parts"].items() if digest != two["parts"][name]}


# What another processor's choice and another user's environment would be. X86_V3 stands in for the AVX-512 of others,
# which this processor may not have to switch off.
ELSEWHERE = {"OPENBLAS_CORETYPE": "Nehalem", "OPENBLAS_NUM_THREADS": "1", "NPY_DISABLE_CPU_FEATURES": "X86_V3"}


def test_portable_bytes_do_not_depend_on_kernel_threads_loops_or_cores(tiny_llama: Path) -> None:
    first, other = run(tiny_llama, "portable"), run(tiny_llama, "portable", cores=1, **ELSEWHERE)
    assert differing(first, other) == set()
    assert first["in_use"] == other["in_use"]
    assert (first["in_use"]["blas_kernel"], first["in_use"]["blas_threads"]) == ("Haswell", 2)
    assert first["in_use"]["vector_code"] == ["X86_V3"]
    assert first["warned"] == ""
    for name, value in ELSEWHERE.items():
        assert f"{name}={value} is set aside" in other["warned"]


def test_native_bytes_depend_on_kernel_and_loops(tiny_llama: Path) -> None:
    other = run(tiny_llama, "native", **ELSEWHERE)
    assert {"product", "loops", "adapter", "merged"} <= differing(run(tiny_llama, "portable"), other)
    assert (other["in_use"]["blas_kernel"], other["in_use"]["vector_code"]) == ("Nehalem", [])
    assert other["warned"] == ""


def test_native_products_depend_on_the_number_of_threads(tiny_llama: Path) -> None:
    # Kernel and loops are those of portable: the threads alone are others.
    one = run(tiny_llama, "native", OPENBLAS_CORETYPE="Haswell", OPENBLAS_NUM_THREADS="1")
    assert one["in_use"]["blas_threads"] == 1
    assert "product" in differing(run(tiny_llama, "portable"), one)


@pytest.mark.skipif("avx512f" not in numerics.processor_flags(), reason="this processor has no AVX-512")
def test_portable_is_haswell_where_openblas_would_choose_skylakex(tiny_llama: Path) -> None:
    own = run(tiny_llama, "native", OPENBLAS_CORETYPE="SkylakeX")
    assert "product" in differing(own, run(tiny_llama, "portable"))
    assert run(tiny_llama, "portable")["in_use"]["blas_kernel"] == "Haswell"


def test_processor_without_avx2_is_told_to_use_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "processor_flags", lambda: {"sse2", "avx"})
    monkeypatch.setattr(numerics, "_settled", None)
    with pytest.raises(ValueError, match=r"AVX2 and FMA, which this one lacks: set model\.numerics=native"):
        numerics.settle("portable")


def test_other_processes_inherit_nothing() -> None:
    code = "import os, stages.model; print([name for name in os.environ if name.startswith(('OPENBLAS_', 'NPY_'))])"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(STEERING)}
    kept |= {"LORABUILD_NUMERICS": "portable"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=kept, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_no_command_imports_numpy_before_it_reads_the_parameters() -> None:
    code = "import sys, stages.__main__; print({'numpy', 'mlx.core', 'stages.model'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize("path", [path for path in MODULES if len(path.parts) == 2], ids=str)
def test_no_command_imports_the_model_before_it_is_settled(path: Path) -> None:
    for function in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if not isinstance(function, ast.FunctionDef) or function.name != path.stem:
            continue
        names = {
            node.func.id: node.lineno
            for node in ast.walk(function)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        settled = min(names.get(name, 10**6) for name in ("load_settings", "settle_to_look"))
        rooms = {
            node.module.split(".")[1]: node.lineno
            for node in ast.walk(function)
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("stages.")
        }
        assert {room for room, line in rooms.items() if room in NUMERICAL and line < settled} == set()


@pytest.mark.parametrize("choice", ["portable", "native"])
def test_a_command_settles_what_its_parameters_say(choice: str) -> None:
    code = "import sys; from pathlib import Path; from stages.cli.settings import load_settings\n"
    code += "load_settings(Path('params.yaml'), [f'model.numerics={sys.argv[1]}'])\n"
    code += "from stages.model import numerics; print(numerics.settled())"
    done = subprocess.run([sys.executable, "-c", code, choice], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"{choice}\n"


def test_numerics_in_a_line() -> None:
    found = {"mlx": "1", "numpy": "2", "vector_code": ["X86_V3"]}
    openblas = {"blas_version": "OpenBLAS 0.3", "blas_kernel": "Haswell", "blas_threads": 2}
    assert numerics.describe(found | openblas) == "OpenBLAS 0.3 Haswell, 2 threads; NumPy 2 X86_V3; MLX 1"
    assert numerics.describe(found) == "NumPy 2 X86_V3; MLX 1"
