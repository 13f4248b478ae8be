"""A .gguf as the base model: converted once into the store, pinned by what is in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.base.manifest import Manifest, locate, read_manifest
from stages.fetch import fetch
from tests.support.gguf_files import Q4_0, Q4_1, tensors, tiny_gguf
from tests.support.imports import ROOT


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORABUILD_STORE", str(tmp_path / "store"))


def run(tmp_path: Path, source: str, revision: str = "null") -> Manifest:
    out = tmp_path / "base.json"
    overrides = [f"model.source='{source}'", f"model.revision={revision}"]
    fetch(out, params_file=ROOT / "params.yaml", overrides=overrides)
    return read_manifest(out)


def test_model_of_a_file_is_a_directory_in_the_store(tmp_path: Path) -> None:
    manifest = run(tmp_path, str(tiny_gguf(tmp_path / "tiny.gguf")))
    directory = locate(manifest)
    assert directory.is_relative_to(tmp_path / "store")
    assert manifest.source == "file:tiny.gguf"
    assert manifest.architecture == "llama"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(manifest.files)
    assert str(tmp_path) not in (tmp_path / "base.json").read_text(encoding="utf-8")


def test_same_file_is_not_converted_again(tmp_path: Path) -> None:
    file = tiny_gguf(tmp_path / "tiny.gguf")
    first = run(tmp_path, str(file))
    before = (locate(first) / "model.safetensors").stat().st_mtime_ns
    assert run(tmp_path, str(file)) == first
    assert (locate(first) / "model.safetensors").stat().st_mtime_ns == before


def test_other_content_is_another_base_model(tmp_path: Path) -> None:
    file = tiny_gguf(tmp_path / "tiny.gguf", tensors(Q4_1))
    first = run(tmp_path, str(file))
    tiny_gguf(file, tensors(Q4_0))
    second = run(tmp_path, str(file))
    assert first.revision != second.revision
    assert first.identity != second.identity


def test_file_is_found_from_the_folder_of_an_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "experiment").mkdir()
    monkeypatch.chdir(tmp_path / "experiment")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert run(tmp_path, "tiny.gguf").source == "file:tiny.gguf"


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("model.gguf", b"", "cannot be read as GGUF"),
        ("model.gguf", b"GGUF", "cannot be read as GGUF"),
        ("model.bin", b"x", "is a file, and no .gguf"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, name: str, content: bytes, match: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=match) as caught:
        run(tmp_path, str(tmp_path / name))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "base.json").exists()


def test_revision_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a local file, which has no revisions; set it to null"):
        run(tmp_path, str(tiny_gguf(tmp_path / "tiny.gguf")), "main")
