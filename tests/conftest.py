"""Fixtures that several test modules share: a tiny model on disk, and rows for it."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from stages.tokens.row import TokenRow

# No test talks to a network, whatever it calls, nor to the user's own store, into which the fast BLAS is copied.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["LORABUILD_STORE"] = tempfile.mkdtemp(prefix="lorabuild-tests-")
atexit.register(shutil.rmtree, os.environ["LORABUILD_STORE"], ignore_errors=True)

# A test run in the background (nohup, or a shell's &) ignores these signals, and so would the processes that tests
# start and interrupt. A handler that does nothing is as good here, and is not passed on.
for kind in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(kind) == signal.SIG_IGN:
        signal.signal(kind, lambda number, frame: None)

import stages.model  # noqa: E402, F401  the BLAS comes before MLX, which test modules import first


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a store of its own; the BLAS that this process loaded stays."""
    store = tmp_path / "store"
    monkeypatch.setenv("LORABUILD_STORE", str(store))
    return store


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A randomly initialised Llama of 3 layers with a byte-level tokenizer, in the Hugging Face layout."""
    from tests.support.tiny import write_llama

    return write_llama(tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture
def project(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with params.yaml and rows, the tiny model as its base; the working directory of the test."""
    from tests.support.tiny import small_params

    folder = tmp_path / "project"
    (folder / "data" / "raw").mkdir(parents=True)
    (folder / "params.yaml").write_text(small_params(source=str(tiny_llama)), encoding="utf-8")
    rows = [{"question": f"{a} 더하기 {b}는?", "answer": f"{a + b}이다."} for a in range(8) for b in range(5)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "data" / "raw" / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "data" / "prompts.jsonl").write_text('{"question": "9 더하기 9는?"}\n', encoding="utf-8")
    general = ['{"language": "en", "text": "It rains."}\n', '{"language": "ko", "text": "비가 온다."}\n']
    (folder / "data" / "general.jsonl").write_text("".join(general), encoding="utf-8")
    monkeypatch.chdir(folder)
    yield folder


@pytest.fixture
def rows() -> list[TokenRow]:
    """Eleven rows of different lengths, so that four do not divide them."""
    from tests.support.rows import token_row

    return [token_row(i, 6 + 3 * i, trained=2 + i) for i in range(11)]


@pytest.fixture
def model(tiny_llama: Path) -> Any:
    """The frozen tiny Llama in float32."""
    from stages.model.load import load_base

    return load_base(tiny_llama, dtype="float32")[0]


@pytest.fixture(scope="module")
def models_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models that answer (see tests/support/serving.py), one for all tests of a module."""
    from tests.support.serving import write_models

    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def in_models_folder(models_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, as the working directory."""
    monkeypatch.chdir(models_folder)
    monkeypatch.setenv("LORABUILD_STORE", str(models_folder / "store"))
    return models_folder
